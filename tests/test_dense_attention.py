"""What holds for dense attention whatever the numbers are: on the kernel, on `xla`, and between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_bridge
from jax_bridge import AttentionConfig, MaskInfo
from jax_bridge.device import KNOWN_DEVICES, target_device
from tests.implementations import HAS_KERNEL, MARKS, ON_GPU, small_tiles

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]

kernel_runs = pytest.mark.skipif(not HAS_KERNEL, reason="no Triton")

B, Q, K, HQ, HKV, D, DV = 2, 13, 40, 6, 2, 16, 24
RNG = np.random.default_rng(11)
EPSILON = float(np.finfo(np.float32).eps)
TOLERANCE = 4 * EPSILON * (np.sqrt(K) + 8) * 5  # as in `tolerances`, for scores up to 8 and values up to 5


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Whatever ran before in this process."""
    RNG.bit_generator.state = np.random.default_rng(11).bit_generator.state


def inputs(rows: int = Q, keys: int = K, batch: int = B) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shapes = ((batch, rows, HQ, D), (batch, keys, HKV, D), (batch, keys, HKV, DV))
    query, key, value = (RNG.standard_normal(shape).astype(np.float32) for shape in shapes)
    return query, key, value


def attend(*arrays: Any, platform: str = "triton", sinks: Any = None, **options: Any) -> np.ndarray:
    options = {"dtype": None, "cfg": small_tiles("attention") if platform == "triton" else None} | options
    return np.asarray(jax_bridge.attention(*arrays, None, None, sinks, platform=platform, **options))


