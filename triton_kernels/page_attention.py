"""Paged decode: one query token a sequence, the query heads of a KV head packed as the rows of a tile.

v1 gives a whole sequence to one program, which writes the output. v2 fills the GPU once and gives every program its
share of work items, each one split of one sequence, which become partial results; `split_reduce` merges them.
"""

import triton
import triton.language as tl

from triton_kernels.attend import attend
from triton_kernels.online_softmax import base2_lse, divide_by_sum, store_rows
from triton_kernels.schedule import (
    count_splits,
    find_item,
    items_before_sequence,
    split_begin,
    tile_quota,
    tile_range,
    visible_keys,
)
from triton_kernels.scores import LOG2_E


@triton.jit
def attend_query(
    sequence,
    kv_head,
    heads,  # [BLOCK_M]
    head_mask,  # [BLOCK_M]
    begin,
    end,
    key_begin,
    key_end,
    q_ptr,  # [S, Hq, D]
    k_ptr,
    v_ptr,
    table_ptr,  # [S, MP]
    alibi_ptr,  # [Hq] or None
    k_scale_ptr,  # [1] or [Hkv] or None
    K_SCALE_STRIDE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
):
    """Row state of a sequence's query `heads` over its keys in `[begin, end)`."""
    sequence = sequence.to(tl.int64)
    dims = tl.arange(0, TILE.block_d)
    q = tl.load(
        q_ptr + (sequence * NUM_Q_HEADS + heads[:, None]) * CACHE.head_dim + dims[None, :],
        mask=head_mask[:, None] & (dims < CACHE.head_dim)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    score_scale = SCORING.softmax_scale * (LOG2_E if SCORING.scale_is_folded else 1.0)
    if k_scale_ptr is not None:
        score_scale = tl.load(k_scale_ptr + kv_head * K_SCALE_STRIDE) * score_scale
    slopes = None
    if alibi_ptr is not None:
        slopes = tl.load(alibi_ptr + heads, mask=head_mask, other=0.0).to(tl.float32)
    rows = tl.zeros([TILE.block_m], tl.int32)
    return attend(
        q,
        begin,
        end,
        k_ptr + kv_head.to(tl.int64) * CACHE.k_head_stride,
        v_ptr + kv_head.to(tl.int64) * CACHE.v_head_stride,
        table_ptr + sequence * CACHE.table_width,
        key_begin,
        key_end,
        key_begin,
        key_end,
        rows + key_begin,
        rows + key_end,
        rows + key_end - 1,
        slopes,
        score_scale,
        CACHE,
        SCORING,
        TILE,
    )


@triton.jit
def query_heads(pid, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    """KV head, query heads `[BLOCK_M]` and their mask for program `pid` of `Hkv * cdiv(G, BLOCK_M)`."""
    tiles_per_group: tl.constexpr = (GROUP_SIZE + BLOCK_M - 1) // BLOCK_M
    kv_head = pid // tiles_per_group
    members = pid % tiles_per_group * BLOCK_M + tl.arange(0, BLOCK_M)
    return kv_head, kv_head * GROUP_SIZE + members, members < GROUP_SIZE


@triton.jit
def page_attention_kernel(
    q_ptr,  # [S, Hq, D]
    k_ptr,
    v_ptr,
    lens_ptr,  # [S]
    table_ptr,  # [S, MP]
    alibi_ptr,  # [Hq] or None
    sink_ptr,  # [Hq] or None
    k_scale_ptr,  # [1] or [Hkv] or None
    v_scale_ptr,  # [1] or [Hkv] or None
    out_ptr,  # [S, Hq, Dv]
    lse_ptr,  # [S, Hq] or None
    K_SCALE_STRIDE: tl.constexpr,
    V_SCALE_STRIDE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    SCHEDULE: tl.constexpr,
    TILE: tl.constexpr,
):
    """v1: one program attends to all keys of a sequence and writes the output."""
    group_size: tl.constexpr = NUM_Q_HEADS // NUM_KV_HEADS
    programs_per_seq: tl.constexpr = NUM_KV_HEADS * ((group_size + TILE.block_m - 1) // TILE.block_m)
    sequence = tl.program_id(0) // programs_per_seq
    kv_head, heads, head_mask = query_heads(tl.program_id(0) % programs_per_seq, group_size, TILE.block_m)

    key_begin, key_end = visible_keys(tl.load(lens_ptr + sequence), SCHEDULE.max_keys, SCORING.window_left)
    first_tile, tiles = tile_range(key_begin, key_end, TILE.block_n)
    row_max, row_sum, acc = attend_query(
        sequence,
        kv_head,
        heads,
        head_mask,
        first_tile * TILE.block_n,
        (first_tile + tiles) * TILE.block_n,
        key_begin,
        key_end,
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        alibi_ptr,
        k_scale_ptr,
        K_SCALE_STRIDE,
        NUM_Q_HEADS,
        CACHE,
        SCORING,
        TILE,
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


@triton.jit
def page_attention_split_kernel(
    q_ptr,  # [S, Hq, D]
    k_ptr,
    v_ptr,
    lens_ptr,  # [S]
    table_ptr,  # [S, MP]
    alibi_ptr,  # [Hq] or None
    k_scale_ptr,  # [1] or [Hkv] or None
    partial_out_ptr,  # [items, Hq, Dv] float32
    partial_lse_ptr,  # [items, Hq] float32, base 2
    K_SCALE_STRIDE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    SCHEDULE: tl.constexpr,
    TILE: tl.constexpr,
):
    """v2: every program walks the work items at a fixed stride and writes a normalised partial result for each."""
    group_size: tl.constexpr = NUM_Q_HEADS // NUM_KV_HEADS
    programs_per_item: tl.constexpr = NUM_KV_HEADS * ((group_size + TILE.block_m - 1) // TILE.block_m)
    slot = tl.program_id(0) // programs_per_item
    kv_head, heads, head_mask = query_heads(tl.program_id(0) % programs_per_item, group_size, TILE.block_m)
    dims = tl.arange(0, TILE.block_dv)

    quota = tile_quota(lens_ptr, SCHEDULE, SCORING.window_left, TILE.block_n)
    num_items = items_before_sequence(SCHEDULE.num_seqs, lens_ptr, quota, SCHEDULE, SCORING.window_left, TILE.block_n)
    for item in tl.range(slot, num_items, SCHEDULE.capacity, num_stages=1):
        sequence, first_item = find_item(item, lens_ptr, quota, SCHEDULE, SCORING.window_left, TILE.block_n)
        key_begin, key_end = visible_keys(tl.load(lens_ptr + sequence), SCHEDULE.max_keys, SCORING.window_left)
        first_tile, tiles = tile_range(key_begin, key_end, TILE.block_n)
        num_splits = count_splits(tiles, quota, SCHEDULE)
        split = item - first_item
        row_max, row_sum, acc = attend_query(
            sequence,
            kv_head,
            heads,
            head_mask,
            (first_tile + split_begin(split, tiles, num_splits)) * TILE.block_n,
            (first_tile + split_begin(split + 1, tiles, num_splits)) * TILE.block_n,
            key_begin,
            key_end,
            q_ptr,
            k_ptr,
            v_ptr,
            table_ptr,
            alibi_ptr,
            k_scale_ptr,
            K_SCALE_STRIDE,
            NUM_Q_HEADS,
            CACHE,
            SCORING,
            TILE,
        )
        partial_rows = tl.cast(item, tl.int64) * NUM_Q_HEADS + heads
        tl.store(
            partial_out_ptr + partial_rows[:, None] * CACHE.value_head_dim + dims[None, :],
            divide_by_sum(acc, row_sum),
            mask=head_mask[:, None] & (dims < CACHE.value_head_dim)[None, :],
        )
        tl.store(partial_lse_ptr + partial_rows, base2_lse(row_max, row_sum), mask=head_mask)
