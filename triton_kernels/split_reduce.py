"""Partial results of split keys, and the one reduction that merges them, in index order, so that bits repeat."""

import triton
import triton.language as tl

from triton_kernels.online_softmax import base2_lse, divide_by_sum, guard, store_rows
from triton_kernels.rows import unpack_rows
from triton_kernels.schedule import (
    find_row_tile,
    measure_shares,
    partial_number,
    shares_of,
)


@triton.jit
def store_partial(
    row_max,  # [BLOCK_M]
    row_sum,  # [BLOCK_M]
    acc,  # [BLOCK_M, BLOCK_DV]
    first_row,
    tile_rows,  # [BLOCK_M] rows of the row tile
    row_mask,  # [BLOCK_M]
    dims,  # [BLOCK_DV] 0, 1, 2 and so on
    partial_out_ptr,  # [rows of all partial results, Dv] float32
    partial_lse_ptr,  # [rows of all partial results] float32, base 2
    VALUE_HEAD_DIM: tl.constexpr,
):
    """Write a row state as the partial result that begins at `first_row`."""
    rows = tl.cast(first_row, tl.int64) + tile_rows
    tl.store(
        partial_out_ptr + rows[:, None] * VALUE_HEAD_DIM + dims[None, :],
        divide_by_sum(acc, row_sum),
        mask=row_mask[:, None] & (dims < VALUE_HEAD_DIM)[None, :],
    )
    tl.store(partial_lse_ptr + rows, base2_lse(row_max, row_sum), mask=row_mask)


@triton.jit
def merge_partials(
    first_share,
    last_share,
    kv_head,
    rows,  # [BLOCK_ROWS] rows of the tile
    row_mask,  # [BLOCK_ROWS]
    partial_out_ptr,  # [rows of all partial results, Dv] float32
    partial_lse_ptr,  # [rows of all partial results] float32, base 2
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Row state of a row tile's partial results, merged in the order of its shares."""
    dims = tl.arange(0, TILE.block_dv)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, TILE.block_dv], tl.float32)
    for start in range(first_share, last_share + 1, BLOCK_SPLITS):
        shares = start + tl.arange(0, BLOCK_SPLITS)
        mask = (shares <= last_share)[:, None] & row_mask[None, :]
        partials = partial_number(shares, first_share, SCHEDULE).to(tl.int64) * QUERIES.num_kv_heads + kv_head
        partial_rows = partials[:, None] * TILE.block_m + rows[None, :]
        lse = tl.load(partial_lse_ptr + partial_rows, mask=mask, other=float("-inf"))  # [BLOCK_SPLITS, BLOCK_ROWS]
        out = tl.load(
            partial_out_ptr + partial_rows[:, :, None] * VALUE_HEAD_DIM + dims[None, None, :],
            mask=mask[:, :, None] & (dims < VALUE_HEAD_DIM)[None, None, :],
            other=0.0,
        )  # [BLOCK_SPLITS, BLOCK_ROWS, BLOCK_DV]
        new_max = tl.maximum(row_max, tl.max(lse, 0))
        pivot = guard(new_max)
        rescale = tl.exp2(row_max - pivot)
        weights = tl.exp2(lse - pivot[None, :])
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        acc = acc * rescale[:, None] + tl.sum(weights[:, :, None] * out, 0)
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit
def reduce_rows(
    program,
    arrays,
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Merge some rows of a row tile in which several shares had a part, add sinks and write the output."""
    starts_ptr, lens_ptr, begins_ptr, sink_ptr, v_scale_ptr, partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr = arrays
    TILE: tl.constexpr = REDUCTION.tile
    SCHEDULE: tl.constexpr = REDUCTION.schedule
    BLOCK_ROWS: tl.constexpr = REDUCTION.block_rows
    blocks: tl.constexpr = TILE.block_m // BLOCK_ROWS
    kv_head = program // blocks % QUERIES.num_kv_heads
    number = program // (blocks * QUERIES.num_kv_heads)
    lanes = tl.arange(0, SCHEDULE.block_s)
    line = measure_shares(lanes, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCORING, TILE, SCHEDULE)
    segment, first_token, num_tokens, _, _, first_row, begin, end = find_row_tile(
        number, line, lanes, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCORING, TILE, SCHEDULE, BY_NUMBER=True
    )
    first_share, last_share = shares_of(begin, end, line, SCHEDULE)
    rows = program % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    _, heads, out_rows, row_mask = unpack_rows(first_row + rows, first_row, kv_head, num_tokens, QUERIES)
    has_rows = tl.max(row_mask.to(tl.int32)) > 0
    if (segment >= 0) & (first_share < last_share) & has_rows & (last_share < SCHEDULE.num_shares):
        row_max, row_sum, acc = merge_partials(
            first_share,
            last_share,
            kv_head,
            rows,
            row_mask,
            partial_out_ptr,
            partial_lse_ptr,
            QUERIES,
            TILE,
            SCHEDULE,
            CACHE.value_head_dim,
            BLOCK_ROWS,
            REDUCTION.block_splits,
        )
        tile_row = (first_token + first_row // QUERIES.group_size).to(tl.int64) * QUERIES.num_q_heads
        if lse_ptr is not None:
            lse_ptr += tile_row
        store_rows(
            row_max,
            row_sum,
            acc,
            out_rows,
            heads,
            row_mask,
            tl.arange(0, TILE.block_dv),
            sink_ptr,
            v_scale_ptr,
            out_ptr + tile_row * CACHE.value_head_dim,
            lse_ptr,
            V_SCALE_STRIDE,
            QUERIES.group_size,
            CACHE.value_head_dim,
        )


@triton.jit
def split_reduce_kernel(
    starts_ptr,  # [S + 1] or None
    lens_ptr,  # [S]
    begins_ptr,  # [S] first keys, or None
    sink_ptr,  # [Hq] or None
    v_scale_ptr,  # [1] or [Hkv] or None
    partial_out_ptr,  # [rows of all partial results, Dv] float32
    partial_lse_ptr,  # [rows of all partial results] float32, base 2
    is_cut_ptr,  # zero if no row tile was cut, or None
    out_ptr,  # [T, Hq, Dv]
    lse_ptr,  # [T, Hq] or None
    V_SCALE_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """What one schedule split, or the one of sequences of few rows and, by later programs, that of many."""
    arrays = (
        starts_ptr,
        lens_ptr,
        begins_ptr,
        sink_ptr,
        v_scale_ptr,
        partial_out_ptr,
        partial_lse_ptr,
        out_ptr,
        lse_ptr,
    )
    program = tl.program_id(0)
    is_cut = program >= 0
    if is_cut_ptr is not None:
        is_cut = tl.load(is_cut_ptr) != 0
    if is_cut:
        if SECOND is None or program < FIRST.num_programs:
            reduce_rows(program, arrays, V_SCALE_STRIDE, QUERIES, CACHE, SCORING, FIRST)
        else:
            reduce_rows(program - FIRST.num_programs, arrays, V_SCALE_STRIDE, QUERIES, CACHE, SCORING, SECOND)
