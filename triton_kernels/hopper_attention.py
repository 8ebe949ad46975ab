"""Prefilling on Hopper, alone or beside decoding: what `paged_attention` computes, by warps with different parts.

Written in Gluon, Triton's language of explicit layouts and barriers. One warp has the TMA fetch K and V tiles, page by
page, into rings in shared memory. Each warpgroup computes 64 rows, and asks for the next scores before it has finished
with the last ones: while one takes exponentials, another keeps the tensor cores busy. After FlashAttention-3
(https://arxiv.org/abs/2407.08608).

Where some sequences decode, some programs begin with these and the others with prompts, and all go on with what is
left: the former wait for memory while the latter compute.

The interpreter knows no Gluon. Most of what is not the loop is shared with the kernels that it does run.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_kernels.hopper_fetching import produce
from triton_kernels.hopper_parts import FIELDS, PARTS, WARPS, place, read_part
from triton_kernels.online_softmax import online_softmax, store_rows
from triton_kernels.pages import clamp
from triton_kernels.rows import keys_of_rows, unpack_rows, visible_keys
from triton_kernels.scores import from_cap, hide, load_score_scale, logits_from_cap
from triton_kernels.split_reduce import store_partial

ROWS = tl.constexpr(64)  # of a warpgroup
NARROWEST = tl.constexpr(8)  # columns of a product
CONSUMER_REGISTERS = tl.constexpr(232)
PRODUCER_REGISTERS = tl.constexpr(40)
SWIZZLED = tl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
SWIZZLED_HEADS = tl.constexpr(gl.NVMMASharedLayout(128, 16, 3))  # the same, of tokens with an axis of one head
CLEANED_KEYS = tl.constexpr(16)  # whose values pass through registers at once


@gluon.jit
def clean(v_tile, start, key_begin, key_end, BOX: gl.constexpr):
    """Zero what a tile at an end of the keys `[key_begin, key_end)` holds of others, which came in a box with some.

    Their weights are 0, but what is there may be anything, and 0 times NaN is NaN.
    """
    block_n: gl.constexpr = v_tile.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    is_cut = ((key_end % BOX != 0) & (key_end < start + block_n)) | ((key_begin % BOX != 0) & (key_begin > start))
    if is_cut:
        for first in gl.static_range(0, block_n, CLEANED_KEYS):
            keys = start + first + gl.arange(0, CLEANED_KEYS, gl.SliceLayout(1, layout))
            rows = v_tile.slice(first, CLEANED_KEYS)
            values = rows.load(layout)
            rows.store(gl.where(((keys >= key_begin) & (keys < key_end))[:, None], values, gl.zeros_like(values)))
        fence_async_shared()


@gluon.jit
def pack_pairs(weights, DTYPE: gl.constexpr):
    """Weights `[ROWS, N]` rounded to 16 bits, two neighbours an integer: `[ROWS, N / 2]`.

    A loop that carries 16-bit numbers puts the halves of a register together anew for every product.
    """
    low, high = gl.split(weights.reshape([ROWS, weights.shape[1] // 2, 2]))
    name: gl.constexpr = "f16x2" if gl.float16 == DTYPE else "bf16x2"
    instruction: gl.constexpr = "cvt.rn." + name + ".f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(instruction, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack_pairs(pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The weights `[ROWS, N]` of `pack_pairs`, as the left side of a product."""
    low = pairs.to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([ROWS, 2 * pairs.shape[1]]), LAYOUT)


