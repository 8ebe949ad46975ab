"""Paged attention by blocks of query rows: what page, prefill, unified and ragged decode attention share.

A block is a few neighbouring query rows of one sequence. It gathers the pages that its rows see, once, so that the work
grows with the rows and their contexts, and the memory only with the few blocks that run at the same time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from reference import paging, scores
from reference.paging import Bounds, ceil_div

# Float32 elements of keys, values and scores that the blocks of one step may take together.
STEP_ELEMENTS = 1 << 23
# Tokens of the narrowest step; wider ones grow by WIDTH_STEP up to the width of the table.
NARROWEST_TOKENS = 256
WIDTH_STEP = 4


class QueryBlocks(NamedTuple):
    """Blocks of query rows, int32 `[num_blocks]` each.

    Attributes:
        sequences: the sequence a block belongs to, within `[0, S)`.
        first_rows: the packed row of its first query.
        num_rows: how many rows it has; 0 for a spare block.
        first_positions: absolute position of its first row.
        contexts: absolute position of the first row of its sequence.
    """

    sequences: Array
    first_rows: Array
    num_rows: Array
    first_positions: Array
    contexts: Array


class PagedKeys(NamedTuple):
    """The stored keys and values of `S` sequences.

    Attributes:
        key_cache: `P` pages of `ps` tokens of `Hkv` heads of size `D`.
        value_cache: likewise with `Dv`.
        starts: int32 `[S]`, the first position of a sequence that may be seen.
        ends: int32 `[S]`, one past the last, at most `MP * ps`.
        tables: int32 `[S, MP]`, the page of each `ps` positions.
    """

    key_cache: Array
    value_cache: Array
    starts: Array
    ends: Array
    tables: Array


def paged_keys(key_cache: Array, value_cache: Array, lengths: Array, tables: Array, kv_layout: str) -> PagedKeys:
    """The keys `[0, length)` of each sequence, lengths clamped to what the table can hold."""
    page_size = key_cache.shape[kv_layout.index("T")]
    ends = jnp.clip(paging.as_index(lengths), 0, tables.shape[1] * page_size)
    return PagedKeys(key_cache, value_cache, jnp.zeros_like(ends), ends, paging.as_index(tables))


def single_row_blocks(positions: Array) -> QueryBlocks:
    """One block for each sequence, of one query row at the given position: row `i` belongs to sequence `i`."""
    rows = jnp.arange(positions.shape[0], dtype=jnp.int32)
    return QueryBlocks(rows, rows, jnp.ones_like(rows), positions, positions)


def block_size(num_rows: Any, num_seqs: Any) -> int:
    """Rows a block: a power of two, about the mean length of a sequence, from 1 (where no sequence needs two) to 64.

    Where sizes are symbolic (`jax.export.symbolic_shape`), 16: enough for prompts, not too many for single tokens.
    """
    if not paging.is_static(num_rows, num_seqs):
        return 16
    mean_rows = ceil_div(max(num_rows, 1), max(num_seqs, 1))
    return min(64, 1 << (mean_rows - 1).bit_length())


def attend_blocks(
    queries: Array,
    keys: PagedKeys,
    blocks: QueryBlocks,
    block_q: int,
    *,
    kv_layout: str,
    softmax_scale: float,
    causal: bool,
    window: Bounds,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    qq_bias: Array | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> scores.Attended:
    """Attention of every block over the keys of its sequence.

    Args:
        queries: `[T, Hq, D]`; only the rows of blocks are read.
        keys: the caches and what each sequence owns of them.
        blocks: which rows are computed.
        block_q: rows a block has at most.
        kv_layout: order of the axes of the caches.
        softmax_scale: factor of the dot products.
        causal: whether a row sees no later position than its own.
        window: inclusive reach of a row to the left and right; None is unbounded.
        soft_cap: bound of the scaled scores.
        sinks: float32 `[Hq, n]`.
        alibi_slopes: `[Hq]`; adds `slope * (key position - row position)`.
        qq_bias: `[Q, Q]`, added by row and key position counted from the first row of the sequence.
        k_scale: scalar, `[1]` or `[Hkv]`.
        v_scale: likewise.

    Returns:
        Output `[num_blocks * block_q, Hq, Dv]` in the dtype of the queries and LSE `[num_blocks * block_q, Hq]` in
        float32; rows that a block lacks are zeros with the LSE of the sinks.
    """
    num_pages, page_size, num_kv_heads, head_dim = paging.cache_size(keys.key_cache, kv_layout)
    value_dim = keys.value_cache.shape[kv_layout.index("D")]
    num_q_heads = queries.shape[1]
    num_blocks = blocks.sequences.shape[0]
    table_width = keys.tables.shape[1]
    last_token = table_width * page_size
    if sinks is None:
        sinks = jnp.zeros((num_q_heads, 0), jnp.float32)
    if num_blocks == 0 or keys.tables.shape[0] == 0:
        return without_keys(num_blocks * block_q, value_dim, sinks, queries.dtype)
    left, right = (paging.clipped_reach(reach, last_token + queries.shape[0]) for reach in window)
    widths = page_widths(0 if num_pages == 0 else table_width, page_size, block_q, causal=causal, window=window)

    def attend_step(step: QueryBlocks) -> scores.Attended:
        offsets = jnp.arange(block_q, dtype=jnp.int32)
        in_block = offsets < step.num_rows[:, None]
        positions = step.first_positions[:, None] + offsets
        lower, upper = paging.visible_range(
            positions,
            keys.starts[step.sequences][:, None],
            keys.ends[step.sequences][:, None],
            causal=causal,
            window=(left, right),
        )
        sees = in_block & (lower < upper)
        first_page = jnp.min(jnp.where(sees, lower, last_token), axis=1) // page_size
        last_key = jnp.max(jnp.where(sees, upper, 0), axis=1) - 1
        pages_needed = jnp.max(last_key // page_size - first_page) + 1
        rows = jnp.take(queries, step.first_rows[:, None] + offsets, axis=0, mode="clip")
        rows = jnp.where(in_block[..., None, None], rows, 0)

        def attend_pages(width: int) -> scores.Attended:
            slots = first_page[:, None] + jnp.arange(width, dtype=jnp.int32)
            page_ids = paging.pages_of(keys.tables, step.sequences, slots)
            key_positions = first_page[:, None] * page_size + jnp.arange(width * page_size, dtype=jnp.int32)
            key_positions = key_positions[:, None, :]
            visible = sees[..., None] & (key_positions >= lower[..., None]) & (key_positions < upper[..., None])
            bias = None
            if alibi_slopes is not None:
                distances = (key_positions - positions[..., None]).astype(jnp.float32)
                bias = alibi_slopes.astype(jnp.float32)[:, None, None] * distances[:, None]
            if qq_bias is not None:
                contexts = step.contexts[:, None]
                between_queries = bias_between(qq_bias, positions - contexts, key_positions[:, 0] - contexts)[:, None]
                bias = between_queries if bias is None else bias + between_queries
            return scores.attend(
                rows,
                paging.gather_pages(keys.key_cache, page_ids, kv_layout),
                paging.gather_pages(keys.value_cache, page_ids, kv_layout),
                visible[:, None],
                sinks,
                softmax_scale=softmax_scale,
                soft_cap=soft_cap,
                bias=bias,
                k_scale=k_scale,
                v_scale=v_scale,
            )

        choice = jnp.sum(pages_needed > jnp.asarray(widths[:-1], jnp.int32))
        out, lse = jax.lax.switch(choice, [functools.partial(attend_pages, width) for width in widths])
        return scores.Attended(out.astype(queries.dtype), lse)

    elements = widths[-1] * page_size * (num_kv_heads * (head_dim + value_dim) + 2 * block_q * num_q_heads)
    blocks_at_once = max(1, STEP_ELEMENTS // max(elements, 1)) if paging.is_static(elements) else 1
    num_steps = ceil_div(num_blocks, blocks_at_once)
    step_blocks = ceil_div(num_blocks, num_steps)
    padding = num_steps * step_blocks - num_blocks
    steps = jax.tree.map(lambda x: jnp.pad(x, (0, padding)).reshape(num_steps, step_blocks), blocks)
    out, lse = jax.lax.map(attend_step, steps)
    num_rows = num_blocks * block_q
    return scores.Attended(out.reshape(-1, num_q_heads, value_dim)[:num_rows], lse.reshape(-1, num_q_heads)[:num_rows])


def without_keys(num_rows: int, value_dim: int, sinks: Array, dtype: jnp.dtype) -> scores.Attended:
    """Zeros `[num_rows, Hq, Dv]` and the LSE of the sinks alone: the result of rows that see no key."""
    num_heads = sinks.shape[0]
    no_scores = jnp.zeros((1, num_heads, 1, 0), jnp.float32)
    _, lse = scores.softmax(no_scores, no_scores > 0, sinks)
    return scores.Attended(
        jnp.zeros((num_rows, num_heads, value_dim), dtype), jnp.broadcast_to(lse[..., 0], (num_rows, num_heads))
    )


def page_widths(table_width: int, page_size: int, block_q: int, *, causal: bool, window: Bounds) -> tuple[int, ...]:
    """Static page counts, up to the most a block can need, among which a step takes the least that suffices.

    Wide tables get 0 too, for steps of spare blocks. Where sizes are symbolic, there is only the width of the table.
    """
    if not paging.is_static(table_width, page_size):
        return (table_width,)
    left, right = window
    widest = table_width
    if causal:
        right = 0 if right is None else min(right, 0)
    if left is not None and right is not None:
        tokens = left + block_q + right
        widest = min(widest, (tokens + page_size - 2) // page_size + 1)
    widths = []
    width = max(1, NARROWEST_TOKENS // page_size)
    while width < widest:
        widths.append(width)
        width *= WIDTH_STEP
    return (0, *widths, widest) if widths else (widest,)


def bias_between(qq_bias: Array, rows: Array, columns: Array) -> Array:
    """`qq_bias[row, column]` as float32 `[N, R, K]` from `[N, R]` and `[N, K]`; 0 where either lies outside."""
    size = qq_bias.shape[0]
    if size == 0:
        return jnp.zeros((*rows.shape, columns.shape[1]), jnp.float32)
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    entries = qq_bias.astype(jnp.float32).at[rows[:, :, None], columns[:, None, :]].get(mode="clip")
    return jnp.where(inside, entries, 0)
