"""Problems of `write_kv_pages` and `merge_attention_states`, and how an answer is held to the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import jax_bridge
from tests import oracle, strategies, tolerances
from tests.cases import FLOATS, LAYOUTS, QUANTISED
from tests.implementations import to_device
from tests.poison import Array, numpy_dtype, poison_like


@dataclass(frozen=True)
class WriteCase:
    """Sizes and dtypes of a write; `dropped` of the tokens have slots outside the cache."""

    written: int = 6
    dropped: int = 3
    num_pages: int = 5
    page_size: int = 3
    num_kv_heads: int = 2
    head_dim: int = 8
    value_head_dim: int = 12
    dtype: str = "float32"
    cache_dtype: str = "float32"
    kv_layout: str = "PTHD"
    scale: str = "none"
    """"none", "scalar", or "head" with one for each KV head."""

    outside: tuple[int, ...] = (-(2**31), 2**31 - 1)
    """Slots that are dropped, beside those next to the cache."""

    def problem(self, seed: int = 7) -> tuple[list[Array], dict[str, Array]]:
        """Arrays and scales: tokens, caches of poison, distinct slots among ones that must not be followed."""
        rng = np.random.default_rng(seed)
        num_slots = self.num_pages * self.page_size
        outside = [-1, -self.page_size, num_slots, num_slots + 1, *self.outside]
        slots = np.append(rng.permutation(num_slots)[: self.written], rng.choice(outside, self.dropped))
        slots = rng.permutation(slots).astype(np.int32)
        arrays = []
        for dim in (self.head_dim, self.value_head_dim):
            tokens = 3 * rng.standard_normal((slots.size, self.num_kv_heads, dim))
            tokens.flat[::7] *= 100  # out of the range of 8 bits
            arrays.append(tokens.astype(numpy_dtype(self.dtype)))
        axes = ["PTHD".index(axis) for axis in self.kv_layout]
        for dim in (self.head_dim, self.value_head_dim):
            shape = (self.num_pages, self.page_size, self.num_kv_heads, dim)
            cache = poison_like(shape, numpy_dtype(self.cache_dtype))
            arrays.append(np.ascontiguousarray(cache.transpose(axes)))
        # Powers of two: a quotient is exact, so that it is rounded once, whatever it is computed in.
        count = {"none": 0, "scalar": 1, "head": self.num_kv_heads}[self.scale]
        scales = {name: 2.0 ** rng.integers(-5, 3, count).astype(np.float32) for name in ("k_scale", "v_scale")}
        return [*arrays, slots], scales if count else {}

    def check(self, platform: str, seed: int = 7) -> None:
        """Raises AssertionError where a platform leaves other bits than the oracle."""
        arrays, scales = self.problem(seed)
        got = jax_bridge.write_kv_pages(
            *map(to_device, arrays),
            **{name: to_device(scale) for name, scale in scales.items()},
            kv_layout=self.kv_layout,
            platform=platform,
        )
        expected = oracle.write_kv_pages(*arrays, **scales, kv_layout=self.kv_layout)
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(bits(np.asarray(mine)), bits(theirs))


def written(tokens: Any, cache_dtype: str, **options: Any) -> Array:
    """What becomes of `tokens`, of one axis, in a cache."""
    rows = jnp.asarray(tokens)[:, None, None]
    cache = jnp.zeros((rows.shape[0], 1, 1, 1), cache_dtype)
    key_cache, _ = jax_bridge.write_kv_pages(rows, rows, cache, cache, jnp.arange(rows.shape[0]), **options)
    return np.asarray(key_cache)[:, 0, 0, 0]


def check_rounding(platform: str, cache_dtype: str) -> None:
    """Raises AssertionError where 8 bits are not the nearest ones, ties to even.

    Tokens are every value of the format, the middles between them, what lies next to the middles, and what is out of
    range or no number.
    """
    dtype = numpy_dtype(cache_dtype)
    finite = oracle.representable(dtype)
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    near = np.concatenate([np.nextafter(middles, np.float32(side)) for side in (-1e9, 1e9)])
    others = np.float32([-0.0, 1e-45, -1e-45, 1e-38, 2.0**-24, -(2.0**-17), 1e30, -3e38, np.inf, -np.inf])
    tokens = np.concatenate([finite.astype(np.float32), middles, near, others])
    expected = [*(oracle.nearest(token, dtype) for token in tokens), 0.0 if cache_dtype == "int8" else np.nan]
    got = written(np.append(tokens, np.float32(np.nan)), cache_dtype, platform=platform)
    np.testing.assert_array_equal(got.astype(np.float64), expected)
    if cache_dtype != "int8":
        np.testing.assert_array_equal(np.signbit(got[:-1]), np.signbit(tokens))


@st.composite
def write_cases(draw: st.DrawFn) -> WriteCase:
    """Writes of any sizes, as small as the oracle's loops ask for."""
    num_pages, page_size = draw(st.integers(0, 6)), draw(st.sampled_from((1, 2, 3, 8, 16)))
    cache_dtype = draw(st.sampled_from((*FLOATS, *QUANTISED)))
    dim = st.sampled_from((1, 3, 16, 24, 40, 64, 71))
    return WriteCase(
        written=draw(st.integers(0, min(num_pages * page_size, 12))),
        dropped=draw(st.integers(0, 4)),
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=draw(st.integers(1, 5)),
        head_dim=draw(dim),
        value_head_dim=draw(dim),
        dtype=draw(st.sampled_from((*FLOATS, cache_dtype) if cache_dtype in FLOATS else FLOATS)),
        cache_dtype=cache_dtype,
        kv_layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from(("none", "scalar", "head"))),
    )


