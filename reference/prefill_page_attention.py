"""Attention of one chunk of one sequence over its paged cache."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from reference import blocks, paging, scores
from reference.paging import Window


@jax.jit(static_argnames=("softmax_scale", "attn_logits_soft_cap", "sliding_window", "kv_layout", "return_lse"))
def prefill_page_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    context_len: Array,
    page_indices: Array,
    /,
    *,
    softmax_scale: float | None = None,
    attn_logits_soft_cap: float | None = None,
    sliding_window: Window = None,
    attention_sink: Array | None = None,
    alibi_slopes: Array | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    kv_layout: str = "HPTD",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attends a chunk, the last C tokens of its context, causally to that context.

    Args:
        query: `[C, Hq, D]`; row `r` is the token at position `context_len - C + r`.
        key_cache: `[Hkv, P, ps, D]`, or the order of axes that `kv_layout` names; any float dtype, float8 or int8.
        value_cache: `[Hkv, P, ps, Dv]`, likewise.
        context_len: integer `[1]` or scalar, the tokens with this chunk; clamped to `[0, MP * ps]`.
        page_indices: integers `[MP]`; entries past the length or before the window may hold anything.
        softmax_scale: factor of the dot products, `1 / sqrt(D)` by default.
        attn_logits_soft_cap: bound of the scaled scores; None or 0 is none.
        sliding_window: an integer W sees W tokens with its own; a tuple reaches `left` tokens back, itself not counted.
        attention_sink: `[Hq]` logits that join the denominator.
        alibi_slopes: `[Hq]`, adds `slope * (key position - query position)`.
        k_scale: factor of the stored keys, a scalar, `[1]` or `[Hkv]`.
        v_scale: factor of the stored values, likewise.
        kv_layout: order of the axes of the caches.
        return_lse: whether to return the log of the softmax denominator too.

    Returns:
        `[C, Hq, Dv]` in the dtype of `query`; with `return_lse` also float32 `[C, Hq]`.
    """
    num_rows = query.shape[0]
    keys = blocks.paged_keys(key_cache, value_cache, context_len.reshape(1), page_indices[None], kv_layout)
    block_q = blocks.block_size(num_rows, 1)
    first_rows = jnp.arange(0, num_rows, block_q, dtype=jnp.int32)
    context = jnp.broadcast_to(keys.ends - num_rows, first_rows.shape)
    chunk = blocks.QueryBlocks(
        sequences=jnp.zeros_like(first_rows),
        first_rows=first_rows,
        num_rows=jnp.minimum(num_rows - first_rows, block_q),
        first_positions=context + first_rows,
        contexts=context,
    )
    out, lse = blocks.attend_blocks(
        query,
        keys,
        chunk,
        block_q,
        kv_layout=kv_layout,
        softmax_scale=scores.default_softmax_scale(softmax_scale, query.shape[-1]),
        causal=True,
        window=paging.causal_bounds(sliding_window),
        soft_cap=attn_logits_soft_cap,
        sinks=scores.per_head_sinks(attention_sink, query.shape[1], one_a_head=True),
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    out, lse = out[:num_rows], lse[:num_rows]
    return (out, lse) if return_lse else out
