"""Who does what, decided on the device from the lengths, by every program for itself: no extra launch, no host sync.

The row tiles of all segments lie on a line, one after another, each as long as the KV tiles that it spans and the cost
of beginning it. A balanced schedule cuts the line into equal shares, wherever the cuts fall: a share may hold the end
of a row tile, some whole ones and the beginning of another. Others cut every row tile by itself, and each split is a
share: a forced one into so many splits, whatever the batch is; one of even splits into as many as make them about as
long as an equal share.

What the batch decides is a tuple, `line`: how long a share is on the line, what it costs to begin a row tile, and the
KV tiles of an even split.

Callers hand over the lanes that count segments: so Triton and Gluon, whose ranges need layouts, share these functions.
"""

import triton
import triton.language as tl

from triton_kernels.pages import clamp

LONGEST = 1 << 29


@triton.jit
def load_segments(segments, starts_ptr, lens_ptr, begins_ptr, QUERIES: tl.constexpr, MAX_KEYS: tl.constexpr):
    """First token, tokens, first key and end of the keys of `segments`; zeros for those that there are not.

    Padding has no keys. Starts, lengths and first keys, which only sequences of one token have, are data: they are
    brought into the arrays.
    """
    first_key = segments * 0
    is_segment = (segments >= 0) & (segments < QUERIES.num_segments)
    if starts_ptr is None:
        first_token = segments
        num_tokens = tl.where(is_segment, 1, 0)
        num_keys = tl.load(lens_ptr + segments, mask=is_segment, other=0)
        if begins_ptr is not None:
            first_key = clamp(tl.load(begins_ptr + segments, mask=is_segment, other=0), 0, MAX_KEYS)
    else:
        is_sequence = (segments >= 1) & (segments <= QUERIES.num_seqs)
        first_token = tl.load(starts_ptr + segments - 1, mask=is_segment & (segments >= 1), other=0)
        end_token = tl.load(
            starts_ptr + segments, mask=is_segment & (segments <= QUERIES.num_seqs), other=QUERIES.num_tokens
        )
        first_token = clamp(first_token, 0, QUERIES.num_tokens)
        num_tokens = clamp(end_token, first_token, QUERIES.num_tokens) - first_token
        num_tokens = tl.where(is_segment, num_tokens, 0)
        num_keys = tl.load(lens_ptr + segments - 1, mask=is_sequence, other=0)
    return first_token, num_tokens, first_key, clamp(num_keys, 0, MAX_KEYS)


@triton.jit
def tile_range(key_begin, key_end, BLOCK_N: tl.constexpr):
    """First tile that holds a key of `[key_begin, key_end)`, and how many do."""
    first = key_begin // BLOCK_N
    return first, tl.where(key_end > key_begin, tl.cdiv(key_end, BLOCK_N) - first, 0)


