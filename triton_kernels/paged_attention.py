"""Attention over pages or dense rows: decoding, prefilling and any mix, with or without splits of the keys.

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
from triton_kernels.rows import keys_of_rows, unpack_rows, visible_keys
from triton_kernels.schedule import (
    find_row_tile,
    measure_shares,
    partial_number,
    shares_of,
    tiles_of_share,
)
from triton_kernels.scores import load_score_scale
from triton_kernels.split_reduce import store_partial


@triton.jit
def attend_row_tile(
    segment,
    first_token,
    num_tokens,
    first_key,
    num_keys,
    first_row,
    begin,
    share,
    first_share,
    num_splits,
    line,
    kv_head,
    starts_ptr,
    begins_ptr,
    arrays,
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Do the part of `share` in a row tile: write its rows, or a partial result where other shares have a part."""
    (
        q_ptr,
        k_ptr,
        v_ptr,
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
    ) = arrays
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
    key_begin, key_end, whole_begin, whole_end = visible_keys(
        first_row, TILE.block_m, context, num_tokens, num_keys, QUERIES, SCORING
    )
    positions = context + tokens
    row_begin, row_end = keys_of_rows(positions, num_keys, SCORING)
    if begins_ptr is not None:
        key_begin = tl.maximum(key_begin, first_key)
        whole_begin = tl.maximum(whole_begin, first_key)
        row_begin = tl.maximum(row_begin, first_key)
    tile_begin, tile_end = tiles_of_share(
        share, first_share, num_splits, begin, line, key_begin, key_end, TILE.block_n, SCHEDULE
    )

    score_scale = load_score_scale(k_scale_ptr, kv_head, K_SCALE_STRIDE, SCORING)
    slopes = None
    if alibi_ptr is not None:
        slopes = tl.load(alibi_ptr + heads, mask=row_mask, other=0.0).to(tl.float32)
    if starts_ptr is None:
        sequence = segment
    else:
        sequence = clamp(segment - 1, 0, QUERIES.num_seqs - 1)
    k_ptr += kv_head.to(tl.int64) * CACHE.k_head_stride
    v_ptr += kv_head.to(tl.int64) * CACHE.v_head_stride
    if table_ptr is None:  # the keys of a sequence are a page of their own
        k_ptr += sequence.to(tl.int64) * CACHE.k_page_stride
        v_ptr += sequence.to(tl.int64) * CACHE.v_page_stride
    else:
        table_ptr += sequence.to(tl.int64) * CACHE.table_width
    row_max, row_sum, acc = attend(
        q,
        tile_begin * TILE.block_n,
        tile_end * TILE.block_n,
        k_ptr,
        v_ptr,
        table_ptr,
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
    value_dims = tl.arange(0, TILE.block_dv)
    if SCHEDULE.num_splits == 1 or num_splits == 1:
        store_rows(
            row_max,
            row_sum,
            acc,
            out_rows,
            heads,
            row_mask,
            value_dims,
            sink_ptr,
            v_scale_ptr,
            out_ptr,
            lse_ptr,
            V_SCALE_STRIDE,
            QUERIES.group_size,
            CACHE.value_head_dim,
        )
    else:
        store_partial(
            row_max,
            row_sum,
            acc,
            (partial_number(share, first_share, SCHEDULE) * QUERIES.num_kv_heads + kv_head) * TILE.block_m,
            rows - first_row,
            row_mask,
            value_dims,
            partial_out_ptr,
            partial_lse_ptr,
            CACHE.value_head_dim,
        )


@triton.jit
def attend_next(
    position,
    share,
    line,
    kv_head,
    starts_ptr,
    lens_ptr,
    begins_ptr,
    arrays,
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Do the part of `share` in the first row tile whose keys end after `position` on the line, if it has one.

    Returns where the share may go on: no later row tile has a KV tile before.
    """
    lanes = tl.arange(0, SCHEDULE.block_s)
    segment, first_token, num_tokens, first_key, num_keys, first_row, begin, end = find_row_tile(
        position, line, lanes, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCORING, TILE, SCHEDULE, BY_NUMBER=False
    )
    first_share, last_share = shares_of(begin, end, line, SCHEDULE)
    share_length, cost = line[0], line[1]
    done = position + share_length
    if (segment >= 0) & (first_share <= share):
        attend_row_tile(
            segment,
            first_token,
            num_tokens,
            first_key,
            num_keys,
            first_row,
            begin,
            share,
            first_share,
            last_share - first_share + 1,
            line,
            kv_head,
            starts_ptr,
            begins_ptr,
            arrays,
            K_SCALE_STRIDE,
            V_SCALE_STRIDE,
            QUERIES,
            CACHE,
            SCORING,
            TILE,
            SCHEDULE,
        )
        done = end + cost + (SCHEDULE.unit - 1)
    return done


@triton.jit
def attend_share(
    share,
    line,
    kv_head,
    starts_ptr,
    lens_ptr,
    begins_ptr,
    arrays,
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Do a share of the work for one KV head."""
    share_length = line[0]
    position = share.to(SCHEDULE.line_type) * share_length
    end = position + share_length
    if SCHEDULE.is_balanced:
        while position < end:
            position = attend_next(
                position,
                share,
                line,
                kv_head,
                starts_ptr,
                lens_ptr,
                begins_ptr,
                arrays,
                K_SCALE_STRIDE,
                V_SCALE_STRIDE,
                QUERIES,
                CACHE,
                SCORING,
                TILE,
                SCHEDULE,
            )
    else:
        attend_next(
            position,
            share,
            line,
            kv_head,
            starts_ptr,
            lens_ptr,
            begins_ptr,
            arrays,
            K_SCALE_STRIDE,
            V_SCALE_STRIDE,
            QUERIES,
            CACHE,
            SCORING,
            TILE,
            SCHEDULE,
        )


@triton.jit
def take_ticket(ticket_ptr):
    """A number that no other program gets."""
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    # The answer reaches the other threads through shared memory: none may go on and reuse it before all have read.
    tl.debug_barrier()
    return ticket


@triton.jit
def attend_shares(
    program,
    ticket_ptr,
    starts_ptr,
    lens_ptr,
    begins_ptr,
    arrays,
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Do what falls to `program`: the share of its number, or those that the counter at `ticket_ptr` hands out."""
    lanes = tl.arange(0, SCHEDULE.block_s)
    line = measure_shares(lanes, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCORING, TILE, SCHEDULE)
    if ticket_ptr is None:
        attend_share(
            program // QUERIES.num_kv_heads,
            line,
            program % QUERIES.num_kv_heads,
            starts_ptr,
            lens_ptr,
            begins_ptr,
            arrays,
            K_SCALE_STRIDE,
            V_SCALE_STRIDE,
            QUERIES,
            CACHE,
            SCORING,
            TILE,
            SCHEDULE,
        )
    else:
        ticket = take_ticket(ticket_ptr)
        while ticket < SCHEDULE.num_shares * QUERIES.num_kv_heads:
            attend_share(
                ticket // QUERIES.num_kv_heads,
                line,
                ticket % QUERIES.num_kv_heads,
                starts_ptr,
                lens_ptr,
                begins_ptr,
                arrays,
                K_SCALE_STRIDE,
                V_SCALE_STRIDE,
                QUERIES,
                CACHE,
                SCORING,
                TILE,
                SCHEDULE,
            )
            ticket = take_ticket(ticket_ptr)


@triton.jit
def paged_attention_kernel(
    q_ptr,  # [T, Hq, D]
    k_ptr,
    v_ptr,
    starts_ptr,  # [S + 1], or None: one token a sequence
    lens_ptr,  # [S]
    begins_ptr,  # [S] first keys of sequences of one token, or None
    table_ptr,  # [S, MP], or None: the keys of a sequence are a page of their own
    alibi_ptr,  # [Hq] or None
    qq_bias_ptr,  # [Q, Q] or None
    sink_ptr,  # [Hq] or None
    k_scale_ptr,  # [1] or [Hkv] or None
    v_scale_ptr,  # [1] or [Hkv] or None
    ticket_ptr,  # a zero, or None
    out_ptr,  # [T, Hq, Dv]
    lse_ptr,  # [T, Hq] or None
    partial_out_ptr,  # [rows of all partial results, Dv] float32, or None where no keys are split
    partial_lse_ptr,  # [rows of all partial results] float32, base 2, or None
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Every sequence by one schedule."""
    arrays = (
        q_ptr,
        k_ptr,
        v_ptr,
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
    )
    attend_shares(
        tl.program_id(0),
        ticket_ptr,
        starts_ptr,
        lens_ptr,
        begins_ptr,
        arrays,
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
    partial_out_ptr,  # [rows of all partial results, Dv] float32, or None where no keys are split
    partial_lse_ptr,  # [rows of all partial results] float32, base 2, or None
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
    arrays = (
        q_ptr,
        k_ptr,
        v_ptr,
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
    )
    few_programs: tl.constexpr = FEW_SCHEDULE.num_slots * QUERIES.num_kv_heads
    many_programs: tl.constexpr = MANY_SCHEDULE.num_slots * QUERIES.num_kv_heads
    program = tl.program_id(0)
    if (program < few_programs) | (program >= few_programs + many_programs):
        attend_shares(
            program,
            ticket_ptr,
            starts_ptr,
            lens_ptr,
            None,
            arrays,
            K_SCALE_STRIDE,
            V_SCALE_STRIDE,
            QUERIES,
            CACHE,
            SCORING,
            FEW_TILE,
            FEW_SCHEDULE,
        )
    else:
        attend_shares(
            program - few_programs,
            None,
            starts_ptr,
            lens_ptr,
            None,
            arrays,
            K_SCALE_STRIDE,
            V_SCALE_STRIDE,
            QUERIES,
            CACHE,
            SCORING,
            MANY_TILE,
            MANY_SCHEDULE,
        )
