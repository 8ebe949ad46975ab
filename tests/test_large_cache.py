"""Caches of more than 2^31 elements, where 32-bit address arithmetic would wrap round; needs a GPU with 20 GB free."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge.layouts import CacheSizes, cache_shape

pytestmark = pytest.mark.gpu

SIZES = CacheSizes(num_pages=140_000, page_size=16, num_kv_heads=8, head_dim=128)
LENGTHS = np.array([100, 37, 0, 64], np.int32)
USED_PAGES = 7


@pytest.mark.parametrize("layout", ["PTHD", "PHTD", "HPTD"])
def test_pages_at_the_end_of_a_large_cache(layout: str) -> None:
    assert np.prod(SIZES) > 2**31
    rng = np.random.default_rng(0)
    used = np.sort(rng.choice(np.arange(SIZES.num_pages - 50, SIZES.num_pages), 4 * USED_PAGES, replace=False))
    small_shape = cache_shape(layout, SIZES._replace(num_pages=used.size))
    small = [jnp.asarray(rng.normal(size=small_shape), jnp.bfloat16) for _ in range(2)]
    index = tuple(used if name == "P" else slice(None) for name in layout)
    # NaN everywhere else: an address that wrapped round would be seen.
    fill = jax.jit(lambda pages: jnp.full(cache_shape(layout, SIZES), jnp.nan, jnp.bfloat16).at[index].set(pages))
    key_cache, value_cache = (fill(pages) for pages in small)

    query = jnp.asarray(rng.normal(size=(4, 32, SIZES.head_dim)), jnp.bfloat16)
    small_tables = rng.permutation(used.size).astype(np.int32).reshape(4, USED_PAGES)
    arguments = {"kv_layout": layout, "return_lse": True}
    expected, expected_lse = jax_bridge.page_attention(
        query, *small, jnp.asarray(LENGTHS), jnp.asarray(small_tables), platform="triton", **arguments
    )
    out, lse = jax_bridge.page_attention(
        query,
        key_cache,
        value_cache,
        jnp.asarray(LENGTHS),
        jnp.asarray(used[small_tables].astype(np.int32)),
        platform="triton",
        **arguments,
    )
    assert np.array_equal(np.asarray(out, np.float32), np.asarray(expected, np.float32))
    assert np.array_equal(lse, expected_lse)


@pytest.mark.parametrize("layout", ["PTHD", "PHTD", "HPTD"])
def test_writes_at_the_end_of_a_large_cache(layout: str) -> None:
    shape, rng = cache_shape(layout, SIZES), np.random.default_rng(1)
    pages, page_size = 50, SIZES.page_size
    last_slots = np.arange((SIZES.num_pages - pages) * page_size, SIZES.num_pages * page_size)
    slots = jnp.asarray(rng.permutation(last_slots)[:300].astype(np.int32))
    key, value = (jnp.asarray(rng.normal(size=(300, *SIZES[2:])), jnp.bfloat16) for _ in range(2))
    write = jax.jit(
        functools.partial(jax_bridge.write_kv_pages, kv_layout=layout, platform="triton"), donate_argnums=(2, 3)
    )
    caches = write(key, value, *(jnp.zeros(shape, jnp.bfloat16) for _ in range(2)), slots)
    small_shape = cache_shape(layout, SIZES._replace(num_pages=pages))
    small = [jnp.zeros(small_shape, jnp.bfloat16) for _ in range(2)]
    first = (SIZES.num_pages - pages) * page_size
    expected = jax_bridge.write_kv_pages(key, value, *small, slots - first, kv_layout=layout, platform="xla")
    ends = tuple(slice(-pages, None) if name == "P" else slice(None) for name in layout)
    for cache, end in zip(caches, expected, strict=True):
        assert np.array_equal(np.asarray(cache[ends], np.float32), np.asarray(end, np.float32))
        # Nothing anywhere else: an address that wrapped round would be seen.
        assert int(jnp.count_nonzero(cache)) == int(jnp.count_nonzero(end))


def test_ragged_ranges_in_large_dense_rows() -> None:
    """The last keys of the last row, beyond 2^31 elements from the first."""
    batch, length, used = 3, 720_000, 200
    heads, head_dim = SIZES.num_kv_heads, SIZES.head_dim
    assert batch * length * heads * head_dim > 2**31
    rng = np.random.default_rng(2)
    small = [jnp.asarray(rng.normal(size=(batch, used, heads, head_dim)), jnp.bfloat16) for _ in range(2)]
    # NaN everywhere else: an address that wrapped round would be seen.
    shape = (batch, length, heads, head_dim)
    fill = jax.jit(lambda rows: jnp.full(shape, jnp.nan, jnp.bfloat16).at[:, length - used :].set(rows))
    key, value = (fill(rows) for rows in small)
    query = jnp.asarray(rng.normal(size=(batch, 32, head_dim)), jnp.bfloat16)
    starts, ends = jnp.array([0, 150, 3], jnp.int32), jnp.array([used, 151, used - 1], jnp.int32)
    attend = functools.partial(jax_bridge.ragged_decode_attention, return_lse=True)
    expected, expected_lse = attend(query, *small, starts, ends, platform="xla")
    first = length - used
    out, lse = attend(query, key, value, starts + first, ends + first, platform="triton")
    # Two units in the last place of bfloat16, of weights and of the output.
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