@triton.jit
def count_tiles(
    num_tokens,
    first_key,
    num_keys,
    QUERIES: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Row tiles of segments, 0 for those that are another schedule's, and KV tiles that a row tile spans."""
    num_rows = num_tokens * QUERIES.group_size
    is_mine = (num_rows >= SCHEDULE.fewest_rows) & (num_rows <= SCHEDULE.most_rows)
    row_tiles = tl.where(is_mine, tl.cdiv(num_rows, TILE.block_m), 0)
    return row_tiles, count_key_tiles(num_tokens, first_key, num_keys, SCORING, TILE, SCHEDULE)


@triton.jit
def count_key_tiles(num_tokens, first_key, num_keys, SCORING: tl.constexpr, TILE: tl.constexpr, SCHEDULE: tl.constexpr):
    """KV tiles that a row tile of segments spans."""
    if SCORING.window_left is None:
        key_begin = first_key
    else:
        key_begin = tl.maximum(num_keys - num_tokens - SCORING.window_left, first_key)
    _, key_tiles = tile_range(key_begin, num_keys, TILE.block_n)
    return clamp(key_tiles, 1, SCHEDULE.most_tiles)


@triton.jit
def line_lengths(key_tiles, line, SCHEDULE: tl.constexpr):
    """How far row tiles reach on the line: to the end of their keys, and to where the next one begins."""
    cost, split_tiles = line[1], line[2]
    if SCHEDULE.is_balanced:
        reach = key_tiles.to(SCHEDULE.line_type) * SCHEDULE.unit
    elif SCHEDULE.even_splits is not None:
        reach = tl.maximum((key_tiles + split_tiles // 2) // split_tiles, 1).to(SCHEDULE.line_type)
    else:
        reach = tl.minimum(key_tiles, SCHEDULE.num_splits).to(SCHEDULE.line_type)
    return reach, reach + cost


@triton.jit
def measure_splits(
    lanes,  # [BLOCK_S] 0, 1, 2 and so on
    starts_ptr,
    lens_ptr,
    begins_ptr,
    QUERIES: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """KV tiles of an even split."""
    total = (lanes * 0).to(SCHEDULE.line_type)
    for start in range(0, QUERIES.num_segments, SCHEDULE.block_s):
        _, num_tokens, first_key, num_keys = load_segments(
            start + lanes, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCHEDULE.max_keys
        )
        key_tiles = count_key_tiles(num_tokens, first_key, num_keys, SCORING, TILE, SCHEDULE)
        row_tiles = tl.cdiv(num_tokens * QUERIES.group_size, SCHEDULE.even_splits.block_m)
        total += row_tiles.to(SCHEDULE.line_type) * key_tiles
    even_length = tl.cdiv(tl.sum(total), SCHEDULE.even_splits.num_shares)
    # Splits of twice the longest row tile and more cut nothing, and nonsense makes no number that 32 bits do not hold.
    return tl.minimum(tl.maximum(even_length, SCHEDULE.min_tiles), 2 * SCHEDULE.most_tiles).to(tl.int32)


@triton.jit
def measure_shares(
    lanes,  # [BLOCK_S] 0, 1, 2 and so on
    starts_ptr,
    lens_ptr,
    begins_ptr,
    QUERIES: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Length of a share and the cost of beginning a row tile, in units of the line; KV tiles of an even split."""
    if SCHEDULE.even_splits is not None:
        split_tiles = measure_splits(lanes, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCORING, TILE, SCHEDULE)
        return 1, 0, split_tiles
    elif not SCHEDULE.is_balanced:
        return 1, 0, 0
    else:
        longest = lanes * 0
        total = longest.to(SCHEDULE.line_type)
        count = longest.to(SCHEDULE.line_type)
        for start in range(0, QUERIES.num_segments, SCHEDULE.block_s):
            segments = start + lanes
            _, num_tokens, first_key, num_keys = load_segments(
                segments, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCHEDULE.max_keys
            )
            row_tiles, key_tiles = count_tiles(num_tokens, first_key, num_keys, QUERIES, SCORING, TILE, SCHEDULE)
            total += row_tiles.to(SCHEDULE.line_type) * key_tiles
            count += row_tiles
            longest = tl.maximum(longest, tl.where(row_tiles > 0, key_tiles, 0))
        num_row_tiles = tl.sum(count)
        num_tiles = tl.sum(total)
        reach = tl.max(longest).to(SCHEDULE.line_type) * SCHEDULE.unit
        is_uniform = num_tiles * SCHEDULE.unit == num_row_tiles * reach
        cost = tl.where(is_uniform, 0, SCHEDULE.unit)
        length = tl.cdiv(num_tiles * SCHEDULE.unit + num_row_tiles * cost, SCHEDULE.num_shares)
        length = tl.maximum(length, SCHEDULE.min_tiles * SCHEDULE.unit)
        # Equal row tiles are cut alike, or not at all, where that makes shares but little longer.
        if_cut = tl.cdiv(reach, tl.maximum(reach // length, 1))
        if_whole = reach * tl.cdiv(length, tl.maximum(reach, 1))
        alike = tl.where(reach >= length, if_cut, if_whole)
        length = tl.where(is_uniform & (alike <= length + length // 8), alike, length)
        return length, cost, 0


@triton.jit
def find_row_tile(
    wanted,
    line,
    lanes,  # [BLOCK_S] 0, 1, 2 and so on
    starts_ptr,
    lens_ptr,
    begins_ptr,
    QUERIES: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BY_NUMBER: tl.constexpr,
):
    """The first row tile whose keys end after the position `wanted` on the line, or row tile number `wanted`.

    By number, it is for the reduction: row tiles that are not cut do not count, but for balanced schedules, which would
    have to look at the shares.

    Returns its segment, -1 if there is none; the segment's first token, tokens, first key and end of the keys; the
    tile's first row; where it begins on the line, and where its keys end.
    """
    cost = line[1]
    if starts_ptr is None and SCHEDULE.num_splits == 1:
        tiles_each: tl.constexpr = (QUERIES.group_size + TILE.block_m - 1) // TILE.block_m
        segment = tl.where(wanted < QUERIES.num_segments * tiles_each, wanted // tiles_each, -1)
        begin = segment * tiles_each
        tiles_before = begin
    else:
        begin = tl.cast(wanted, SCHEDULE.line_type) * 0
        line_end = begin
        one_more = begin.to(tl.int32)
        tiles_before = one_more
        tiles = one_more
        for start in range(0, QUERIES.num_segments, SCHEDULE.block_s):
            segments = start + lanes
            _, num_tokens, first_key, num_keys = load_segments(
                segments, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCHEDULE.max_keys
            )
            row_tiles, key_tiles = count_tiles(num_tokens, first_key, num_keys, QUERIES, SCORING, TILE, SCHEDULE)
            reach, length = line_lengths(key_tiles, line, SCHEDULE)
            ends = line_end + tl.cumsum(row_tiles * length, 0)
            begins = ends - row_tiles * length
            if BY_NUMBER:
                counted = row_tiles
                if not SCHEDULE.is_balanced:
                    counted = tl.where(reach > 1, row_tiles, 0)
                tile_ends = tiles + tl.cumsum(counted, 0)
                is_found = (tile_ends - counted <= wanted) & (wanted < tile_ends)
                tiles_before += tl.sum(tl.where(is_found, tile_ends - counted, 0))
                tiles = tl.max(tile_ends)
            else:
                is_found = (row_tiles > 0) & (begins - cost <= wanted) & (wanted < ends - cost)
            one_more += tl.sum(tl.where(is_found, segments + 1, 0))
            begin += tl.sum(tl.where(is_found, begins, 0))
            line_end = tl.max(ends)
        segment = one_more - 1
    first_token, num_tokens, first_key, num_keys = load_segments(
        segment, starts_ptr, lens_ptr, begins_ptr, QUERIES, SCHEDULE.max_keys
    )
    row_tiles, key_tiles = count_tiles(num_tokens, first_key, num_keys, QUERIES, SCORING, TILE, SCHEDULE)
    reach, length = line_lengths(key_tiles, line, SCHEDULE)
    if BY_NUMBER:
        number = wanted - tiles_before
    else:
        number = tl.where(wanted < begin + reach, 0, (wanted - begin - reach) // length + 1).to(tl.int32)
    begin += number * length
    first_row = (row_tiles - 1 - number) * TILE.block_m  # the last rows see most keys: they come first
    return segment, first_token, num_tokens, first_key, num_keys, first_row, begin, begin + reach


@triton.jit
def shares_of(begin, end, line, SCHEDULE: tl.constexpr):
    """First and last share of a row tile whose keys lie on `[begin, end)` of the line: every one holds a KV tile."""
    share_length = line[0]
    first = (begin + (SCHEDULE.unit - 1)) // share_length
    return first.to(tl.int32), ((end - 1) // share_length).to(tl.int32)


@triton.jit
def split_begin(share, first_share, num_splits, begin, line, tiles, SCHEDULE: tl.constexpr):
    """First of a row tile's `tiles` KV tiles that falls to `share`, or to a later one if none does."""
    share_length = line[0]
    if SCHEDULE.is_balanced:
        result = tl.minimum(tl.maximum(share.to(SCHEDULE.line_type) * share_length - begin, 0) // SCHEDULE.unit, tiles)
    else:
        split = share - first_share  # the first splits take what does not divide
        result = tiles // num_splits * split + tl.minimum(split, tiles % num_splits)
    return result.to(tl.int32)


@triton.jit
def tiles_of_share(
    share,
    first_share,
    num_splits,
    begin,
    line,
    key_begin,
    key_end,
    BLOCK_N: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """The KV tiles `[begin, end)` that `share` has of a row tile that sees the keys `[key_begin, key_end)`."""
    first_tile, tiles = tile_range(key_begin, key_end, BLOCK_N)
    tile_begin = split_begin(share, first_share, num_splits, begin, line, tiles, SCHEDULE)
    tile_end = split_begin(share + 1, first_share, num_splits, begin, line, tiles, SCHEDULE)
    return first_tile + tile_begin, first_tile + tile_end


@triton.jit
def partial_number(share, first_share, SCHEDULE: tl.constexpr):
    """Where the partial result of `share` for a row tile goes.

    A balanced share may hold the end of one row tile and the beginning of another.
    """
    if SCHEDULE.is_balanced:
        number = share + tl.where(share == first_share, SCHEDULE.num_shares, 0)
    else:
        number = share
    return SCHEDULE.first_partial + number