def segments(rows: int = Q, keys: int = K, batch: int = B, dtype: Any = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Sorted ids from -1 to 3, so that some rows and some keys are padding; the keys have one segment of their own."""
    row_ids = np.sort(RNG.integers(-1, 3, (batch, rows)), axis=1)
    return row_ids.astype(dtype), np.sort(RNG.integers(-1, 4, (batch, keys)), axis=1).astype(dtype)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@kernel_runs
class TestKernel:
    @pytest.mark.parametrize("window", [None, (9, 0), (16, 4)], ids=str)
    def test_skipping_is_the_same_as_masking(self, window: Any) -> None:
        """Tiles left out or unmasked since all rows agree: the same bits as with every score of the range masked."""
        arrays = inputs(rows=24)
        options = {"causal": window != (16, 4), "sliding_window": window}
        skipped = attend(*arrays, **options)
        assert np.array_equal(skipped, attend(*arrays, **options, cfg=small_tiles("attention", skip_masks=False)))
        rows, keys = np.arange(24)[:, None], np.arange(K)
        left, right = window or (K, K)
        visible = np.ones((24, K), bool) if not options["causal"] else keys <= rows
        visible = visible & (keys >= rows - left) & (keys <= rows + right)
        mask = MaskInfo.from_attention_mask(np.broadcast_to(visible, (B, 1, 24, K)))
        assert_close(skipped, attend(*arrays, platform="xla", mask_info=mask))

    def test_causal_rows_see_what_their_length_says(self) -> None:
        """Row `i` alone over its first `i + 1` keys, all rows as one batch."""
        query, key, value = inputs(batch=1)
        alone = attend(
            query[0][:, None],
            np.broadcast_to(key, (Q, *key.shape[1:])),
            np.broadcast_to(value, (Q, *value.shape[1:])),
            mask_info=MaskInfo.from_key_lengths(np.arange(1, Q + 1), 1, K),
        )
        assert_close(alone[:, 0], attend(query, key, value, causal=True)[0])

    @pytest.mark.parametrize(
        "fields", [{"block_q": 32}, {"block_k": 32}, {"kv_heads_at_once": 1}, {"kv_heads_at_once": 4}], ids=str
    )
    def test_configurations_agree(self, fields: dict[str, Any]) -> None:
        arrays = inputs(rows=20)
        got = attend(*arrays, causal=True, cfg=small_tiles("attention", **fields))
        assert_close(got, attend(*arrays, causal=True))
        if "kv_heads_at_once" in fields:  # another order of the same programs
            assert np.array_equal(got, attend(*arrays, causal=True))

    def test_permuting_the_batch_permutes_the_answer(self) -> None:
        order = np.array([1, 0])
        arrays, (row_ids, key_ids) = inputs(), segments()
        got = attend(*arrays, mask_info=MaskInfo.from_segments(row_ids, key_ids), causal=True)
        permuted = attend(
            *(array[order] for array in arrays),
            mask_info=MaskInfo.from_segments(row_ids[order], key_ids[order]),
            causal=True,
        )
        assert np.array_equal(permuted, got[order])

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("window", [None, (7, 3)], ids=str)
    @pytest.mark.parametrize("masked_by", ["nothing", "segments", "lengths"])
    def test_keys_that_no_row_sees_and_rows_that_see_none_may_hold_anything(
        self, masked_by: str, window: Any, causal: bool
    ) -> None:
        (query, key, value), (row_ids, key_ids) = inputs(), segments()
        lengths = np.array([0, 13])
        info = {
            "nothing": None,
            "segments": MaskInfo.from_segments(row_ids, key_ids),
            "lengths": MaskInfo.from_key_lengths(lengths, Q, K),
        }[masked_by]
        options = {"mask_info": info, "sliding_window": window, "causal": causal}
        expected = attend(query, key, value, platform="xla", **options)
        rows, keys = np.arange(Q)[:, None], np.arange(K)
        visible = np.ones((B, Q, K), bool) if info is None else np.asarray(info.get_or_compute_attention_mask())[:, 0]
        visible = visible & (keys <= rows) if causal else visible
        visible = visible if window is None else visible & (keys >= rows - window[0]) & (keys <= rows + window[1])
        key[~visible.any(1)], value[~visible.any(1)] = np.inf, np.nan
        query[~visible.any(2)] = np.nan
        assert_close(attend(query, key, value, **options), expected)

    def test_padding_rows_beside_padding_keys_may_hold_nan(self) -> None:
        (query, key, value), ids = inputs(rows=K), segments(rows=K)[1]
        info = MaskInfo.from_segments(ids, ids)
        expected = attend(query, key, value, mask_info=info)
        assert (ids < 0).any()
        query[ids < 0] = np.nan
        got = attend(query, key, value, mask_info=info)
        assert np.array_equal(got, expected)
        assert not got[ids < 0].any()

    @pytest.mark.parametrize("ordered", [True, False])
    def test_segments_are_attended_apart(self, ordered: bool) -> None:
        (query, key, value), (row_ids, key_ids) = inputs(), segments()
        if not ordered:
            row_ids, key_ids = RNG.permuted(row_ids, axis=1), RNG.permuted(key_ids, axis=1)
        got = attend(query, key, value, mask_info=MaskInfo.from_segments(row_ids, key_ids))
        for batch in range(B):
            for segment in range(-1, 3):
                rows, keys = row_ids[batch] == segment, key_ids[batch] == segment
                if segment < 0 or not keys.any():
                    assert not np.any(got[batch, rows])
                elif rows.any():
                    alone = attend(query[batch, rows][None], key[batch, keys][None], value[batch, keys][None])
                    assert_close(got[batch, rows], alone[0])

    @pytest.mark.parametrize(
        "dtypes", [("uint32", "uint32"), ("int8", "int32"), ("uint8", "int16"), ("uint32", "uint8")], ids=str
    )
    def test_segments_of_any_integers(self, dtypes: tuple[str, str]) -> None:
        """Ids as large as their dtype holds keep apart, and small ones agree across dtypes."""
        arrays = inputs()
        row_ids, key_ids = (ids.clip(0).astype(dtype) for ids, dtype in zip(segments(), dtypes, strict=True))
        if dtypes == ("uint32", "uint32"):
            row_ids, key_ids = np.uint32(2**32 - 1) - row_ids, np.uint32(2**32 - 1) - key_ids
        info = MaskInfo.from_segments(row_ids, key_ids)
        assert_close(attend(*arrays, mask_info=info), attend(*arrays, mask_info=info, platform="xla"))

    def test_a_segment_does_not_wrap_round_to_padding(self) -> None:
        row_ids, key_ids = np.full((1, 1), 2**32 - 1, np.uint32), np.full((1, 1), -1, np.int32)
        for asarray in (np.asarray, jnp.asarray):
            info = MaskInfo.from_segments(asarray(row_ids), asarray(key_ids))
            assert not info.get_or_compute_attention_mask().any()

    @pytest.mark.parametrize("keys_of", ["numpy", "jax"])
    def test_segments_of_64_bits(self, keys_of: str) -> None:
        """numpy's 64-bit ids, such as hashes, are not wrapped round to 32 bits."""
        row_ids, key_ids = segments(dtype=np.int64)
        arrays, small = inputs(), MaskInfo.from_segments(row_ids.astype(np.int32), key_ids.astype(np.int32))
        if keys_of == "jax":
            large = MaskInfo.from_segments(np.where(row_ids == 1, 2**32 + 1, row_ids), jnp.asarray(key_ids))
            expected = MaskInfo.from_segments(np.where(row_ids == 1, -1, row_ids).astype(np.int32), key_ids)
        else:
            large = MaskInfo.from_segments(*(np.where(ids < 0, ids, 2**31 + (ids << 32)) for ids in (row_ids, key_ids)))
            expected = small
        assert (row_ids == 1).any()
        assert (key_ids < 0).any()
        assert np.array_equal(large.get_or_compute_attention_mask(), expected.get_or_compute_attention_mask())
        assert_close(attend(*arrays, mask_info=large), attend(*arrays, mask_info=expected, platform="xla"))
        mask = jax.jit(MaskInfo.get_or_compute_attention_mask)(large)  # JAX narrows what goes into a program
        assert np.array_equal(mask, expected.get_or_compute_attention_mask())

    def test_no_keys_and_no_rows(self) -> None:
        query, key, value = inputs()
        assert not np.any(attend(query, key[:, :0], value[:, :0], sinks=np.ones(HQ, np.float32)))
        assert attend(query[:, :0], key, value).shape == (B, 0, HQ, DV)
        assert attend(query[:0], key[:0], value[:0]).shape == (0, Q, HQ, DV)

    @pytest.mark.parametrize("shape", [(HQ,), (3,), (HQ, 2), (0,)], ids=str)
    def test_sinks_of_every_shape(self, shape: tuple[int, ...]) -> None:
        arrays, sinks = inputs(), 2 * RNG.standard_normal(shape).astype(np.float32)
        if shape == (HQ, 2):
            sinks[0], sinks[1, 0] = -np.inf, -np.inf
        assert_close(
            attend(*arrays, sinks=sinks, causal=True), attend(*arrays, sinks=sinks, causal=True, platform="xla")
        )

    @pytest.mark.parametrize("scale", [0.0, -0.7])
    def test_scales_that_are_not_positive(self, scale: float) -> None:
        arrays = inputs()
        options = {"softmax_scale": scale, "sliding_window": (12, 0)}
        assert_close(attend(*arrays, **options), attend(*arrays, **options, platform="xla"))

    def test_vmap_is_a_loop(self) -> None:
        query, key, value = inputs()
        queries = np.stack([query, 2 * query])[:, :1, :4]
        query, key, value = queries[1], key[:1], value[:1]
        got = jax.vmap(lambda query: jax_bridge.attention(query, key, value, dtype=None, platform="triton"))(queries)
        assert_close(np.asarray(got[1]), attend(query, key, value, cfg=None))

    def test_differentiation_is_refused(self) -> None:
        query, key, value = inputs()
        with pytest.raises(NotImplementedError, match=r'attention\[triton\] does not support diff.*platform="xla"'):
            jax.grad(lambda query: jax_bridge.attention(query, key, value, platform="triton").sum())(query)

    def test_a_tile_that_no_dot_product_takes_is_refused(self) -> None:
        with pytest.raises(ValueError, match="block_k is 8, expected a power of two from 16"):
            AttentionConfig(block_k=8)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"return_weights": True}, "return_weights"),
            ({"softmax_dtype": jnp.bfloat16}, "softmax_dtype=bfloat16"),
            ({"mask_info": MaskInfo.from_attention_mask(np.ones((B, 1, Q, K), bool))}, "a boolean mask in mask_info"),
        ],
    )
    def test_what_it_lacks_is_refused(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(
            NotImplementedError, match=rf'attention\[triton\] does not support {words}.*use platform="xla"'
        ):
            attend(*inputs(), **options)

    def test_dropout_is_refused(self) -> None:
        with pytest.raises(NotImplementedError, match=r"attention\[triton\] does not support dropout_prob"):
            jax_bridge.attention(
                *inputs(), None, jax.random.key(0), dropout_prob=0.5, deterministic=False, platform="triton"
            )


def test_one_program_serves_every_segment_and_length() -> None:
    query, key, value = inputs()
    traces = 0

    @jax.jit
    def call(info: MaskInfo) -> jax.Array:
        nonlocal traces
        traces += 1
        return jax_bridge.attention(query, key, value, dtype=None, mask_info=info)

    for _ in range(2):
        info = MaskInfo.from_segments(*segments())
        assert_close(np.asarray(call(info)), attend(query, key, value, platform="xla", mask_info=info))
    for lengths in ([1, 3], [K + 7, -4]):
        info = MaskInfo.from_key_lengths(np.array(lengths), Q, K)
        visible = np.arange(K) < np.array(lengths)[:, None, None, None]
        mask = MaskInfo.from_attention_mask(np.broadcast_to(visible, (B, 1, Q, K)))
        assert_close(np.asarray(call(info)), attend(query, key, value, platform="xla", mask_info=mask))
    assert traces == 2


@pytest.mark.skipif(ON_GPU, reason="the same on every machine")
class TestXla:
    """What the matrix does not reach: gradients with respect to everything, and the corners of the arguments."""

    BIAS = 2 * RNG.standard_normal((B, 1, Q, K)).astype(np.float32)
    SINKS = RNG.standard_normal((HQ, 2)).astype(np.float32)
    OPTIONS: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "window": {"sliding_window": (5, 2)},
        "causal-cap": {"causal": True, "logits_soft_cap": 1.0},
        "dropout": {"deterministic": False, "dropout_prob": 0.3},
        "segments": {"mask_info": MaskInfo.from_segments(*segments())},
        "lengths": {"mask_info": MaskInfo.from_key_lengths(np.array([0, 20]), Q, K)},
    }

    @pytest.mark.parametrize("case", OPTIONS)
    def test_gradients_match_finite_differences(self, case: str) -> None:
        """With respect to query, key, value, bias and sinks; rows without a key among them."""

        def call(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, sinks: jax.Array) -> jax.Array:
            rng = jax.random.key(1)
            return jax_bridge.attention(query, key, value, bias, rng, sinks, dtype=None, **self.OPTIONS[case])

        arrays = tuple(jnp.asarray(array) for array in (*inputs(), self.BIAS, self.SINKS))
        check_grads(call, arrays, order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)

    def test_gradients_match_jax(self) -> None:
        query, key, value = inputs()
        value = value[..., :D]
        visible = np.array(RNG.random((B, 1, Q, K)) < 0.7)
        visible[..., 0] = True

        def ours(*arrays: Any) -> jax.Array:
            mask = MaskInfo.from_attention_mask(visible)
            out: jax.Array = jax_bridge.attention(*arrays[:3], arrays[3], dtype=None, mask_info=mask, causal=True)
            return jnp.sum(jnp.sin(out))

        def theirs(*arrays: Any) -> jax.Array:
            query, key, value, bias = arrays
            out = jax.nn.dot_product_attention(query, key, value, bias, visible, is_causal=True)
            return jnp.sum(jnp.sin(out))

        arrays = tuple(jnp.asarray(array) for array in (query, key, value, self.BIAS))
        got, expected = (jax.value_and_grad(loss, (0, 1, 2, 3))(*arrays) for loss in (ours, theirs))
        for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=5e-5)

    def test_init_bias_only_without_bias_and_mask(self) -> None:
        arrays = inputs()

        def refuse() -> Any:
            raise AssertionError("called")

        mask = MaskInfo.from_key_lengths(np.full(B, K), Q, K)
        plain = attend(*arrays, platform="xla")
        assert np.array_equal(attend(*arrays, platform="xla", mask_info=mask, init_bias=refuse), plain)
        jax_bridge.attention(*arrays, self.BIAS, init_bias=refuse)
        made = attend(*arrays, platform="xla", init_bias=lambda: self.BIAS)
        assert np.array_equal(made, np.asarray(jax_bridge.attention(*arrays, self.BIAS, dtype=None)))

    def test_values_without_width_are_refused(self) -> None:
        query, key, value = inputs()
        with pytest.raises(ValueError, match=r"attention: value has Dv = 0 in \[B, K, Hkv, Dv\], expected Dv >= 1"):
            jax_bridge.attention(query, key, value[..., :0], return_weights=True)

    def test_weights_are_those_of_the_values(self) -> None:
        query, key, value = inputs()
        out, weights = jax_bridge.attention(query, key, value, None, None, self.SINKS, dtype=None, return_weights=True)
        heads_first = np.asarray(weights).reshape(B, HKV, HQ // HKV, Q, K)
        again = np.einsum("bhgqk,bkhd->bqhgd", heads_first, value).reshape(B, Q, HQ, DV)
        assert_close(np.asarray(out), again)
        assert np.all(np.asarray(weights).sum(-1) < 1)

    @pytest.mark.parametrize(
        ("info", "pattern"),
        [
            (lambda: MaskInfo(), "MaskInfo: attention_mask is None, expected it, .* or key_lengths"),
            (
                lambda: MaskInfo.from_segments(*segments(rows=Q - 1)),
                r"mask_info.q_segment_ids has shape .* with Q = 13",
            ),
            (
                lambda: MaskInfo.from_segments(*segments(keys=K + 1)),
                r"mask_info.kv_segment_ids has shape .* with K = 40",
            ),
            (lambda: MaskInfo.from_key_lengths(np.ones(B, int), Q, K + 1), "mask_info stands for a mask of K = 41"),
            (lambda: MaskInfo.from_key_lengths(np.ones(B + 1, int), Q, K), "mask_info.key_lengths has shape"),
            (
                lambda: MaskInfo.from_key_lengths(np.ones((B, 1), int), Q, K),
                "MaskInfo.from_key_lengths: key_lengths has",
            ),
            (lambda: MaskInfo.from_key_lengths(np.ones(B, int), -1, K), "MaskInfo.from_key_lengths: q_len is -1"),
        ],
    )
    def test_masks_that_do_not_fit(self, info: Any, pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern):
            jax_bridge.attention(*inputs(), mask_info=info())

    def test_check_values_reads_key_lengths(self) -> None:
        jax_bridge.check_values("attention", *inputs(), mask_info=MaskInfo.from_key_lengths(np.full(B, K), Q, K))
        info = MaskInfo.from_key_lengths(np.array([K + 1, -1]), Q, K)
        with pytest.raises(ValueError, match=r"(?s)key_lengths\[0\] is 41, expected from 0 to K = 40.*\[1\] is -1"):
            jax_bridge.check_values(jax_bridge.attention, *inputs(), mask_info=info)


@pytest.mark.skipif(ON_GPU, reason="the same on every machine")
class TestHeuristics:
    """Pure functions of shapes and device."""

    @staticmethod
    def cfg(device: Any, rows: int = 4096, heads: int = 8, width: int = 128, dtype: Any = jnp.bfloat16) -> Any:
        shapes = [jax.ShapeDtypeStruct((1, rows, count, width), dtype) for count in (4 * heads, heads, heads)]
        operation = jax_bridge.Attention()
        with target_device(device):
            return operation.heuristic_cfg(operation.invocation(*shapes, dtype=None))

    @pytest.mark.parametrize("device", KNOWN_DEVICES)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("width", [16, 72, 128, 256, 512])
    def test_tiles_fit_every_device(self, device: str, dtype: str, width: int) -> None:
        for rows in (1, 100, 4096):
            cfg = self.cfg(device, rows, width=width, dtype=dtype)
            padded = max(16, 1 << (width - 1).bit_length())
            tiles = (cfg.block_q + 2 * cfg.block_k * cfg.num_stages) * padded * jnp.dtype(dtype).itemsize
            assert tiles <= KNOWN_DEVICES[device].shared_memory or cfg.num_stages == 1
            assert None not in (cfg.num_warps, cfg.programs_per_sm, cfg.skip_masks, cfg.kv_heads_at_once)

    def test_large_tiles_only_where_they_fill_the_device(self) -> None:
        assert self.cfg("h100", 4096).block_q == 128
        assert self.cfg("h100", 1024).block_q == 64
        smaller = dataclasses.replace(KNOWN_DEVICES["h100"], num_sms=30)
        assert self.cfg(smaller, 1024).block_q == 128
        assert self.cfg("h100", 3).block_q == 16

    def test_keys_that_run_side_by_side_fit_the_cache(self) -> None:
        assert [self.cfg("h100", rows).kv_heads_at_once for rows in (4096, 12288, 16384, 1 << 20)] == [8, 5, 1, 1]


def _narrow(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    """A call that cuDNN serves on a GPU, with `changes`."""
    rows, keys, width, value_width = (
        changes.pop(name, default) for name, default in (("q", 40), ("k", 40), ("d", 32), ("dv", 32))
    )
    rng = np.random.default_rng(3)
    shapes = ((B, rows, HQ, width), (B, keys, HKV, width), (B, keys, HKV, value_width))
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    positional = [*arrays, *(changes.pop(name, None) for name in ("bias", "dropout_rng", "softmax_aux"))]
    return positional, {"platform": "cuda", **changes}


SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal-more-keys": {"causal": True, "k": 70},
    "causal-more-rows": {"causal": True, "q": 70},
    "window": {"sliding_window": (9, 0), "k": 70},
    "window-causal": {"sliding_window": 9, "causal": True},
    "float16": {"dtype": jnp.float16},
    "scale": {"softmax_scale": 0.4},
    "lengths": {"mask_info": MaskInfo.from_key_lengths(np.array([0, 70]), 40, 70), "k": 70},
    "lengths-causal": {"mask_info": MaskInfo.from_key_lengths(np.array([0, 70]), 40, 70), "k": 70, "causal": True},
    "no-keys": {"k": 0},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": np.zeros((1, 1, 1, 40), np.float32)}, "bias"),
    "mask": ({"mask_info": MaskInfo.from_attention_mask(np.ones((B, 1, 40, 40), bool))}, "a boolean mask in mask_info"),
    "segments": ({"mask_info": MaskInfo.from_segments(*(np.zeros((B, 40), int),) * 2)}, "segments in mask_info"),
    "sinks": ({"softmax_aux": np.zeros(HQ, np.float32)}, "softmax_aux"),
    "cap": ({"logits_soft_cap": 3.0}, "logits_soft_cap"),
    "dropout": (
        {"dropout_rng": np.zeros(2, np.uint32), "dropout_prob": 0.5, "deterministic": False},
        "dropout_prob",
    ),
    "weights": ({"return_weights": True}, "return_weights"),
    "float32": ({"dtype": jnp.float32}, "dtype=float32"),
    "softmax_dtype": ({"softmax_dtype": jnp.bfloat16}, "softmax_dtype=bfloat16"),
    "scale": ({"softmax_scale": -1.0}, "softmax_scale=-1.0, which is not positive"),
    "values": ({"dv": 16}, r"values of another width than keys \(16 and 32\)"),
    "head_dim": ({"d": 20, "dv": 20}, r"a head dim of 20 \(multiples of 8 up to 256 it does\)"),
    "wide": ({"d": 264, "dv": 264}, "a head dim of 264"),
    "window-right": ({"sliding_window": (3, 1)}, "a sliding_window to the right of the row"),
    "window-rows": ({"sliding_window": (3, 0), "q": 50}, "a sliding_window with more rows than keys"),
    "window-lengths": (
        {"sliding_window": (3, 0), "mask_info": MaskInfo.from_key_lengths(np.ones(B, int), 40, 40)},
        "a sliding_window with key lengths",
    ),
}


class TestCudnn:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_it_would_answer_otherwise_is_refused(self, case: str) -> None:
        changes, words = REFUSED[case]
        positional, options = _narrow(**changes)
        with pytest.raises(NotImplementedError, match=rf"attention\[cuda\] does not support {words}.*; use platform="):
            jax_bridge.attention(*positional, **options)

    @pytest.mark.skipif(ON_GPU, reason="the machine has cuDNN")
    def test_a_machine_without_cudnn_says_so(self) -> None:
        positional, options = _narrow()
        with pytest.raises(NotImplementedError, match=r"attention\[cuda\] does not support .*cuDNN.*; use platform="):
            jax_bridge.attention(*positional, **options)

    @pytest.mark.skipif(not ON_GPU, reason="needs cuDNN")
    @pytest.mark.parametrize("case", SERVED)
    def test_it_answers_as_the_reference(self, case: str) -> None:
        positional, options = _narrow(**SERVED[case])
        query, key, value = (np.asarray(array, np.float32) for array in positional[:3])
        expected = np.asarray(jax_bridge.attention(*positional, **options | {"platform": "xla", "dtype": jnp.float32}))
        if options.get("causal"):  # what no row sees
            key[:, 40:], value[:, 40:] = np.nan, np.nan
        if info := options.get("mask_info"):
            unseen = np.arange(70) >= np.asarray(info.key_lengths)[:, None]
            key[unseen], value[unseen] = np.nan, np.nan
        poisoned = [jnp.asarray(array, jnp.bfloat16) for array in (query, key, value)]
        got = np.asarray(jax_bridge.attention(*poisoned, *positional[3:], **options), np.float32)
        np.testing.assert_allclose(got, expected, rtol=0, atol=4e-2)