@gluon.jit
def multiply_scores(q_tile, k_tile, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Begin the products `[ROWS, BLOCK_N]` of queries and keys."""
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def weigh(
    products,
    start,
    lanes,
    row_begin,
    row_end,
    row_max,
    row_sum,
    score_scale,
    SCORING: gl.constexpr,
    IS_BOUNDED: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Weights of a tile of products, the factor for what was accumulated before, and the new row state.

    The maximum is that of `logits_from_cap`. Bounded scores change neither it nor, yet, the sums, and need no factor:
    their weights are 0, or `2^-110` to `2^36`.
    """
    scores, unit = logits_from_cap(products, score_scale, SCORING)
    if MASKED:
        scores = hide(scores, start + lanes, row_begin, row_end)
    if IS_BOUNDED:
        weights = tl.exp2(scores if SCORING.bounded_max == 0.0 else scores - SCORING.bounded_max)
        rescale = 1.0
    else:
        weights, rescale, row_max, row_sum = online_softmax(scores, unit, row_max, row_sum)
    return weights, rescale, row_max, row_sum


@gluon.jit
def await_turn(number, first, part, turns, GROUP: gl.constexpr):
    """Wait until the other warpgroup has begun its products of this tile, or of the last one if this group is first.

    So one takes exponentials while the other multiplies, and not both the same.
    """
    turn = first - part + number - 1  # every part has one tile without
    mbarrier.wait(turns.index(GROUP), (turn + 1 - GROUP) & 1)


@gluon.jit
def end_turn(turns, GROUP: gl.constexpr):
    """Let the other warpgroup begin its products."""
    mbarrier.arrive(turns.index(1 - GROUP), count=1)


@gluon.jit
def attend_tile(
    number,
    first,
    part,
    begin,
    q_tile,
    rings,
    barriers,
    pairs,
    row_max,
    row_sum,
    acc,
    lanes,
    row_begin,
    row_end,
    score_scale,
    SCORING: gl.constexpr,
    IS_BOUNDED: gl.constexpr,
    GROUP: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Scores of tile `number` while the values of the tile before are accumulated, whose weights are `pairs`.

    Returns its own weights and the new row state. The maximum of bounded scores does not change, and the sums of their
    weights are products as well, of what these were rounded to: without that, rows of one key would be off by the
    rounding of its weight, which nothing makes 1. Beside a sink they are, by as much as it counts.
    """
    k_ring, v_ring = rings[0], rings[1]
    k_full, k_empty, v_full, v_empty, turns = barriers
    block_n: gl.constexpr = k_ring.shape[1]
    rows_layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    weights = unpack_pairs(pairs, v_ring.dtype, gl.DotOperandLayout(0, acc.type.layout, 2))
    slot, parity = place(first + number, k_ring.shape[0])
    before, parity_before = place(first + number - 1, k_ring.shape[0])
    start = begin + number * block_n
    mbarrier.wait(k_full.index(slot), parity)
    await_turn(number, first, part, turns, GROUP)
    products = multiply_scores(q_tile, k_ring.index(slot), block_n, lanes.type.layout.parent)
    mbarrier.wait(v_full.index(before), parity_before)
    acc = warpgroup_mma(weights, v_ring.index(before), acc, is_async=True)
    if IS_BOUNDED:
        row_sum = warpgroup_mma(weights, rings[2], row_sum, is_async=True)
    end_turn(turns, GROUP)
    products = warpgroup_mma_wait(2 if IS_BOUNDED else 1, deps=[products])
    mbarrier.arrive(k_empty.index(slot), count=1)
    new_weights, rescale, row_max, row_sum = weigh(
        products, start, lanes, row_begin, row_end, row_max, row_sum, score_scale, SCORING, IS_BOUNDED, MASKED
    )
    if IS_BOUNDED:
        acc, row_sum, weights = warpgroup_mma_wait(0, deps=[acc, row_sum, weights])
    else:
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(v_empty.index(before), count=1)
    if not IS_BOUNDED:
        acc = acc * gl.convert_layout(rescale, rows_layout)[:, None]
    return pack_pairs(new_weights, v_ring.dtype), row_max, row_sum, acc


@gluon.jit
def pass_tile(number, first, part, rings, barriers, GROUP: gl.constexpr):
    """What `attend_tile` does to barriers, and nothing else: its turn need not wait for the keys."""
    k_ring = rings[0]
    k_full, k_empty, v_full, v_empty, turns = barriers
    slot, parity = place(first + number, k_ring.shape[0])
    before, parity_before = place(first + number - 1, k_ring.shape[0])
    await_turn(number, first, part, turns, GROUP)
    end_turn(turns, GROUP)
    mbarrier.wait(k_full.index(slot), parity)
    mbarrier.arrive(k_empty.index(slot), count=1)
    mbarrier.wait(v_full.index(before), parity_before)
    mbarrier.arrive(v_empty.index(before), count=1)


@gluon.jit
def fetch_queries(
    q_ptr,
    q_tile,
    first_token,
    num_tokens,
    first_row,
    kv_head,
    QUERIES: gl.constexpr,
    CACHE: gl.constexpr,
    TILE: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Begin to copy the queries of a warpgroup's rows; zeros for rows and dimensions that there are not."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    tile_row = (first_token + first_row // QUERIES.group_size).to(gl.int64) * QUERIES.num_q_heads
    rows = first_row + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    _, _, q_rows, row_mask = unpack_rows(rows, first_row, kv_head, num_tokens, QUERIES)
    dims = gl.arange(0, TILE.block_d, gl.SliceLayout(0, layout))
    pointers = q_ptr + tile_row * CACHE.head_dim + q_rows[:, None] * CACHE.head_dim + dims[None, :]
    async_copy.async_load(q_tile, pointers, mask=row_mask[:, None] & (dims < CACHE.head_dim)[None, :])
    async_copy.commit_group()


@gluon.jit
def consume(
    q_ring,
    rings,
    barriers,
    parts,
    arrays,
    K_SCALE_STRIDE: gl.constexpr,
    V_SCALE_STRIDE: gl.constexpr,
    QUERIES: gl.constexpr,
    CACHE: gl.constexpr,
    SCORING: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
    OFTEN_FEW: gl.constexpr,
    IS_BOUNDED: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Attention of the rows of warpgroup `GROUP` in every part, over the tiles that `produce` fetches.

    The rows are written, or a partial result where a part has the first row of one.
    """
    q_ptr, sink_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr = arrays
    k_ring, v_ring = rings[0], rings[1]
    k_full, k_empty, v_full, v_empty, _turns = barriers
    part_ring, part_full, part_empty = parts
    block_n: gl.constexpr = TILE.block_n
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, block_n, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE.block_dv, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, NARROWEST, 16])
    score_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    q_tile = q_ring.index(GROUP)
    lanes = gl.arange(0, block_n, gl.SliceLayout(0, scores_layout))
    value_dims = gl.arange(0, TILE.block_dv, gl.SliceLayout(0, out_layout))

    num_tiles, begin, key_begin, key_end, first_token, num_tokens, num_keys, first_row, kv_head, partial = read_part(
        0, part_ring, part_full, part_empty
    )
    part, first = num_tiles * 0, num_tiles * 0
    fetch_queries(q_ptr, q_tile, first_token, num_tokens, first_row, kv_head, QUERIES, CACHE, TILE, GROUP)
    while num_tiles > 0:
        my_rows = first_row + GROUP * ROWS
        context = num_keys - num_tokens
        _, _, whole_begin, whole_end = visible_keys(my_rows, ROWS, context, num_tokens, num_keys, QUERIES, SCORING)
        rows = my_rows + gl.arange(0, ROWS, score_rows)
        row_begin, row_end = keys_of_rows(context + rows // QUERIES.group_size, num_keys, SCORING)
        row_begin = gl.maximum(row_begin, key_begin)
        row_end = gl.minimum(row_end, key_end)
        score_scale = load_score_scale(k_scale_ptr, kv_head, K_SCALE_STRIDE, SCORING)
        # Of the tiles behind the first one: those from `first_whole` to `end_whole` need no mask.
        first_whole = clamp((whole_begin - begin + (block_n - 1)) // block_n, 1, num_tiles)
        end_whole = clamp((gl.minimum(whole_end, key_end) - begin) // block_n, first_whole, num_tiles)
        num_computed = num_tiles
        if OFTEN_FEW:  # and then another warpgroup has them all: this one goes on behind the first tile
            num_computed = gl.where(my_rows < num_tokens * QUERIES.group_size, num_tiles, 1)
            first_whole = gl.minimum(first_whole, num_computed)
            end_whole = gl.minimum(end_whole, num_computed)

        slot, parity = place(first, k_ring.shape[0])
        async_copy.wait_group(0)
        fence_async_shared()
        mbarrier.wait(k_full.index(slot), parity)
        products = multiply_scores(q_tile, k_ring.index(slot), block_n, scores_layout)
        products = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(k_empty.index(slot), count=1)
        if IS_BOUNDED:
            row_max = gl.full([ROWS], SCORING.bounded_max, gl.float32, score_rows)
            row_sum = gl.zeros([ROWS, NARROWEST], gl.float32, sums_layout)
        else:
            row_max = gl.full([ROWS], float("-inf"), gl.float32, score_rows)
            row_sum = gl.zeros([ROWS], gl.float32, score_rows)
        weights, _, row_max, row_sum = weigh(
            products, begin, lanes, row_begin, row_end, row_max, row_sum, score_scale, SCORING, IS_BOUNDED, True
        )
        pairs = pack_pairs(weights, v_ring.dtype)
        acc = gl.zeros([ROWS, TILE.block_dv], gl.float32, out_layout)
        if SCORING.window_left is not None:
            mbarrier.wait(v_full.index(slot), parity)
            clean(v_ring.index(slot), begin, key_begin, key_end, BOX)
            for number in range(1, first_whole):
                pairs, row_max, row_sum, acc = attend_tile(
                    number, first, part, begin, q_tile, rings, barriers, pairs, row_max, row_sum, acc, lanes,
                    row_begin, row_end, score_scale, SCORING, IS_BOUNDED, GROUP, True,
                )  # fmt: skip
        for number in range(first_whole, end_whole):
            pairs, row_max, row_sum, acc = attend_tile(
                number, first, part, begin, q_tile, rings, barriers, pairs, row_max, row_sum, acc, lanes,
                row_begin, row_end, score_scale, SCORING, IS_BOUNDED, GROUP, False,
            )  # fmt: skip
        for number in range(end_whole, num_computed):
            pairs, row_max, row_sum, acc = attend_tile(
                number, first, part, begin, q_tile, rings, barriers, pairs, row_max, row_sum, acc, lanes,
                row_begin, row_end, score_scale, SCORING, IS_BOUNDED, GROUP, True,
            )  # fmt: skip
        if OFTEN_FEW:
            for number in range(num_computed, num_tiles):
                pass_tile(number, first, part, rings, barriers, GROUP)
        slot, parity = place(first + num_tiles - 1, k_ring.shape[0])
        mbarrier.wait(v_full.index(slot), parity)
        clean(v_ring.index(slot), begin + (num_tiles - 1) * block_n, key_begin, key_end, BOX)
        weights = unpack_pairs(pairs, v_ring.dtype, weights_layout)
        acc = warpgroup_mma(weights, v_ring.index(slot), acc, is_async=True)
        if IS_BOUNDED:
            row_sum = warpgroup_mma(weights, rings[2], row_sum, is_async=True)
        first += num_tiles

        # The queries have done their work: those of the next part come while this one is finished.
        part += 1
        tile_row = (first_token + first_row // QUERIES.group_size).to(gl.int64) * QUERIES.num_q_heads
        rows = my_rows + gl.arange(0, ROWS, out_rows_layout)
        _, heads, out_rows, row_mask = unpack_rows(rows, first_row, kv_head, num_tokens, QUERIES)
        tile_rows = rows - first_row
        my_partial = partial
        num_tiles, begin, key_begin, key_end, first_token, num_tokens, num_keys, first_row, kv_head, partial = (
            read_part(part, part_ring, part_full, part_empty)
        )
        fetch_queries(q_ptr, q_tile, first_token, num_tokens, first_row, kv_head, QUERIES, CACHE, TILE, GROUP)

        if IS_BOUNDED:
            acc, sums, weights = warpgroup_mma_wait(0, deps=[acc, row_sum, weights])
            sums = gl.max(sums, 1)  # all columns are alike
        else:
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            sums = row_sum
        mbarrier.arrive(v_empty.index(slot), count=1)
        row_max = gl.convert_layout(from_cap(row_max, SCORING), out_rows_layout)
        row_sums = gl.convert_layout(sums, out_rows_layout)
        if partial_out_ptr is None or my_partial < 0:
            lse_row_ptr = lse_ptr
            if lse_ptr is not None:
                lse_row_ptr += tile_row
            store_rows(
                row_max,
                row_sums,
                acc,
                out_rows,
                heads,
                row_mask,
                value_dims,
                sink_ptr,
                v_scale_ptr,
                out_ptr + tile_row * CACHE.value_head_dim,
                lse_row_ptr,
                V_SCALE_STRIDE,
                QUERIES.group_size,
                CACHE.value_head_dim,
            )
        else:
            store_partial(
                row_max,
                row_sums,
                acc,
                my_partial,
                tile_rows,
                row_mask,
                value_dims,
                partial_out_ptr,
                partial_lse_ptr,
                CACHE.value_head_dim,
            )


@gluon.jit
def hopper_paged_attention_kernel(
    q_ptr,  # [T, Hq, D]
    k_desc,  # the cache as rows of tokens, each of one head or of all
    v_desc,
    starts_ptr,  # [S + 1]
    lens_ptr,  # [S]
    table_ptr,  # [S, MP]
    sink_ptr,  # [Hq] or None
    k_scale_ptr,  # [1] or [Hkv] or None
    v_scale_ptr,  # [1] or [Hkv] or None
    tickets_ptr,  # three zeros: whether row tiles are cut, and a counter for each schedule; or None with one
    out_ptr,  # [T, Hq, Dv]
    lse_ptr,  # [T, Hq] or None
    partial_out_ptr,  # [rows of all partial results, Dv] float32, or None where no keys are split
    partial_lse_ptr,  # [rows of all partial results] float32, base 2, or None
    K_SCALE_STRIDE: gl.constexpr,
    V_SCALE_STRIDE: gl.constexpr,
    QUERIES: gl.constexpr,
    CACHE: gl.constexpr,
    SCORING: gl.constexpr,
    FEW_TILE: gl.constexpr,
    FEW_SCHEDULE: gl.constexpr,
    MANY_TILE: gl.constexpr,
    MANY_SCHEDULE: gl.constexpr,
):
    """Every sequence of a schedule, or of two, by programs that stay: one a multiprocessor."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    groups: gl.constexpr = MANY_TILE.block_m // ROWS
    num_slots: gl.constexpr = MANY_TILE.num_stages
    q_ring = gl.allocate_shared_memory(dtype, [groups, ROWS, MANY_TILE.block_d], SWIZZLED)
    k_ring = gl.allocate_shared_memory(dtype, [num_slots, MANY_TILE.block_n, MANY_TILE.block_d], SWIZZLED)
    v_ring = gl.allocate_shared_memory(dtype, [num_slots, MANY_TILE.block_n, MANY_TILE.block_dv], SWIZZLED)
    # Sums of rounded weights are no LSE for a caller, and float16 does not hold the smallest of them.
    is_bounded: gl.constexpr = SCORING.bounded_max is not None and lse_ptr is None and dtype != gl.float16
    rings = (k_ring, v_ring)
    if is_bounded:
        ones_layout: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * MANY_TILE.block_n), 16, 2)
        ones_tile = gl.allocate_shared_memory(dtype, [NARROWEST, MANY_TILE.block_n], ones_layout)
        filled: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
        ones_tile.store(gl.full([NARROWEST, MANY_TILE.block_n], 1.0, dtype, filled))
        fence_async_shared()
        rings = (k_ring, v_ring, ones_tile.permute((1, 0)))
    k_full = mbarrier.allocate_mbarrier(batch=num_slots)
    k_empty = mbarrier.allocate_mbarrier(batch=num_slots)
    v_full = mbarrier.allocate_mbarrier(batch=num_slots)
    v_empty = mbarrier.allocate_mbarrier(batch=num_slots)
    for slot in gl.static_range(num_slots):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=groups)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=groups)
    part_ring = gl.allocate_shared_memory(gl.int32, [PARTS * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    part_full = mbarrier.allocate_mbarrier(batch=PARTS)
    part_empty = mbarrier.allocate_mbarrier(batch=PARTS)
    for slot in gl.static_range(PARTS):
        mbarrier.init(part_full.index(slot), count=1)
        mbarrier.init(part_empty.index(slot), count=groups)
    turns = mbarrier.allocate_mbarrier(batch=2)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    parts = (part_ring, part_full, part_empty)
    barriers = (k_full, k_empty, v_full, v_empty, turns)
    arrays = (q_ptr, sink_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr)
    box: gl.constexpr = k_desc.block_shape[0]
    often_few: gl.constexpr = FEW_SCHEDULE is not None
    gl.warp_specialize(
        [
            (
                consume,
                (
                    q_ring, rings, barriers, parts, arrays, K_SCALE_STRIDE, V_SCALE_STRIDE, QUERIES, CACHE, SCORING,
                    MANY_TILE, box, often_few, is_bounded, 0,
                ),
            ),
            (
                consume,
                (
                    q_ring, rings, barriers, parts, arrays, K_SCALE_STRIDE, V_SCALE_STRIDE, QUERIES, CACHE, SCORING,
                    MANY_TILE, box, often_few, is_bounded, 1,
                ),
            ),
            (
                produce,
                (
                    rings, barriers, parts, k_desc, v_desc, starts_ptr, lens_ptr, table_ptr, tickets_ptr, QUERIES,
                    CACHE, SCORING, FEW_TILE, FEW_SCHEDULE, MANY_TILE, MANY_SCHEDULE,
                ),
            ),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
