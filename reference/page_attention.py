"""Decode attention over a paged cache: one query token for each sequence."""

import jax
from jax import Array
from jax.typing import ArrayLike

from reference import blocks, paging, scores
from reference.paging import Window


@jax.jit(static_argnames=("attn_scale", "attn_logits_soft_cap", "sliding_window", "kv_layout", "return_lse"))
def page_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    context_lens: Array,
    block_tables: Array,
    attn_scale: float | None = None,
    *,
    attn_logits_soft_cap: float | None = None,
    sliding_window: Window = None,
    attention_sink: Array | None = None,
    alibi_slopes: Array | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    kv_layout: str = "PHTD",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attends the newest token of each sequence to its cached context.

    Args:
        query: `[S, Hq, D]`; the token at position `context_lens - 1` of each sequence.
        key_cache: `[P, Hkv, ps, D]`, or the order of axes that `kv_layout` names; any float dtype, float8 or int8.
        value_cache: `[P, Hkv, ps, Dv]`, likewise.
        context_lens: integers `[S]`, the tokens of a sequence with the newest; clamped to `[0, MP * ps]`.
        block_tables: integers `[S, MP]`; entries past the length or before the window may hold anything.
        attn_scale: factor of the dot products, `1 / sqrt(D)` by default.
        attn_logits_soft_cap: bound of the scaled scores; None or 0 is none.
        sliding_window: an integer W sees the last W tokens; a tuple reaches `left` tokens back, itself not counted.
        attention_sink: `[Hq]` logits that join the denominator.
        alibi_slopes: `[Hq]`, adds `slope * (key position - query position)`.
        k_scale: factor of the stored keys, a scalar, `[1]` or `[Hkv]`.
        v_scale: factor of the stored values, likewise.
        kv_layout: order of the axes of the caches.
        return_lse: whether to return the log of the softmax denominator too.

    Returns:
        `[S, Hq, Dv]` in the dtype of `query`; with `return_lse` also float32 `[S, Hq]`.
    """
    keys = blocks.paged_keys(key_cache, value_cache, context_lens, block_tables, kv_layout)
    out, lse = blocks.attend_blocks(
        query,
        keys,
        blocks.single_row_blocks(keys.ends - 1),
        1,
        kv_layout=kv_layout,
        softmax_scale=scores.default_softmax_scale(attn_scale, query.shape[-1]),
        causal=True,
        window=paging.causal_bounds(sliding_window),
        soft_cap=attn_logits_soft_cap,
        sinks=scores.per_head_sinks(attention_sink, query.shape[1], one_a_head=True),
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return (out, lse) if return_lse else out
