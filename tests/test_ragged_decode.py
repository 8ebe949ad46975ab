"""Ragged decode: ranges inside rows, launch configurations, and how the work is shared out."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge import FwdParams, RaggedDecodeAttentionConfig, launch, paged_heuristics, ragged_launch, tuning
from jax_bridge.device import KNOWN_DEVICES, target_device
from jax_bridge.paged_launch import PagedCall, work_bounds
from jax_bridge.validation import PagedOptions
from tests import judge
from tests.cases import Case
from tests.implementations import MARKS, ON_GPU, SMALL_DEVICE, Implementation, implementations_of, small_tiles
from tests.inputs import Call, build

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]

OPERATION = "ragged_decode_attention"
OBJECT = jax_bridge.RaggedDecodeAttention()
BASE = Case(
    name="ranges",
    operation=OPERATION,
    dtype="bfloat16",
    causal=False,
    query_lens=(1,) * 4,
    kv_lens=(0, 1, 70, 33),
    dense_len=150,
)

every_row = pytest.mark.parametrize("implementation", implementations_of(OPERATION), ids=str)
triton_rows = pytest.mark.parametrize(
    "implementation", [row for row in implementations_of(OPERATION) if row.platform == "triton"], ids=str
)


@every_row
@pytest.mark.parametrize(("sinks", "window"), [(0, None), (2, 5)])
def test_empty_ranges(implementation: Implementation, sinks: int, window: int | None) -> None:
    """Backwards, outside of the row, at its ends: zeros, and the LSE of the sinks; nothing is read."""
    bounds = [(5, 5), (60, 3), (151, 200), (-9, -2), (2**31 - 1, 150), (150, 150), (7, -(2**31)), (0, 0)]
    case = BASE.replace(
        query_lens=(1,) * len(bounds), kv_lens=(0,) * len(bounds), sinks=sinks, window=window, return_lse=True
    )
    starts, ends = (np.array(side, np.int32) for side in zip(*bounds, strict=True))
    call = build(case).with_arrays(sequence_start=starts, sequence_end=ends)
    got = implementation(call)
    assert not got.out.any()
    lse = np.full(case.num_q_heads, -np.inf)
    if sinks:
        lse = np.asarray(jax.nn.logsumexp(jnp.asarray(call.array("softmax_aux")), axis=1))
    assert got.lse is not None
    np.testing.assert_allclose(got.lse, np.broadcast_to(lse, got.lse.shape), rtol=1e-6)


@every_row
@pytest.mark.parametrize("window", [None, 21])
def test_a_range_is_a_sequence_over_an_identity_table(implementation: Implementation, window: int | None) -> None:
    """Rows cut into pages; ranges begin where pages do."""
    (pages,) = (row for row in implementations_of("page_attention") if row.platform == implementation.platform)
    size, length = 16, 160
    starts = np.array([0, 48, 144, 16], np.int32)
    ends = np.array([90, 150, 145, 16], np.int32)
    case = BASE.replace(kv_lens=tuple(ends - starts), dense_len=length, window=window, soft_cap=4.0, return_lse=True)
    dense = build(case, poisoned=False).with_arrays(sequence_start=starts, sequence_end=ends)
    per_row = length // size
    shape = (len(starts) * per_row, size, case.num_kv_heads, case.head_dim)
    tables = [np.resize(np.arange(b * per_row + starts[b] // size, (b + 1) * per_row), per_row) for b in range(4)]
    paged_case = case.replace(operation="page_attention", causal=True, kv_layout="PTHD", page_size=size)
    paged = Call(
        paged_case,
        {
            "query": dense.array("query"),
            "key_cache": dense.array("key").reshape(shape),
            "value_cache": dense.array("value").reshape(shape),
            "context_lens": ends - starts,
            "block_tables": np.stack(tables).astype(np.int32),
        },
        {
            "kv_layout": "PTHD",
            "sliding_window": window,
            "attn_logits_soft_cap": case.soft_cap,
            "return_lse": True,
        },
    )
    judge.check_close(dense, implementation(dense), pages(paged))


CONFIGURATIONS: list[dict[str, Any]] = [
    *({"num_key_splits": splits} for splits in (1, 3, 50)),
    {"blocksize_heads": 1},
    {"blocksize_heads": 2, "num_key_splits": 2},
    {"blocksize_heads": 32, "num_key_splits": 1},
    {"kv_blocksize": 128, "skip_masks": True},
]


@triton_rows
@pytest.mark.parametrize("fields", CONFIGURATIONS, ids=str)
def test_configurations_change_no_result(implementation: Implementation, fields: dict[str, Any]) -> None:
    """Among them more splits than tiles, splits that do not divide the row, and tiles of fewer heads than a group."""
    case = BASE.replace(num_q_heads=6, window=60, sinks=1, return_lse=True)
    for varied in (case, case.replace(window=None, num_kv_heads=1, negative_logits=True)):
        call = build(varied)
        judge.check(call, implementation(call, cfg=small_tiles(OPERATION, **fields)))


def invocation(batch: int = 8, length: int = 4096, dtype: str = "bfloat16", head_dim: int = 128) -> Any:
    query = jax.ShapeDtypeStruct((batch, 32, head_dim), dtype)
    rows = jax.ShapeDtypeStruct((batch, length, 8, head_dim), dtype)
    bounds = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return OBJECT.invocation(query, rows, rows, bounds, bounds)


def test_open_fields_are_chosen_and_given_ones_kept() -> None:
    cfg = RaggedDecodeAttentionConfig(FwdParams(num_key_splits=5, kv_blocksize=128))
    with target_device("h100"):
        chosen = OBJECT.heuristic_cfg(invocation())
        (branch,) = OBJECT.branches(invocation(), "triton", cfg)
        assert OBJECT.branches(invocation(), "triton", RaggedDecodeAttentionConfig())[0].cfg == chosen
    assert isinstance(chosen, RaggedDecodeAttentionConfig)
    assert chosen.fwd_params is not None
    expected = dataclasses.replace(chosen.fwd_params, num_key_splits=5, kv_blocksize=128)
    assert branch.cfg == RaggedDecodeAttentionConfig(expected)
    (rows,) = paged_heuristics.ragged_decode_attention_classes(branch.cfg)
    assert (rows.num_splits, rows.block_n, rows.block_m) == (5, 128, chosen.fwd_params.blocksize_heads)


@pytest.mark.parametrize("device", KNOWN_DEVICES)
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 128), ("float32", 256), ("float16", 512), ("float16", 24)]
)
def test_candidates_fit_the_device(device: str, dtype: str, head_dim: int) -> None:
    with target_device(device) as chip:
        call = invocation(dtype=dtype, head_dim=head_dim)
        candidates = OBJECT.candidate_cfgs_gpu(call)
        assert candidates == OBJECT.candidate_cfgs(call)
        assert candidates[0] == OBJECT.heuristic_cfg(call)
    width = 1 << (head_dim - 1).bit_length()
    for cfg in candidates:
        assert isinstance(cfg, RaggedDecodeAttentionConfig)
        params = cfg.fwd_params
        assert params is not None
        assert params.kv_blocksize is not None
        assert params.num_stages is not None
        tiles = params.kv_blocksize * 2 * width * jnp.dtype(dtype).itemsize * (params.num_stages - 1)
        assert tiles <= chip.shared_memory
    assert len(set(candidates)) == len(candidates) >= 4


def test_no_candidates_for_what_the_kernel_lacks() -> None:
    assert OBJECT.candidate_cfgs_gpu(invocation(head_dim=1024)) == ()


def test_longest_rows_are_refused_by_name() -> None:
    """The kernels count keys up to a bound, which the bridge knows without them."""
    if importlib.util.find_spec("triton"):
        assert launch.kernels("schedule").LONGEST == ragged_launch._MOST_KEYS
    too_long = invocation(batch=1, length=ragged_launch._MOST_KEYS + 1)
    with pytest.raises(
        NotImplementedError, match=r"ragged_decode_attention\[triton\] does not support more than \d+ keys"
    ):
        OBJECT.branches(too_long, "triton", None)


@pytest.mark.parametrize("value", [8, 24])
def test_tiles_of_keys_too_small_for_a_product_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"FwdParams: kv_blocksize is {value}, expected a power of two from 16"):
        FwdParams(kv_blocksize=value)


def test_explain_names_the_configuration() -> None:
    call = invocation()
    arrays = [call.arrays[name] for name in ("query", "key", "value", "sequence_start", "sequence_end")]
    with target_device("h100"):
        text = str(jax_bridge.explain(OPERATION, *arrays, platform="triton"))
    assert text.startswith("ragged_decode_attention[triton]")
    assert "by heuristics for NVIDIA H100" in text
    assert "kv_blocksize=64" in text


def test_tuning_times_full_ranges() -> None:
    made = tuning.made_up(invocation(batch=2, length=32, head_dim=16))
    assert made["sequence_start"].tolist() == [0, 0]
    assert made["sequence_end"].tolist() == [32, 32]


@pytest.mark.skipif(ON_GPU or importlib.util.find_spec("triton") is None, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("window", [None, 70])
def test_shares_are_cut_from_ranges(window: int | None) -> None:
    """A batch of ranges is shared out as one of sequences as long: keys outside of the range are nobody's work."""
    kernel = importlib.import_module("tests.share_kernel").share_length_kernel
    sizes = ragged_launch.paged_sizes(invocation(batch=4, length=1024))
    cfg = RaggedDecodeAttentionConfig(FwdParams(8, None, 16, 4, 2, skip_masks=False))
    (rows,) = paged_heuristics.ragged_decode_attention_classes(cfg)

    def share_length(starts: Any, ends: Any) -> int:
        options = PagedOptions(1.0, None, None if window is None else (window - 1, 0), "PTHD", False)
        keys = jnp.zeros((4, 1, 8, 128))
        operands = {"starts_ptr": None, "k_ptr": keys, "v_ptr": keys}
        operands |= dict.fromkeys(("qq_bias_ptr", "alibi_ptr", "k_scale_ptr", "v_scale_ptr"))
        call = PagedCall("shares", operands, sizes, options, SMALL_DEVICE, max_keys=1024)
        work = work_bounds(rows, sizes, False, 1024, call.device)
        constants = call._constants()
        results = launch.launch(
            kernel,
            outputs={"length_ptr": jax.ShapeDtypeStruct((1,), jnp.int32)},
            operands={"lens_ptr": jnp.asarray(ends, jnp.int32), "begins_ptr": jnp.asarray(starts, jnp.int32)},
            constants={
                **{name: constants[name] for name in ("QUERIES", "SCORING")},
                "TILE": call._tile(rows),
                "SCHEDULE": call._schedule(rows, work, 0),
            },
            num_programs=1,
            num_warps=1,
            num_stages=1,
            device=call.device,
            operation="shares",
        )
        return int(results["length_ptr"][0])

    lengths = np.array([1000, 512, 16, 0])
    starts = np.array([16, 512, 992, 1008])
    assert share_length(starts, starts + lengths) == share_length(0 * starts, lengths)
