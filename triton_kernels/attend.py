"""The loop over KV tiles that every kernel calls."""

import triton
import triton.language as tl

from triton_kernels.online_softmax import online_softmax
from triton_kernels.pages import key_offsets, load_page_ids, load_tile
from triton_kernels.scores import LOG2_E, alibi, base_2_logits, hide, in_base_2, qq_bias
from triton_kernels.segments import hide_other_segments


@triton.jit
def attend(
    q,  # [BLOCK_M, BLOCK_D]
    begin,
    end,
    k_ptr,
    v_ptr,
    table_ptr,  # [MP], or None: the keys follow one another
    key_begin,
    key_end,
    whole_begin,
    whole_end,
    row_begin,  # [BLOCK_M]
    row_end,  # [BLOCK_M]
    row_positions,  # [BLOCK_M]
    context,
    slopes,  # [BLOCK_M] or None
    qq_bias_ptr,  # [Q, Q] or None
    score_scale,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    row_segments=None,  # [BLOCK_M] or None
    key_segment_ptr=None,  # [K] or None
):
    """Attention of a tile of rows over the keys in `[begin, end)`, both multiples of BLOCK_N, or the end of the keys.

    `[key_begin, key_end)` are the keys that any row may see: no other is loaded. Every row sees all of
    `[whole_begin, whole_end)`: the scores of tiles inside need no mask. `context` is the position of the sequence's
    first row. With segments a row sees keys of its own segment only; keys of negative segments are not loaded.
    Returns the row state: maximum (base 2), sum, accumulator.
    """
    # A pipeline of two stages asks for page ids one tile ahead by itself, through a carried variable: else the address
    # chain table -> page -> tile takes a stage. In deeper ones a carried variable would keep Triton from overlapping
    # anything; there it loads the ids as a stage of their own.
    carries_ids: tl.constexpr = TILE.num_stages <= 2
    row_max = tl.full([TILE.block_m], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE.block_m], tl.float32)
    acc = tl.zeros([TILE.block_m, TILE.block_dv], tl.float32)
    lanes = tl.arange(0, TILE.block_n)
    page_ids = load_page_ids(table_ptr, begin, key_begin, key_end, CACHE, TILE.block_n)
    for start in tl.range(begin, end, TILE.block_n, num_stages=TILE.num_stages):
        if not carries_ids:
            page_ids = load_page_ids(table_ptr, start, key_begin, key_end, CACHE, TILE.block_n)
        keys = start + lanes
        in_range = (keys >= key_begin) & (keys < key_end)
        if key_segment_ptr is not None:
            key_segments = tl.load(key_segment_ptr + keys, mask=in_range, other=-1)
            in_range = in_range & (key_segments >= 0)
        k_offsets = key_offsets(
            page_ids, start, CACHE.k_page_stride, CACHE.k_token_stride, CACHE.page_size, TILE.block_n
        )
        v_offsets = key_offsets(
            page_ids, start, CACHE.v_page_stride, CACHE.v_token_stride, CACHE.page_size, TILE.block_n
        )
        k = load_tile(k_ptr, k_offsets, in_range, CACHE.head_dim, TILE.block_d)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr, v_offsets, in_range, CACHE.value_head_dim, TILE.block_dv)  # [BLOCK_N, BLOCK_DV]
        if carries_ids:
            page_ids = load_page_ids(table_ptr, start + TILE.block_n, key_begin, key_end, CACHE, TILE.block_n)

        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scores, unit = base_2_logits(scores, score_scale, SCORING, q.dtype == tl.float32)
        if slopes is not None:
            scores += alibi(slopes, keys, row_positions) * LOG2_E
        if qq_bias_ptr is not None:
            scores += in_base_2(qq_bias(qq_bias_ptr, keys - context, row_positions - context, SCORING.qq_size))
        if TILE.skip_masks:
            if (start < whole_begin) | (start + TILE.block_n > whole_end):
                scores = hide(scores, keys, row_begin, row_end)
        else:
            scores = hide(scores, keys, row_begin, row_end)
        if key_segment_ptr is not None:
            scores = hide_other_segments(scores, key_segments, row_segments)
        weights, rescale, row_max, row_sum = online_softmax(scores, unit, row_max, row_sum)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision="ieee")
    return row_max, row_sum, acc
