"""Problems for the pure-jnp operations, poison everywhere, and their comparison with the float64 oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import reference
from tests import oracle
from tests.cases import LAYOUTS as LAYOUTS

BYTE_DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8)
WILD = np.array([-1, -9, 2**31 - 1, -(2**31), 10**6], np.int64)
TOLERANCE = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 1.5e-2}


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def assert_close(got: Any, expected: Any, tolerance: float | None = None) -> None:
    """Equal infinities, no NaN, and an error within the rounding of the dtype at the size of what is expected."""
    if isinstance(expected, tuple):
        assert isinstance(got, tuple)
        for got_one, expected_one in zip(got, expected, strict=True):
            assert_close(got_one, expected_one, tolerance)
        return
    assert got.shape == expected.shape
    if tolerance is None:
        tolerance = TOLERANCE[str(got.dtype)]
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(
        np.asarray(got).astype(np.float64), expected, rtol=0, atol=tolerance * max(1.0, finite.max(initial=0.0))
    )


class Paged:
    """A problem of a paged operation: a clean and a poisoned cache that differ only where nothing may look."""

    def __init__(
        self,
        query_lens: tuple[int, ...],
        kv_lens: tuple[int, ...],
        *,
        page_size: int = 4,
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 16,
        value_dim: int | None = None,
        dtype: Any = np.float32,
        cache_dtype: Any = None,
        kv_layout: str = "PTHD",
        leading: int = 0,
        trailing: int = 0,
        spare_pages: int = 2,
        first_seen: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        num_q_heads, num_kv_heads = heads
        value_dim = head_dim if value_dim is None else value_dim
        num_seqs = len(kv_lens)
        width = max([-(-length // page_size) for length in kv_lens], default=0) + spare_pages
        used = [list(range(-(-length // page_size))) for length in kv_lens]
        num_pages = sum(len(pages) for pages in used) + 3
        ids = iter(rng.permutation(num_pages))
        self.table = rng.choice(WILD, (num_seqs, width)).astype(np.int32)
        poison = np.ones((num_pages, page_size), bool)
        for sequence, length in enumerate(kv_lens):
            begin = first_seen[sequence] if first_seen else 0
            for page in used[sequence]:
                page_id = next(ids)
                if (page + 1) * page_size > begin:
                    self.table[sequence, page] = page_id
                positions = page * page_size + np.arange(page_size)
                poison[page_id] = (positions >= length) | (positions < begin)
        cache_dtype = dtype if cache_dtype is None else cache_dtype
        spread = 20.0 if np.dtype(cache_dtype).itemsize == 1 else 1.0
        caches = []
        for dim in (head_dim, value_dim):
            cache = (spread * rng.standard_normal((num_pages, page_size, num_kv_heads, dim))).astype(cache_dtype)
            bad = np.array(127, np.uint8).view(cache_dtype) if spread > 1 else np.array(np.nan, cache_dtype)
            cache[poison] = bad
            caches.append(cache.transpose(["PTHD".index(axis) for axis in kv_layout]))
        self.key_cache, self.value_cache = caches
        self.kv_lens = np.array(kv_lens, np.int32)
        self.row_starts = (leading + np.cumsum([0, *query_lens])).astype(np.int32)
        rows = leading + sum(query_lens) + trailing
        self.queries = normal(rng, rows, num_q_heads, head_dim, dtype=dtype)
        self.queries[:leading] = np.nan
        self.queries[self.row_starts[-1] :] = np.nan
        self.kv_layout = kv_layout
        self.rng = rng

    def unified(self) -> tuple[np.ndarray, ...]:
        return self.queries, self.key_cache, self.value_cache, self.kv_lens, self.table, self.row_starts

    def page(self) -> tuple[np.ndarray, ...]:
        return self.queries, self.key_cache, self.value_cache, self.kv_lens, self.table

    def prefill(self) -> tuple[np.ndarray, ...]:
        return self.queries, self.key_cache, self.value_cache, self.kv_lens, self.table[0]


def device(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if array is None else jnp.asarray(array) for array in arrays)


def fast_jit(function: Callable[..., Any], **options: Any) -> Any:
    """A function compiled quickly rather than well."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


@functools.cache
def compiled(name: str, **static: Any) -> Any:
    return fast_jit(functools.partial(getattr(reference, name), **static))


def check(name: str, arrays: tuple[Any, ...], tolerance: float | None = None, **options: Any) -> Any:
    """Reference against oracle, LSE included."""
    data = {key: jnp.asarray(x) for key, x in options.items() if isinstance(x, np.ndarray | np.generic)}
    static = {key: x for key, x in options.items() if key not in data}
    got = compiled(name, return_lse=True, **static)(*device(arrays), **data)
    expected = getattr(oracle, name)(*arrays, return_lse=True, **options)
    assert got[0].dtype == arrays[0].dtype
    assert got[1].dtype == jnp.float32
    if tolerance is None:
        tolerance = TOLERANCE[str(got[0].dtype)]
    assert_close(got, expected, tolerance)
    return got


def first_seen(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], left: int) -> tuple[int, ...]:
    return tuple(max(0, kv - q - left) for q, kv in zip(query_lens, kv_lens, strict=True))


# Chunks, single tokens, a sequence without queries, one without keys, one longer than its keys; padding on both ends.
QUERY_LENS, KV_LENS = (7, 1, 0, 4, 1, 5), (19, 9, 6, 2, 0, 5)
