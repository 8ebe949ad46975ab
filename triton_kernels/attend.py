"""The loop over KV tiles that every kernel calls."""

import triton
import triton.language as tl

from triton_kernels.online_softmax import online_softmax
from triton_kernels.pages import clamp, key_offsets, load_page_ids, load_tile
from triton_kernels.scores import LOG2_E, alibi, hide, soft_cap


@triton.jit
def attend_tiles(
    q,  # [BLOCK_M, BLOCK_D]
    row_max,  # [BLOCK_M]
    row_sum,  # [BLOCK_M]
    acc,  # [BLOCK_M, BLOCK_DV]
    page_ids,
    begin,
    end,
    k_ptr,
    v_ptr,
    table_ptr,
    key_begin,
    key_end,
    row_begin,  # [BLOCK_M]
    row_end,  # [BLOCK_M]
    row_positions,  # [BLOCK_M]
    slopes,  # [BLOCK_M] or None
    score_scale,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Fold the tiles that start in `[begin, end)` into the row state; returns it and the page ids at `end`."""
    lanes = tl.arange(0, TILE.block_n)
    for start in tl.range(begin, end, TILE.block_n, num_stages=NUM_STAGES):
        keys = start + lanes
        in_range = (keys >= key_begin) & (keys < key_end)
        k_offsets = key_offsets(
            page_ids, start, CACHE.k_page_stride, CACHE.k_token_stride, CACHE.page_size, TILE.block_n
        )
        v_offsets = key_offsets(
            page_ids, start, CACHE.v_page_stride, CACHE.v_token_stride, CACHE.page_size, TILE.block_n
        )
        k = load_tile(k_ptr, k_offsets, in_range, CACHE.head_dim, TILE.block_d, MASKED)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr, v_offsets, in_range, CACHE.value_head_dim, TILE.block_dv, MASKED)  # [BLOCK_N, BLOCK_DV]
        # Asked for one tile ahead: else the address chain table -> page -> tile swallows the pipeline's stages.
        page_ids = load_page_ids(table_ptr, start + TILE.block_n, key_begin, key_end, CACHE, TILE.block_n)

        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if SCORING.scale_is_folded:
            unit = score_scale
        else:
            unit = 1.0
            scores = scores * score_scale
            if SCORING.soft_cap is not None:
                scores = soft_cap(scores, SCORING.soft_cap)
            scores = scores * LOG2_E
            if slopes is not None:
                scores += alibi(slopes, keys, row_positions) * LOG2_E
        if MASKED:
            scores = hide(scores, keys, row_begin, row_end)
        weights, rescale, row_max, row_sum = online_softmax(scores, unit, row_max, row_sum)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision="ieee")
    return row_max, row_sum, acc, page_ids


@triton.jit
def attend(
    q,  # [BLOCK_M, BLOCK_D]
    begin,
    end,
    k_ptr,
    v_ptr,
    table_ptr,
    key_begin,
    key_end,
    whole_begin,
    whole_end,
    row_begin,  # [BLOCK_M]
    row_end,  # [BLOCK_M]
    row_positions,  # [BLOCK_M]
    slopes,  # [BLOCK_M] or None
    score_scale,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention of a tile of rows over the keys in `[begin, end)`, both multiples of BLOCK_N, or the end of the keys.

    `[key_begin, key_end)` are the keys that any row may see: no other is loaded. Every row sees all of
    `[whole_begin, whole_end)`, so its tiles run without masks, between masked ones at both edges.
    Returns the row state: maximum (base 2), sum, accumulator.
    """
    row_max = tl.full([TILE.block_m], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE.block_m], tl.float32)
    acc = tl.zeros([TILE.block_m, TILE.block_dv], tl.float32)
    page_ids = load_page_ids(table_ptr, begin, key_begin, key_end, CACHE, TILE.block_n)
    if TILE.bulk_loop:
        bulk_begin = clamp(tl.cdiv(whole_begin, TILE.block_n) * TILE.block_n, begin, end)
        bulk_end = clamp(whole_end // TILE.block_n * TILE.block_n, bulk_begin, end)
        edges = (begin, bulk_begin, bulk_end, end)
    else:
        edges = (begin, end)
    for part in tl.static_range(len(edges) - 1):
        row_max, row_sum, acc, page_ids = attend_tiles(
            q,
            row_max,
            row_sum,
            acc,
            page_ids,
            edges[part],
            edges[part + 1],
            k_ptr,
            v_ptr,
            table_ptr,
            key_begin,
            key_end,
            row_begin,
            row_end,
            row_positions,
            slopes,
            score_scale,
            CACHE,
            SCORING,
            TILE,
            MASKED=part != 1,
            NUM_STAGES=TILE.num_stages if part == 1 or not TILE.bulk_loop else 1,
        )
    return row_max, row_sum, acc
