"""Segments of dense attention: rows see keys of their own segment, and keys that no row sees are marked beforehand."""

import triton
import triton.language as tl

NO_SEGMENT = tl.constexpr(2**31 - 1)
PADDING_ROW = tl.constexpr(-2)  # unlike -1, as keys are marked that no row sees


@triton.jit
def hide_other_segments(scores, key_segments, row_segments):
    """-inf where a key `[N]` is of another segment than a row `[M]`; what is of none equals nothing."""
    return tl.where(row_segments[:, None] == key_segments[None, :], scores, float("-inf"))


@triton.jit
def load_row_segments(row_segment_ptr, rows, mask):
    """Segments of `rows` `[M]`, PADDING_ROW for those of none: they may hold NaN, so their every score is hidden."""
    segments = tl.load(row_segment_ptr + rows, mask=mask, other=-1)
    return tl.where(segments >= 0, segments, PADDING_ROW)


@triton.jit
def mark_segments_kernel(
    row_segment_ptr,  # [B, Q]
    key_segment_ptr,  # [B, K]
    seen_segment_ptr,  # [B, K]: the segment of a key, -1 where no row sees it
    lowest_ptr,  # [B, tiles of keys]: of the segments in a tile; NO_SEGMENT where no row sees any
    highest_ptr,  # [B, tiles of keys]: likewise; -1
    NUM_ROWS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    SCORING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For a tile of keys, whether any row of their batch row sees them, and the range of their segments.

    What no row sees may hold NaN, so it must never be loaded; what only other rows see may be.
    """
    key_tiles: tl.constexpr = (NUM_KEYS + BLOCK_N - 1) // BLOCK_N
    batch = (tl.program_id(0) // key_tiles).to(tl.int64)
    first_key = tl.program_id(0) % key_tiles * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    segments = tl.load(key_segment_ptr + batch * NUM_KEYS + keys, mask=keys < NUM_KEYS, other=-1)

    row_begin = first_key * 0
    row_end = first_key * 0 + NUM_ROWS
    if SCORING.window_right is not None:
        row_begin = tl.maximum(first_key - SCORING.window_right, 0)
    if SCORING.window_left is not None:
        row_end = tl.minimum(first_key + (BLOCK_N + SCORING.window_left), NUM_ROWS)
    sees_any = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.int1)
    for first_row in tl.range(row_begin, row_end, BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        row_segments = tl.load(row_segment_ptr + batch * NUM_ROWS + rows, mask=rows < NUM_ROWS, other=-1)
        visible = row_segments[:, None] == segments[None, :]
        if SCORING.window_right is not None:
            visible = visible & (keys[None, :] <= rows[:, None] + SCORING.window_right)
        if SCORING.window_left is not None:
            visible = visible & (keys[None, :] >= rows[:, None] - SCORING.window_left)
        sees_any = sees_any | visible

    is_seen = (tl.max(sees_any.to(tl.int32), 0) > 0) & (segments >= 0)
    tl.store(seen_segment_ptr + batch * NUM_KEYS + keys, tl.where(is_seen, segments, -1), mask=keys < NUM_KEYS)
    tl.store(lowest_ptr + tl.program_id(0), tl.min(tl.where(is_seen, segments, NO_SEGMENT)))
    tl.store(highest_ptr + tl.program_id(0), tl.max(tl.where(is_seen, segments, -1)))


@triton.jit
def tiles_of_segments(row_segments, lowest_ptr, highest_ptr, KEY_TILES: tl.constexpr, BLOCK: tl.constexpr):
    """The range of key tiles outside of which no key is of a segment of the rows `[M]`; empty where there is none.

    `lowest_ptr` and `highest_ptr` are a batch row's, `[KEY_TILES]`.
    """
    lowest_of_rows = tl.min(tl.where(row_segments >= 0, row_segments, NO_SEGMENT))
    highest_of_rows = tl.max(row_segments)
    first = tl.full([], KEY_TILES, tl.int32)
    last = tl.full([], -1, tl.int32)
    for start in range(0, KEY_TILES, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        lowest = tl.load(lowest_ptr + tiles, mask=tiles < KEY_TILES, other=NO_SEGMENT)
        highest = tl.load(highest_ptr + tiles, mask=tiles < KEY_TILES, other=-1)
        overlaps = (lowest <= highest_of_rows) & (highest >= lowest_of_rows)
        first = tl.minimum(first, tl.min(tl.where(overlaps, tiles, KEY_TILES)))
        last = tl.maximum(last, tl.max(tl.where(overlaps, tiles, -1)))
    return first, tl.maximum(last + 1, first)
