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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_kernels.online_softmax import online_softmax, store_rows
from triton_kernels.pages import clamp
from triton_kernels.rows import keys_of_rows, unpack_rows, visible_keys
from triton_kernels.schedule import (
    find_row_tile,
    measure_shares,
    partial_number,
    shares_of,
    tiles_of_share,
)
from triton_kernels.scores import from_cap, hide, load_score_scale, logits_from_cap
from triton_kernels.split_reduce import store_partial

ROWS = tl.constexpr(64)  # of a warpgroup
NARROWEST = tl.constexpr(8)  # columns of a product
WARPS = tl.constexpr(4)  # of a warpgroup
CONSUMER_REGISTERS = tl.constexpr(232)
PRODUCER_REGISTERS = tl.constexpr(40)
SWIZZLED = tl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
SWIZZLED_HEADS = tl.constexpr(gl.NVMMASharedLayout(128, 16, 3))  # the same, of tokens with an axis of one head
EIGHTHS_FOR_FEW = tl.constexpr(3)  # of the programs begin with sequences of few rows
PARTS = tl.constexpr(2)  # announced but not begun
FIELDS = tl.constexpr(10)  # of a part
MOST_CACHE_ROWS = tl.constexpr(1 << 30)  # tokens times heads: coordinates of the TMA have 32 bits
CLEANED_KEYS = tl.constexpr(16)  # whose values pass through registers at once


@gluon.jit
def place(number, RING: gl.constexpr):
    """The slot of a ring that tile `number` goes through, and the parity of its barriers."""
    return number % RING, number // RING & 1


