"""JAX's own paged attention for GPUs, `jax.experimental.pallas.ops.gpu.paged_attention`: deprecated, decoding only."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp

KV_LAYOUT = "HPTD"
K_SPLITS = 16  # its default; it takes as many pages for every split
BLOCK_PAGES = 8  # its default, where a split has so many; it takes whole blocks only


def jax_paged_attention(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    context_lens: jax.Array,
    block_tables: jax.Array,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """One token of each sequence, with JAX's default sizes; interpreted where there is no GPU.

    Args:
        query: `[S, Hq, D]`; the softmax scale, which the operation does not have, goes into it.
        key_cache: `[Hkv, P, ps, D]`.
        value_cache: likewise.
        context_lens: int32 `[S]`; rows of length 0 have no meaning.
        block_tables: int32 `[S, MP]`, every entry a page.
        soft_cap: as `page_attention`'s.

    Returns:
        `[S, Hq, D]`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    width = block_tables.shape[1]
    padding = -width % (K_SPLITS * BLOCK_PAGES if width > K_SPLITS * BLOCK_PAGES else K_SPLITS)
    attended: jax.Array = paged_attention(
        scaled,
        key_cache,
        value_cache,
        jnp.pad(block_tables, ((0, 0), (0, padding))),
        context_lens,
        pages_per_compute_block=BLOCK_PAGES,
        k_splits=K_SPLITS,
        attn_logits_soft_cap=soft_cap,
        interpret=jax.default_backend() != "gpu",
    )
    return attended
