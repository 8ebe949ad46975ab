"""The warp of the kernel for Hopper that finds out what its program has to do, and has the TMA fetch K and V for it."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from triton_kernels.hopper_parts import announce, place
from triton_kernels.pages import clamp
from triton_kernels.rows import visible_keys
from triton_kernels.schedule import (
    find_row_tile,
    measure_shares,
    partial_number,
    shares_of,
    tiles_of_share,
)

EIGHTHS_FOR_FEW = tl.constexpr(3)  # of the programs begin with sequences of few rows
MOST_CACHE_ROWS = tl.constexpr(1 << 30)  # tokens times heads: coordinates of the TMA have 32 bits


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
