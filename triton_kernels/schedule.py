"""Work items decided on the device from the lengths, by every program for itself: no extra launch, no host sync.

A segment of `r` row tiles whose rows span `n` KV tiles becomes `r * ceil(n / quota)` items, the quota being what an
item takes at most. The quota depends on the batch as a whole, not on its order: all tiles over `capacity`, the items
that run at once, and then the value near it that wastes least of the last wave. It is never below half of that mean, so
there are at most `sum_i r_i + 2 * capacity` items, which bounds the partial results whatever the lengths are; an item
is found by a cumulative sum over the segments.
"""

import triton
import triton.language as tl

from triton_kernels.pages import clamp

LONGEST = 1 << 29


@triton.jit
def load_segments(segments, starts_ptr, lens_ptr, QUERIES: tl.constexpr, MAX_KEYS: tl.constexpr):
    """First token, number of tokens and number of keys of `segments`; zeros beyond the last.

    Padding has no keys. Starts and lengths are data: they are brought into the arrays.
    """
    if starts_ptr is None:
        first_token = segments
        num_tokens = tl.where(segments < QUERIES.num_segments, 1, 0)
        num_keys = tl.load(lens_ptr + segments, mask=segments < QUERIES.num_segments, other=0)
    else:
        is_sequence = (segments >= 1) & (segments <= QUERIES.num_seqs)
        first_token = tl.load(
            starts_ptr + segments - 1, mask=(segments >= 1) & (segments < QUERIES.num_segments), other=0
        )
        end_token = tl.load(starts_ptr + segments, mask=segments <= QUERIES.num_seqs, other=QUERIES.num_tokens)
        first_token = clamp(first_token, 0, QUERIES.num_tokens)
        num_tokens = clamp(end_token, first_token, QUERIES.num_tokens) - first_token
        num_tokens = tl.where(segments < QUERIES.num_segments, num_tokens, 0)
        num_keys = tl.load(lens_ptr + segments - 1, mask=is_sequence, other=0)
    return first_token, num_tokens, clamp(num_keys, 0, MAX_KEYS)


@triton.jit
def tile_range(key_begin, key_end, BLOCK_N: tl.constexpr):
    """First tile that holds a key of `[key_begin, key_end)`, and how many do."""
    first = key_begin // BLOCK_N
    return first, tl.where(key_end > key_begin, tl.cdiv(key_end, BLOCK_N) - first, 0)


