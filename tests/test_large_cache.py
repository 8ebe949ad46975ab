"""Caches of more than 2^31 elements, where 32-bit address arithmetic would wrap round; needs a GPU with 20 GB free."""

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