@gluon.jit
def find_boxes(
    start, key_begin, key_end, head_row, table_ptr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, CACHE: gl.constexpr
):
    """Rows of the cache at which the boxes of the keys `[start, start + BLOCK_N)` begin: no box crosses a page.

    Boxes without a key of `[key_begin, key_end)` are beyond the end of the cache, where the TMA finds zeros.
    """
    boxes = ()
    for number in gl.static_range(BLOCK_N // BOX):
        key = start + number * BOX
        is_needed = (key < key_end) & (key + BOX > key_begin)
        page = clamp(gl.load(table_ptr + key // CACHE.page_size, mask=is_needed, other=0), 0, CACHE.num_pages - 1)
        row = page * (CACHE.k_page_stride // CACHE.k_token_stride) + key % CACHE.page_size + head_row
        boxes = boxes + (gl.where(is_needed, row, MOST_CACHE_ROWS),)  # noqa: RUF005 - Gluon unpacks no tuples
    return boxes


@gluon.jit
def fetch_tile(desc, boxes, head, tile, full, BOX: gl.constexpr):
    """Have the TMA bring a tile, box by box: with zeros where a head is narrower than the tile."""
    mbarrier.expect(full, tile.nbytes_per_cta)
    keys = tile.reshape([tile.shape[0], 1, tile.shape[1]])
    for number in gl.static_range(len(boxes)):
        tma.async_load(desc, [boxes[number], head, 0], full, keys.slice(number * BOX, BOX))


@gluon.jit
def fetch_tiles(
    k_desc,
    v_desc,
    rings,
    barriers,
    table_ptr,
    first,
    num_tiles,
    begin,
    key_begin,
    key_end,
    kv_head,
    CACHE: gl.constexpr,
):
    """Fetch every tile of K and V of a part as soon as its slot is free."""
    k_ring, v_ring = rings[0], rings[1]
    k_full, k_empty, v_full, v_empty, _turns = barriers
    block_n: gl.constexpr = k_ring.shape[1]
    box: gl.constexpr = k_desc.block_shape[0]
    # A row of the cache holds a token, of one head or of all.
    head_row = kv_head * (CACHE.k_head_stride // CACHE.k_token_stride)
    head_in_row = kv_head * (CACHE.k_head_stride % CACHE.k_token_stride // CACHE.head_dim)
    for number in range(num_tiles):
        slot, parity = place(first + number, k_ring.shape[0])
        boxes = find_boxes(begin + number * block_n, key_begin, key_end, head_row, table_ptr, block_n, box, CACHE)
        mbarrier.wait(k_empty.index(slot), parity ^ 1)
        fetch_tile(k_desc, boxes, head_in_row, k_ring.index(slot), k_full.index(slot), box)
        mbarrier.wait(v_empty.index(slot), parity ^ 1)
        fetch_tile(v_desc, boxes, head_in_row, v_ring.index(slot), v_full.index(slot), box)


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
def announce(part, ring, full, empty, fields):
    """Tell the warpgroups about part number `part`: once they have read the one whose place it takes.

    The fields are, in order, the names that `read_part` gives them.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot, parity = place(part, PARTS)
    mbarrier.wait(empty.index(slot), parity ^ 1)
    for number in gl.static_range(FIELDS):
        ring.index(slot * FIELDS + number).store(gl.full([1], fields[number], gl.int32, layout))
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def read_field(ring, place_in_ring):
    """A number that `announce` has put into a place of the ring."""
    return gl.max(ring.index(place_in_ring).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def read_part(part, ring, full, empty):
    """What `announce` tells of part number `part`."""
    slot, parity = place(part, PARTS)
    mbarrier.wait(full.index(slot), parity)
    num_tiles = read_field(ring, slot * FIELDS)
    begin = read_field(ring, slot * FIELDS + 1)
    key_begin = read_field(ring, slot * FIELDS + 2)
    key_end = read_field(ring, slot * FIELDS + 3)
    first_token = read_field(ring, slot * FIELDS + 4)
    num_tokens = read_field(ring, slot * FIELDS + 5)
    num_keys = read_field(ring, slot * FIELDS + 6)
    first_row = read_field(ring, slot * FIELDS + 7)
    kv_head = read_field(ring, slot * FIELDS + 8)
    partial = read_field(ring, slot * FIELDS + 9)
    mbarrier.arrive(empty.index(slot), count=1)
    return num_tiles, begin, key_begin, key_end, first_token, num_tokens, num_keys, first_row, kv_head, partial


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
def part_of_share(
    share,
    first_share,
    num_splits,
    begin,
    line,
    num_tokens,
    num_keys,
    first_row,
    QUERIES: gl.constexpr,
    SCORING: gl.constexpr,
    TILE: gl.constexpr,
    SCHEDULE: gl.constexpr,
):
    """The KV tiles of `share` in a row tile: where they begin, how many there are; the keys that any row sees of them.

    Rows without keys go through one tile, of zeros.
    """
    key_begin, key_end, _, _ = visible_keys(
        first_row, TILE.block_m, num_keys - num_tokens, num_tokens, num_keys, QUERIES, SCORING
    )
    tile_begin, tile_end = tiles_of_share(
        share, first_share, num_splits, begin, line, key_begin, key_end, TILE.block_n, SCHEDULE
    )
    begin_key = tile_begin * TILE.block_n
    key_begin = gl.maximum(key_begin, begin_key)
    key_end = gl.minimum(key_end, tile_end * TILE.block_n)
    return begin_key, gl.maximum(tile_end - tile_begin, 1), key_begin, key_end


@gluon.jit
def produce_share(
    share,
    kv_head,
    part,
    tiles_done,
    line,
    lanes,
    rings,
    barriers,
    parts,
    k_desc,
    v_desc,
    starts_ptr,
    lens_ptr,
    table_ptr,
    tickets_ptr,
    QUERIES: gl.constexpr,
    CACHE: gl.constexpr,
    SCORING: gl.constexpr,
    TILE: gl.constexpr,
    SCHEDULE: gl.constexpr,
):
    """Tell the warpgroups of every part of a share, and fetch its tiles.

    Returns the parts and the tiles until now, and whether a later share may have parts.
    """
    part_ring, part_full, part_empty = parts
    share_length, cost = line[0], line[1]
    position = share.to(SCHEDULE.line_type) * share_length
    share_end = position + share_length
    goes_on = share >= 0
    while position < share_end:
        segment, first_token, num_tokens, _, num_keys, first_row, begin, end = find_row_tile(
            position, line, lanes, starts_ptr, lens_ptr, None, QUERIES, SCORING, TILE, SCHEDULE, BY_NUMBER=False
        )
        first_share, last_share = shares_of(begin, end, line, SCHEDULE)
        position = share_end
        if (segment >= 0) & (first_share <= share):
            num_splits = last_share - first_share + 1
            begin_key, num_tiles, key_begin, key_end = part_of_share(
                share, first_share, num_splits, begin, line, num_tokens, num_keys, first_row,
                QUERIES, SCORING, TILE, SCHEDULE,
            )  # fmt: skip
            partial_row = (partial_number(share, first_share, SCHEDULE) * QUERIES.num_kv_heads + kv_head) * TILE.block_m
            partial_row = gl.where(num_splits > 1, partial_row, -1)
            if tickets_ptr is not None:
                gl.store(tickets_ptr, 1, mask=num_splits > 1)
            announce(
                part, part_ring, part_full, part_empty,
                (
                    num_tiles, begin_key, key_begin, key_end, first_token, num_tokens, num_keys, first_row, kv_head,
                    partial_row,
                ),
            )  # fmt: skip
            sequence = clamp(segment - 1, 0, QUERIES.num_seqs - 1)
            fetch_tiles(
                k_desc, v_desc, rings, barriers, table_ptr + sequence.to(gl.int64) * CACHE.table_width,
                tiles_done, num_tiles, begin_key, key_begin, key_end, kv_head, CACHE,
            )  # fmt: skip
            part += 1
            tiles_done += num_tiles
            position = end + cost + (SCHEDULE.unit - 1)
        elif not SCHEDULE.is_balanced:
            goes_on = share < 0
    return part, tiles_done, goes_on


@gluon.jit
def count_preferring_few(programs):
    """How many of the first `programs` begin with sequences of few rows."""
    return programs // 8 * EIGHTHS_FOR_FEW + gl.minimum(programs % 8, EIGHTHS_FOR_FEW)


@gluon.jit
def take_ticket(ticket_ptr, is_first, dealt, num_dealt):
    """A number that no other program gets: what this one was dealt if it is its first, then of those from `num_dealt`.

    An atomic addition would delay the start.
    """
    ticket = dealt
    if not is_first:
        ticket = num_dealt + gl.atomic_add(ticket_ptr, 1, sem="relaxed")
        gl.barrier()  # the answer goes through shared memory, which the next one must not reuse before all have read
    return ticket


@gluon.jit
def produce(
    rings,
    barriers,
    parts,
    k_desc,
    v_desc,
    starts_ptr,
    lens_ptr,
    table_ptr,
    tickets_ptr,
    QUERIES: gl.constexpr,
    CACHE: gl.constexpr,
    SCORING: gl.constexpr,
    FEW_TILE: gl.constexpr,
    FEW_SCHEDULE: gl.constexpr,
    MANY_TILE: gl.constexpr,
    MANY_SCHEDULE: gl.constexpr,
):
    """Find out what a program has to do, part by part, tell the warpgroups, and fetch the tiles.

    With one schedule, programs take turns in alternating order, so that each gets long shares and short ones. With two,
    they take tickets of the one that they prefer as long as there are any, then of the other.
    """
    part_ring, part_full, part_empty = parts
    heads: gl.constexpr = QUERIES.num_kv_heads
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    part, tiles_done, turn = program * 0, program * 0, program * 0
    counting: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    many_lanes = gl.arange(0, MANY_SCHEDULE.block_s, counting)
    many_left = program >= 0
    if FEW_SCHEDULE is None:
        many_line = measure_shares(many_lanes, starts_ptr, lens_ptr, None, QUERIES, SCORING, MANY_TILE, MANY_SCHEDULE)
        number = program
        while many_left & (number < MANY_SCHEDULE.num_shares * heads):
            part, tiles_done, many_left = produce_share(
                number // heads, number % heads, part, tiles_done, many_line, many_lanes, rings, barriers, parts,
                k_desc, v_desc, starts_ptr, lens_ptr, table_ptr, tickets_ptr, QUERIES, CACHE, SCORING, MANY_TILE,
                MANY_SCHEDULE,
            )  # fmt: skip
            turn += 1
            number = turn * num_programs + gl.where(turn % 2 == 0, program, num_programs - 1 - program)
    else:
        few_lanes = gl.arange(0, FEW_SCHEDULE.block_s, counting)
        few_line = measure_shares(few_lanes, starts_ptr, lens_ptr, None, QUERIES, SCORING, FEW_TILE, FEW_SCHEDULE)
        if not MANY_SCHEDULE.is_balanced and FEW_SCHEDULE.measure == MANY_SCHEDULE.measure:
            many_line = few_line
        else:
            many_line = measure_shares(
                many_lanes, starts_ptr, lens_ptr, None, QUERIES, SCORING, MANY_TILE, MANY_SCHEDULE
            )
        prefers_few = program % 8 < EIGHTHS_FOR_FEW
        few_programs, few_before = count_preferring_few(num_programs), count_preferring_few(program)
        few_left = many_left
        is_first = many_left
        while few_left | many_left:
            if few_left & (prefers_few | (not many_left)):
                number = take_ticket(tickets_ptr + 1, is_first, few_before, few_programs)
                few_left = number < FEW_SCHEDULE.num_shares * heads
                if few_left:
                    part, tiles_done, few_left = produce_share(
                        number // heads, number % heads, part, tiles_done, few_line, few_lanes, rings, barriers, parts,
                        k_desc, v_desc, starts_ptr, lens_ptr, table_ptr, tickets_ptr, QUERIES, CACHE, SCORING, FEW_TILE,
                        FEW_SCHEDULE,
                    )  # fmt: skip
            else:
                number = take_ticket(tickets_ptr + 2, is_first, program - few_before, num_programs - few_programs)
                many_left = number < MANY_SCHEDULE.num_shares * heads
                if many_left:
                    part, tiles_done, many_left = produce_share(
                        number // heads, number % heads, part, tiles_done, many_line, many_lanes, rings, barriers,
                        parts, k_desc, v_desc, starts_ptr, lens_ptr, table_ptr, tickets_ptr, QUERIES, CACHE, SCORING,
                        MANY_TILE, MANY_SCHEDULE,
                    )  # fmt: skip
            is_first = program < 0
    announce(part, part_ring, part_full, part_empty, (0, 0, 0, 0, 0, 0, 0, 0, 0, 0))


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
