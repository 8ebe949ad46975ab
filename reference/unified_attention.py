"""Attention of packed chunks and single tokens of many sequences over a paged cache."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from reference import blocks, paging, scores
from reference.paging import Window, ceil_div


@jax.jit(static_argnames=("softmax_scale", "causal", "sliding_window", "logits_soft_cap", "kv_layout", "return_lse"))
def unified_attention(
    queries: Array,
    key_cache: Array,
    value_cache: Array,
    kv_lens: Array,
    block_tables: Array,
    query_start_loc: Array,
    /,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: Window = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    qq_bias: Array | None = None,
    attention_sink: Array | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    kv_layout: str = "PTHD",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attends the new tokens of every sequence to its context, they themselves being its last tokens.

    Args:
        queries: `[T, Hq, D]`, the new tokens of all sequences one after the other.
        key_cache: `[P, ps, Hkv, D]`, or the order of axes that `kv_layout` names; any float dtype, float8 or int8.
        value_cache: `[P, ps, Hkv, Dv]`, likewise.
        kv_lens: integers `[S]`, the tokens of a sequence with the new ones; clamped to `[0, MP * ps]`.
        block_tables: integers `[S, MP]`; entries past the length or outside every window may hold anything.
        query_start_loc: integers `[S + 1]`, not decreasing; sequence `i` owns rows `[loc[i], loc[i + 1])`.
        softmax_scale: factor of the dot products, `1 / sqrt(D)` by default.
        causal: whether a row sees no later position than its own.
        sliding_window: an integer W sees no position before `row - W + 1`; a tuple reaches inclusively to both sides.
        logits_soft_cap: bound of the scaled scores; None or 0 is none.
        alibi_slopes: `[Hq]`, adds `slope * (key position - row position)`.
        qq_bias: `[Q, Q]`, added where row and key, counted from the first new token, both lie in `[0, Q)`.
        attention_sink: `[Hq]` logits that join the denominator.
        k_scale: factor of the stored keys, a scalar, `[1]` or `[Hkv]`.
        v_scale: factor of the stored values, likewise.
        kv_layout: order of the axes of the caches.
        return_lse: whether to return the log of the softmax denominator too.

    Returns:
        `[T, Hq, Dv]` in the dtype of `queries`; with `return_lse` also float32 `[T, Hq]`. Rows of no sequence are
        zeros, with the LSE of a row that sees no key.
    """
    num_rows, num_q_heads, head_dim = queries.shape
    num_seqs = block_tables.shape[0]
    keys = blocks.paged_keys(key_cache, value_cache, kv_lens, block_tables, kv_layout)
    sinks = scores.per_head_sinks(attention_sink, num_q_heads, one_a_head=True)
    no_keys = blocks.without_keys(num_rows, value_cache.shape[kv_layout.index("D")], sinks, queries.dtype)
    if num_rows == 0 or num_seqs == 0:
        return (no_keys.out, no_keys.lse) if return_lse else no_keys.out
    row_starts = paging.as_index(query_start_loc)
    block_q = blocks.block_size(num_rows, num_seqs)
    block_starts = first_blocks(row_starts, block_q)
    attended = blocks.attend_blocks(
        queries,
        keys,
        packed_blocks(row_starts, block_starts, keys.ends, num_rows, block_q),
        block_q,
        kv_layout=kv_layout,
        softmax_scale=scores.default_softmax_scale(softmax_scale, head_dim),
        causal=causal,
        window=paging.causal_bounds(sliding_window),
        soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        qq_bias=qq_bias,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    sequences = paging.last_at_or_before(row_starts, rows)
    owned = (sequences >= 0) & (sequences < num_seqs)
    sequences = jnp.clip(sequences, 0, num_seqs - 1)
    block_rows = block_starts[sequences] * block_q + rows - row_starts[sequences]
    out, lse = (
        jnp.where(
            owned.reshape(-1, *(1,) * (blocked.ndim - 1)), jnp.take(blocked, block_rows, axis=0, mode="clip"), empty
        )
        for blocked, empty in zip(attended, no_keys, strict=True)
    )
    return (out, lse) if return_lse else out


def first_blocks(row_starts: Array, block_q: int) -> Array:
    """The first block of each sequence, int32 `[S]`, such that no two sequences share a block.

    Known without a sum over the sequences before: `a // block_q + i` leaves room for the `ceil(n / block_q)` blocks of
    `n` rows, because `(a + n) // block_q + 1 >= a // block_q + ceil(n / block_q)`. With single rows, blocks are rows.
    """
    starts = row_starts[:-1] // block_q
    return starts if block_q == 1 else starts + jnp.arange(starts.shape[0], dtype=jnp.int32)


def packed_blocks(
    row_starts: Array, block_starts: Array, kv_lens: Array, num_rows: int, block_q: int
) -> blocks.QueryBlocks:
    """All blocks that the sequences can need, in a number that depends on shapes only."""
    num_seqs = block_starts.shape[0]
    num_blocks = num_rows if block_q == 1 else ceil_div(num_rows, block_q) + num_seqs
    slots = jnp.arange(num_blocks, dtype=jnp.int32)
    found = paging.last_at_or_before(block_starts, slots)
    sequences = jnp.maximum(found, 0)
    num_queries = row_starts[1:] - row_starts[:-1]
    offsets = (slots - block_starts[sequences]) * block_q
    contexts = (kv_lens - num_queries)[sequences]
    return blocks.QueryBlocks(
        sequences=sequences,
        first_rows=row_starts[sequences] + offsets,
        num_rows=jnp.where(found < 0, 0, jnp.clip(num_queries[sequences] - offsets, 0, block_q)),
        first_positions=contexts + offsets,
        contexts=contexts,
    )