@triton.jit
def count_tiles(
    num_tokens,
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
    if SCORING.window_left is None:
        key_begin = num_keys * 0
    else:
        key_begin = tl.maximum(num_keys - num_tokens - SCORING.window_left, 0)
    _, key_tiles = tile_range(key_begin, num_keys, TILE.block_n)
    return row_tiles, clamp(key_tiles, 1, SCHEDULE.most_tiles)


@triton.jit
def count_splits(key_tiles, quota, SCHEDULE: tl.constexpr):
    """Splits of a row tile that spans `key_tiles` tiles, never more than there are tiles."""
    if SCHEDULE.num_splits > 0:
        splits = tl.minimum(key_tiles, SCHEDULE.num_splits)
    else:
        splits = tl.cdiv(key_tiles, quota)
    return splits


@triton.jit
def tile_quota(
    starts_ptr,
    lens_ptr,
    QUERIES: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """KV tiles that an item holds at most, of eight candidates the one for which the batch should end first."""
    if SCHEDULE.num_splits > 0:
        return 1
    else:
        total = tl.zeros([SCHEDULE.block_s], tl.int64)  # lengths are data: even nonsense must not wrap round
        for start in range(0, QUERIES.num_segments, SCHEDULE.block_s):
            segments = start + tl.arange(0, SCHEDULE.block_s)
            _, num_tokens, num_keys = load_segments(segments, starts_ptr, lens_ptr, QUERIES, SCHEDULE.max_keys)
            row_tiles, key_tiles = count_tiles(num_tokens, num_keys, QUERIES, SCORING, TILE, SCHEDULE)
            total += row_tiles.to(tl.int64) * key_tiles
        mean = tl.minimum(tl.cdiv(tl.sum(total), SCHEDULE.capacity), SCHEDULE.most_tiles).to(tl.int32)
        ranks = tl.arange(0, 8)
        candidates = tl.maximum(tl.cdiv(mean * (11 - ranks), 8), SCHEDULE.min_tiles)  # 11/8 to 4/8 of the mean
        items = tl.zeros([8], tl.int32)
        for start in range(0, QUERIES.num_segments, SCHEDULE.block_s):
            segments = start + tl.arange(0, SCHEDULE.block_s)
            _, num_tokens, num_keys = load_segments(segments, starts_ptr, lens_ptr, QUERIES, SCHEDULE.max_keys)
            row_tiles, key_tiles = count_tiles(num_tokens, num_keys, QUERIES, SCORING, TILE, SCHEDULE)
            items += tl.sum(row_tiles[None, :] * tl.cdiv(key_tiles[None, :], candidates[:, None]), 1)
        waves = tl.cdiv(items, SCHEDULE.capacity)
        costs = waves * (candidates + SCHEDULE.program_cost)
        best = tl.min(costs * 8 + ranks) & 7
        return tl.sum(tl.where(ranks == best, candidates, 0))


@triton.jit
def split_begin(split, tiles, num_splits):
    """First tile of a split (of the one after the last: the end). The first splits take what does not divide."""
    return tiles // num_splits * split + tl.minimum(split, tiles % num_splits)


@triton.jit
def count_items(
    quota,
    starts_ptr,
    lens_ptr,
    QUERIES: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Number of work items of all segments; no more than there is room for, even if sequences claim the same rows."""
    items = tl.zeros([SCHEDULE.block_s], tl.int32)
    for start in range(0, QUERIES.num_segments, SCHEDULE.block_s):
        segments = start + tl.arange(0, SCHEDULE.block_s)
        _, num_tokens, num_keys = load_segments(segments, starts_ptr, lens_ptr, QUERIES, SCHEDULE.max_keys)
        row_tiles, key_tiles = count_tiles(num_tokens, num_keys, QUERIES, SCORING, TILE, SCHEDULE)
        items += row_tiles * count_splits(key_tiles, quota, SCHEDULE)
    return tl.minimum(tl.sum(items), SCHEDULE.most_items)


@triton.jit
def find_segment(
    index,
    quota,
    starts_ptr,
    lens_ptr,
    QUERIES: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
    OF_ITEM: tl.constexpr,
):
    """The segment of work item (or row tile) number `index`: the number of segments where there are fewer.

    Returns it, the numbers of items and of row tiles before it, and its first token, tokens and keys.
    """
    segment = tl.zeros([], tl.int32)
    items_before = tl.zeros([], tl.int32)
    tiles_before = tl.zeros([], tl.int32)
    first_token = tl.zeros([], tl.int32)
    num_tokens = tl.zeros([], tl.int32)
    num_keys = tl.zeros([], tl.int32)
    if starts_ptr is None and SCHEDULE.num_splits == 1:
        row_tiles: tl.constexpr = (QUERIES.group_size + TILE.block_m - 1) // TILE.block_m
        segment = index // row_tiles
        items_before = segment * row_tiles
        first_token, num_tokens, num_keys = load_segments(segment, starts_ptr, lens_ptr, QUERIES, SCHEDULE.max_keys)
    else:
        counted_items = tl.zeros([], tl.int32)
        counted_tiles = tl.zeros([], tl.int32)
        for start in range(0, QUERIES.num_segments, SCHEDULE.block_s):
            segments = start + tl.arange(0, SCHEDULE.block_s)
            first_tokens, tokens, keys = load_segments(segments, starts_ptr, lens_ptr, QUERIES, SCHEDULE.max_keys)
            row_tiles, key_tiles = count_tiles(tokens, keys, QUERIES, SCORING, TILE, SCHEDULE)
            items = row_tiles * count_splits(key_tiles, quota, SCHEDULE)
            end_items = counted_items + tl.cumsum(items, 0)
            ends = end_items
            begins = end_items - items
            if not OF_ITEM:
                ends = counted_tiles + tl.cumsum(row_tiles, 0)
                begins = ends - row_tiles
                counted_tiles = tl.max(ends)
            counted_items = tl.max(end_items)
            segment += tl.sum(((ends <= index) & (segments < QUERIES.num_segments)).to(tl.int32))
            is_found = (begins <= index) & (index < ends)
            items_before += tl.sum(tl.where(is_found, end_items - items, 0))
            tiles_before += tl.sum(tl.where(is_found, begins, 0))
            first_token += tl.sum(tl.where(is_found, first_tokens, 0))
            num_tokens += tl.sum(tl.where(is_found, tokens, 0))
            num_keys += tl.sum(tl.where(is_found, keys, 0))
    return segment, items_before, tiles_before, first_token, num_tokens, num_keys
