"""The pure-jnp `write_kv_pages` against the float64 oracle."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import reference
from tests import oracle
from tests.reference_problems import (
    BYTE_DTYPES,
    LAYOUTS,
    compiled,
    device,
    normal,
)


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("cache_dtype", [np.float32, ml_dtypes.bfloat16, np.float16, *BYTE_DTYPES])
def test_write(cache_dtype: Any, kv_layout: str) -> None:
    rng = np.random.default_rng(4)
    scaled = np.dtype(cache_dtype).itemsize == 1
    shapes = [[dict(zip("PTHD", (5, 3, 2, dim), strict=True))[axis] for axis in kv_layout] for dim in (16, 20)]
    key_cache, value_cache = ((10 * rng.standard_normal(shape)).astype(cache_dtype) for shape in shapes)
    key, value = (100 * normal(rng, 8, 2, dim) for dim in (16, 20))
    slots = np.array([4, -1, 14, 0, 15, 7, -(2**31), 2**31 - 1], np.int32)
    scales: dict[str, Any] = (
        {"k_scale": np.float32(0.37), "v_scale": np.array([2.5, 0.2], np.float32)} if scaled else {}
    )
    arrays = key, value, key_cache, value_cache, slots
    got = compiled("write_kv_pages", kv_layout=kv_layout)(*device(arrays), **scales)
    expected = oracle.write_kv_pages(*arrays, kv_layout=kv_layout, **scales)
    for got_one, expected_one in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got_one).view(np.uint8), expected_one.view(np.uint8))


@pytest.mark.parametrize("cache_dtype", BYTE_DTYPES)
def test_write_rounds_to_nearest_even_and_saturates(cache_dtype: Any) -> None:
    finite = oracle.representable(cache_dtype)
    middles = (finite[1:] + finite[:-1]) / 2
    near = np.concatenate([np.nextafter(middles.astype(np.float32), np.float32(side)) for side in (-1e9, 1e9)])
    tokens = np.concatenate([finite, middles, near, [1e30, -1e30, np.inf, -np.inf]]).astype(np.float32)
    cache = np.zeros((1, len(tokens), 1, 1), cache_dtype)
    arrays = (tokens[:, None, None], tokens[:, None, None], cache, cache, np.arange(len(tokens)))
    got, expected = reference.write_kv_pages(*device(arrays))[0], oracle.write_kv_pages(*arrays)[0]
    np.testing.assert_array_equal(np.asarray(got).astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("cache_dtype", "kv_layout"),
    [*((dtype, "PTHD") for dtype in (jnp.float32, jnp.bfloat16, *BYTE_DTYPES)), (jnp.int8, "PHTD"), (jnp.int8, "HPTD")],
)
def test_write_is_in_place_under_donation(cache_dtype: Any, kv_layout: str) -> None:
    shape = [dict(zip("PTHD", (64, 16, 2, 64), strict=True))[axis] for axis in kv_layout]
    caches = jnp.zeros(shape, cache_dtype), jnp.ones(shape, cache_dtype)
    tokens = jnp.ones((4, 2, 64))
    write = jax.jit(functools.partial(reference.write_kv_pages, kv_layout=kv_layout), donate_argnums=(2, 3))
    memory = write.lower(tokens, tokens, *caches, jnp.arange(4)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * caches[0].nbytes
    if cache_dtype not in BYTE_DTYPES[:2]:  # XLA on CPUs copies what is float8
        assert memory.temp_size_in_bytes < caches[0].nbytes / 4
    pointers = [cache.unsafe_buffer_pointer() for cache in caches]
    assert [cache.unsafe_buffer_pointer() for cache in write(tokens, tokens, *caches, jnp.arange(4))] == pointers


def test_write_empty_and_gradients() -> None:
    cache = jnp.ones((3, 4, 2, 16))
    nothing = jnp.zeros((0, 2, 16))
    np.testing.assert_array_equal(reference.write_kv_pages(nothing, nothing, cache, cache, jnp.zeros(0, int))[0], cache)
    tokens = jnp.ones((2, 2, 16))
    assert reference.write_kv_pages(tokens, tokens, cache[:0], cache[:0], jnp.arange(2))[0].shape == (0, 4, 2, 16)

    def loss(tokens: jax.Array, cache: jax.Array) -> jax.Array:
        written, _ = reference.write_kv_pages(tokens, tokens, cache, cache, jnp.array([5, -1]), k_scale=2.0)
        return jnp.sum(written.astype(jnp.float32))

    of_tokens, of_cache = jax.grad(loss, (0, 1))(tokens, cache)
    np.testing.assert_array_equal(of_tokens[:, 0, 0], [0.5, 0.0])
    assert not np.any(of_cache[1, 1])
    assert np.all(of_cache[0] == 1)
    with pytest.raises(NotImplementedError, match="float8"):
        jax.grad(lambda x: loss(x, cache.astype(jnp.float8_e5m2)))(tokens)


def test_written_pages_serve_attention() -> None:
    rng = np.random.default_rng(6)
    tokens = normal(rng, 2, 7, 2, 16)
    caches = jnp.full((3, 4, 2, 16), jnp.nan), jnp.full((3, 4, 2, 16), jnp.nan)
    table = np.array([[2, 0]])
    slots = table[0, np.arange(7) // 4] * 4 + np.arange(7) % 4
    key_cache, value_cache = reference.write_kv_pages(*device(tuple(tokens)), *caches, jnp.asarray(slots))
    query = jnp.asarray(normal(rng, 7, 4, 16))
    paged = reference.unified_attention(
        query, key_cache, value_cache, jnp.array([7]), jnp.asarray(table), jnp.array([0, 7])
    )
    dense = reference.attention(query[None], *device(tuple(tokens[:, None])), causal=True, dtype=None)
    np.testing.assert_allclose(paged, dense[0], atol=2e-6)
