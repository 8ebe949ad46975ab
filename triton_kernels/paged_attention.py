"""Attention over pages: decoding, prefilling and any mix of both, with or without splits of the keys.

The query heads of a KV head are packed with the tokens of a sequence as the rows of a tile. A program takes a tile of
rows of one KV head and a range of keys: all keys that the rows see, and the output is written (v1, the 2D grid); or a
split of them, a partial result which `split_reduce` merges with the others (v2, the 3D grid).

Sequences with few rows and those with many are scheduled apart, each with the tile that suits them, in one launch:
the former wait for memory while the latter compute.
"""

import triton
import triton.language as tl

from triton_kernels.attend import attend
from triton_kernels.online_softmax import store_rows
from triton_kernels.pages import clamp
from triton_kernels.rows import unpack_rows, visible_keys
from triton_kernels.schedule import (
    count_items,
    count_splits,
    count_tiles,
    find_segment,
    split_begin,
    tile_quota,
    tile_range,
)
from triton_kernels.scores import LOG2_E
from triton_kernels.split_reduce import store_partial


@triton.jit
def attend_item(
    item,
    items_before,
    segment,
    first_token,
    num_tokens,
    num_keys,
    quota,
    kv_head,
    q_ptr,
    k_ptr,
    v_ptr,
    starts_ptr,
    table_ptr,
    alibi_ptr,
    qq_bias_ptr,
    sink_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Do a work item for one KV head: write its rows, or its partial result where the keys are split."""
    row_tiles, key_tiles = count_tiles(num_tokens, num_keys, QUERIES, SCORING, TILE, SCHEDULE)
    num_splits = count_splits(key_tiles, quota, SCHEDULE)
    row_tile = row_tiles - 1 - (item - items_before) // num_splits  # the last rows see most keys: they come first
    split = (item - items_before) % num_splits

    first_row = row_tile * TILE.block_m
    rows = first_row + tl.arange(0, TILE.block_m)
    tokens, heads, out_rows, row_mask = unpack_rows(rows, first_row, kv_head, num_tokens, QUERIES)
    # Pointers move to the tile's first token in 64 bits, so that 32 are enough for each row.
    tile_row = (first_token + first_row // QUERIES.group_size).to(tl.int64) * QUERIES.num_q_heads
    out_ptr += tile_row * CACHE.value_head_dim
    if lse_ptr is not None:
        lse_ptr += tile_row
    dims = tl.arange(0, TILE.block_d)
    q = tl.load(
        q_ptr + tile_row * CACHE.head_dim + out_rows[:, None] * CACHE.head_dim + dims[None, :],
        mask=row_mask[:, None] & (dims < CACHE.head_dim)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]

    context = num_keys - num_tokens
    last_token = tl.minimum((first_row + (TILE.block_m - 1)) // QUERIES.group_size, num_tokens - 1)
    key_begin, key_end, whole_begin, whole_end = visible_keys(
        context + first_row // QUERIES.group_size, context + last_token, num_keys, SCORING
    )
    positions = context + tokens
    row_begin, row_end = tl.zeros_like(positions), tl.zeros_like(positions) + num_keys
    if SCORING.window_left is not None:
        row_begin = positions - SCORING.window_left
    if SCORING.window_right == 0:
        row_end = positions + 1
    elif SCORING.window_right is not None:
        row_end = tl.minimum(positions + (SCORING.window_right + 1), num_keys)
    first_tile, tiles = tile_range(key_begin, key_end, TILE.block_n)

    score_scale = SCORING.softmax_scale * (LOG2_E if SCORING.scale_is_folded else 1.0)
    if k_scale_ptr is not None:
        score_scale = tl.load(k_scale_ptr + kv_head * K_SCALE_STRIDE) * score_scale
    slopes = None
    if alibi_ptr is not None:
        slopes = tl.load(alibi_ptr + heads, mask=row_mask, other=0.0).to(tl.float32)
    if starts_ptr is None:
        sequence = segment
    else:
        sequence = clamp(segment - 1, 0, QUERIES.num_seqs - 1)
    row_max, row_sum, acc = attend(
        q,
        (first_tile + split_begin(split, tiles, num_splits)) * TILE.block_n,
        (first_tile + split_begin(split + 1, tiles, num_splits)) * TILE.block_n,
        k_ptr + kv_head.to(tl.int64) * CACHE.k_head_stride,
        v_ptr + kv_head.to(tl.int64) * CACHE.v_head_stride,
        table_ptr + sequence.to(tl.int64) * CACHE.table_width,
        key_begin,
        key_end,
        whole_begin,
        whole_end,
        row_begin,
        row_end,
        positions,
        context,
        slopes,
        qq_bias_ptr,
        score_scale,
        CACHE,
        SCORING,
        TILE,
    )
    if SCHEDULE.num_splits == 1 or num_splits == 1:
        store_rows(
            row_max,
            row_sum,
            acc,
            out_rows,
            heads,
            row_mask,
            sink_ptr,
            v_scale_ptr,
            out_ptr,
            lse_ptr,
            V_SCALE_STRIDE,
            QUERIES.group_size,
            CACHE.value_head_dim,
            TILE.block_dv,
        )
    else:
        store_partial(
            row_max,
            row_sum,
            acc,
            SCHEDULE.first_partial + item * QUERIES.num_kv_heads + kv_head,
            row_mask,
            partial_out_ptr,
            partial_lse_ptr,
            CACHE.value_head_dim,
            TILE.block_m,
            TILE.block_dv,
        )


@triton.jit
def take_ticket(ticket_ptr):
    """A number that no other program gets."""
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    # The answer reaches the other threads through shared memory: none may go on and reuse it before all have read.
    tl.debug_barrier()
    return ticket


@triton.jit
def attend_items(
    program,
    ticket_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    starts_ptr,
    lens_ptr,
    table_ptr,
    alibi_ptr,
    qq_bias_ptr,
    sink_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Do what falls to `program`: what the counter at `ticket_ptr` hands out, items at a stride, or a single one."""
    quota = tile_quota(starts_ptr, lens_ptr, QUERIES, SCORING, TILE, SCHEDULE)
    if ticket_ptr is not None:
        num_items = count_items(quota, starts_ptr, lens_ptr, QUERIES, SCORING, TILE, SCHEDULE)
        ticket = take_ticket(ticket_ptr)
        while ticket < num_items * QUERIES.num_kv_heads:
            item = ticket // QUERIES.num_kv_heads
            segment, items_before, _, first_token, num_tokens, num_keys = find_segment(
                item, quota, starts_ptr, lens_ptr, QUERIES, SCORING, TILE, SCHEDULE, True
            )
            attend_item(
                item,
                items_before,
                segment,
                first_token,
                num_tokens,
                num_keys,
                quota,
                ticket % QUERIES.num_kv_heads,
                q_ptr,
                k_ptr,
                v_ptr,
                starts_ptr,
                table_ptr,
                alibi_ptr,
                qq_bias_ptr,
                sink_ptr,
                k_scale_ptr,
                v_scale_ptr,
                out_ptr,
                lse_ptr,
                partial_out_ptr,
                partial_lse_ptr,
                K_SCALE_STRIDE,
                V_SCALE_STRIDE,
                QUERIES,
                CACHE,
                SCORING,
                TILE,
                SCHEDULE,
            )
            ticket = take_ticket(ticket_ptr)
    else:
        kv_head = program % QUERIES.num_kv_heads
        if SCHEDULE.is_persistent:
            num_items = count_items(quota, starts_ptr, lens_ptr, QUERIES, SCORING, TILE, SCHEDULE)
            for item in tl.range(program // QUERIES.num_kv_heads, num_items, SCHEDULE.capacity, num_stages=1):
                segment, items_before, _, first_token, num_tokens, num_keys = find_segment(
                    item, quota, starts_ptr, lens_ptr, QUERIES, SCORING, TILE, SCHEDULE, True
                )
                attend_item(
                    item,
                    items_before,
                    segment,
                    first_token,
                    num_tokens,
                    num_keys,
                    quota,
                    kv_head,
                    q_ptr,
                    k_ptr,
                    v_ptr,
                    starts_ptr,
                    table_ptr,
                    alibi_ptr,
                    qq_bias_ptr,
                    sink_ptr,
                    k_scale_ptr,
                    v_scale_ptr,
                    out_ptr,
                    lse_ptr,
                    partial_out_ptr,
                    partial_lse_ptr,
                    K_SCALE_STRIDE,
                    V_SCALE_STRIDE,
                    QUERIES,
                    CACHE,
                    SCORING,
                    TILE,
                    SCHEDULE,
                )
        else:
            item = program // QUERIES.num_kv_heads
            segment, items_before, _, first_token, num_tokens, num_keys = find_segment(
                item, quota, starts_ptr, lens_ptr, QUERIES, SCORING, TILE, SCHEDULE, True
            )
            if segment < QUERIES.num_segments:
                attend_item(
                    item,
                    items_before,
                    segment,
                    first_token,
                    num_tokens,
                    num_keys,
                    quota,
                    kv_head,
                    q_ptr,
                    k_ptr,
                    v_ptr,
                    starts_ptr,
                    table_ptr,
                    alibi_ptr,
                    qq_bias_ptr,
                    sink_ptr,
                    k_scale_ptr,
                    v_scale_ptr,
                    out_ptr,
                    lse_ptr,
                    partial_out_ptr,
                    partial_lse_ptr,
                    K_SCALE_STRIDE,
                    V_SCALE_STRIDE,
                    QUERIES,
                    CACHE,
                    SCORING,
                    TILE,
                    SCHEDULE,
                )


@triton.jit
def paged_attention_kernel(
    q_ptr,  # [T, Hq, D]
    k_ptr,
    v_ptr,
    starts_ptr,  # [S + 1], or None: one token a sequence
    lens_ptr,  # [S]
    table_ptr,  # [S, MP]
    alibi_ptr,  # [Hq] or None
    qq_bias_ptr,  # [Q, Q] or None
    sink_ptr,  # [Hq] or None
    k_scale_ptr,  # [1] or [Hkv] or None
    v_scale_ptr,  # [1] or [Hkv] or None
    ticket_ptr,  # a zero, or None
    out_ptr,  # [T, Hq, Dv]
    lse_ptr,  # [T, Hq] or None
    partial_out_ptr,  # [partials, BLOCK_M, Dv] float32, or None where no keys are split
    partial_lse_ptr,  # [partials, BLOCK_M] float32, base 2, or None
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Every sequence by one schedule."""
    attend_items(
        tl.program_id(0),
        ticket_ptr,
        q_ptr,
        k_ptr,
        v_ptr,
        starts_ptr,
        lens_ptr,
        table_ptr,
        alibi_ptr,
        qq_bias_ptr,
        sink_ptr,
        k_scale_ptr,
        v_scale_ptr,
        out_ptr,
        lse_ptr,
        partial_out_ptr,
        partial_lse_ptr,
        K_SCALE_STRIDE,
        V_SCALE_STRIDE,
        QUERIES,
        CACHE,
        SCORING,
        TILE,
        SCHEDULE,
    )


@triton.jit
def mixed_paged_attention_kernel(
    q_ptr,  # [T, Hq, D]
    k_ptr,
    v_ptr,
    starts_ptr,  # [S + 1], or None: one token a sequence
    lens_ptr,  # [S]
    table_ptr,  # [S, MP]
    alibi_ptr,  # [Hq] or None
    qq_bias_ptr,  # [Q, Q] or None
    sink_ptr,  # [Hq] or None
    k_scale_ptr,  # [1] or [Hkv] or None
    v_scale_ptr,  # [1] or [Hkv] or None
    ticket_ptr,  # a zero, or None
    out_ptr,  # [T, Hq, Dv]
    lse_ptr,  # [T, Hq] or None
    partial_out_ptr,  # [partials, BLOCK_M, Dv] float32, or None where no keys are split
    partial_lse_ptr,  # [partials, BLOCK_M] float32, base 2, or None
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    FEW_TILE: tl.constexpr,
    FEW_SCHEDULE: tl.constexpr,
    MANY_TILE: tl.constexpr,
    MANY_SCHEDULE: tl.constexpr,
):
    """Sequences of few rows by the first and the last programs, sequences of many rows by those between.

    The first programs run beside those with many rows, each a program's work; the last take over when these are done.
    """
    few_programs: tl.constexpr = FEW_SCHEDULE.num_slots * QUERIES.num_kv_heads
    many_programs: tl.constexpr = MANY_SCHEDULE.num_slots * QUERIES.num_kv_heads
    program = tl.program_id(0)
    if (program < few_programs) | (program >= few_programs + many_programs):
        attend_items(
            program,
            ticket_ptr,
            q_ptr,
            k_ptr,
            v_ptr,
            starts_ptr,
            lens_ptr,
            table_ptr,
            alibi_ptr,
            qq_bias_ptr,
            sink_ptr,
            k_scale_ptr,
            v_scale_ptr,
            out_ptr,
            lse_ptr,
            partial_out_ptr,
            partial_lse_ptr,
            K_SCALE_STRIDE,
            V_SCALE_STRIDE,
            QUERIES,
            CACHE,
            SCORING,
            FEW_TILE,
            FEW_SCHEDULE,
        )
    else:
        attend_items(
            program - few_programs,
            None,
            q_ptr,
            k_ptr,
            v_ptr,
            starts_ptr,
            lens_ptr,
            table_ptr,
            alibi_ptr,
            qq_bias_ptr,
            sink_ptr,
            k_scale_ptr,
            v_scale_ptr,
            out_ptr,
            lse_ptr,
            partial_out_ptr,
            partial_lse_ptr,
            K_SCALE_STRIDE,
            V_SCALE_STRIDE,
            QUERIES,
            CACHE,
            SCORING,
            MANY_TILE,
            MANY_SCHEDULE,
        )
