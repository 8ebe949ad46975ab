"""Merging partial results: one reduction for every kernel that splits the keys."""

import triton
import triton.language as tl

from triton_kernels.online_softmax import guard, store_rows
from triton_kernels.schedule import count_splits, items_before_sequence, tile_quota, tile_range, visible_keys


@triton.jit
def merge_partials(
    partial_out_ptr,
    partial_lse_ptr,
    first_row,
    num_partials,
    row_mask,  # [BLOCK_ROWS]
    ROW_STRIDE: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Merge `num_partials` normalised results with base-2 LSEs, in index order: row state of BLOCK_ROWS rows.

    Partial `i` of row `r` lies at row `first_row + i * ROW_STRIDE + r` of the partial arrays.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DV)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DV], tl.float32)
    for start in range(0, num_partials, BLOCK_SPLITS):
        splits = start + tl.arange(0, BLOCK_SPLITS)
        mask = (splits < num_partials)[:, None] & row_mask[None, :]
        partial_rows = first_row + splits[:, None].to(tl.int64) * ROW_STRIDE + rows[None, :]
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
def split_reduce_kernel(
    partial_out_ptr,  # [items, Hq, Dv] float32
    partial_lse_ptr,  # [items, Hq] float32, base 2
    lens_ptr,  # [S]
    sink_ptr,  # [Hq] or None
    v_scale_ptr,  # [1] or [Hkv] or None
    out_ptr,  # [S, Hq, Dv]
    lse_ptr,  # [S, Hq] or None
    V_SCALE_STRIDE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    SCHEDULE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """One program merges the splits of BLOCK_HEADS query heads of a sequence, adds sinks and writes the output."""
    programs_per_seq: tl.constexpr = (NUM_Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    sequence = tl.program_id(0) // programs_per_seq
    first_head = tl.program_id(0) % programs_per_seq * BLOCK_HEADS
    heads = first_head + tl.arange(0, BLOCK_HEADS)
    head_mask = heads < NUM_Q_HEADS

    quota = tile_quota(lens_ptr, SCHEDULE, SCORING.window_left, TILE.block_n)
    first_item = items_before_sequence(sequence, lens_ptr, quota, SCHEDULE, SCORING.window_left, TILE.block_n)
    key_begin, key_end = visible_keys(tl.load(lens_ptr + sequence), SCHEDULE.max_keys, SCORING.window_left)
    _, tiles = tile_range(key_begin, key_end, TILE.block_n)
    row_max, row_sum, acc = merge_partials(
        partial_out_ptr,
        partial_lse_ptr,
        first_item.to(tl.int64) * NUM_Q_HEADS + first_head,
        count_splits(tiles, quota, SCHEDULE),
        head_mask,
        NUM_Q_HEADS,
        CACHE.value_head_dim,
        BLOCK_SPLITS,
        BLOCK_HEADS,
        TILE.block_dv,
    )
    store_rows(
        row_max,
        row_sum,
        acc,
        sequence.to(tl.int64) * NUM_Q_HEADS + heads,
        heads,
        head_mask,
        sink_ptr,
        v_scale_ptr,
        out_ptr,
        lse_ptr,
        V_SCALE_STRIDE,
        NUM_Q_HEADS // NUM_KV_HEADS,
        CACHE.value_head_dim,
        TILE.block_dv,
    )