def bits(array: Array) -> Array:
    """The bits of an array as unsigned integers."""
    return array.view(f"uint{8 * array.dtype.itemsize}")


@dataclass(frozen=True)
class MergeCase:
    """Sizes and dtype of a merge."""

    num_tokens: int = 7
    num_q_heads: int = 3
    head_dim: int = 20
    dtype: str = "float32"

    def problem(self, seed: int = 8) -> list[Array]:
        """Outputs and LSEs by rows: full with full, one or both without keys, one far above the other, both far off.

        What stands beside an LSE of -inf is NaN.
        """
        rng = np.random.default_rng(seed)
        rows = (self.num_tokens, self.num_q_heads)
        outs = rng.standard_normal((2, *rows, self.head_dim))
        lses = rng.normal(0.0, 3.0, (2, *rows))
        kinds = (np.arange(math.prod(rows)).reshape(rows) + seed) % 8
        for place, (left, right) in enumerate([(-np.inf, 0), (0, -np.inf), (-np.inf, -np.inf), (500, 0), (0, 500)]):
            lses[0] += np.where(kinds == place, left, 0)
            lses[1] += np.where(kinds == place, right, 0)
        lses += np.where(kinds == 5, 1e4, 0) - np.where(kinds == 6, 1e4, 0)
        outs[lses == -np.inf] = np.nan
        outs, lses = outs.astype(numpy_dtype(self.dtype)), lses.astype(np.float32)
        return [outs[0], lses[0], outs[1], lses[1]]

    def check(self, platform: str, seed: int = 8) -> None:
        """Raises AssertionError where a platform's answer is out of bounds."""
        arrays = self.problem(seed)
        out, lse = jax_bridge.merge_attention_states(*map(to_device, arrays), platform=platform)
        expected_out, expected_lse = oracle.merge_attention_states(*arrays)
        assert out.dtype == arrays[0].dtype
        assert lse.dtype == np.float32
        largest = float(np.abs(expected_out).max(initial=1.0))
        # Shares, their sum and the quotient in float32, then one rounding to the dtype.
        tolerance = largest * (8 * float(jnp.finfo(jnp.float32).eps) + float(jnp.finfo(self.dtype).eps) / 2)
        tolerances.Bound(tolerance, np.inf).check("out", np.asarray(out).astype(np.float64), expected_out)
        # An LSE of 1e4 has steps of 2^-10; beside it, the logarithm counts for little.
        magnitude = np.abs(np.where(np.isfinite(expected_lse), expected_lse, 0.0)).max(initial=1.0)
        tolerance = 4 * float(jnp.finfo(jnp.float32).eps) * float(magnitude)
        tolerances.Bound(tolerance, np.inf).check("lse", np.asarray(lse).astype(np.float64), expected_lse)


@st.composite
def merge_cases(draw: st.DrawFn) -> MergeCase:
    """Merges of any sizes."""
    return MergeCase(
        num_tokens=draw(st.integers(0, 20)),
        num_q_heads=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from((1, 71, 320, *strategies.HEAD_DIMS))),
        dtype=draw(st.sampled_from(FLOATS)),
    )
