"""Split counts decided on the device from the lengths, by every program for itself: no extra launch, no host sync.

A sequence of `n` KV tiles is cut into `ceil(n / quota)` splits of nearly equal size, the quota being what a program
takes at most. The quota depends on the lengths as a whole, not on their order: all tiles over `capacity`, the programs
that run at once, and then the value near it that wastes least of the last wave of programs. It is never below half of
that mean, so `sum_i splits_i <= S + 2 * capacity`, which bounds the partial results whatever the lengths are; a work
item is found by a cumulative sum over the sequences.
"""

import triton
import triton.language as tl

from triton_kernels.pages import clamp

MOST_TILES = tl.constexpr(1 << 25)  # of a sequence: LONGEST keys in the smallest tiles
LONGEST = 1 << 29


@triton.jit
def visible_keys(length, MAX_KEYS: tl.constexpr, WINDOW_LEFT: tl.constexpr):
    """Keys `[begin, end)` that the last token of a sequence sees."""
    end = clamp(length, 0, MAX_KEYS)
    if WINDOW_LEFT is None:
        begin = end * 0
    else:
        begin = tl.maximum(end - 1 - WINDOW_LEFT, 0)
    return begin, end


@triton.jit
def tile_range(key_begin, key_end, BLOCK_N: tl.constexpr):
    """First tile that holds a key of `[key_begin, key_end)`, and how many do."""
    first = key_begin // BLOCK_N
    return first, tl.where(key_end > key_begin, tl.cdiv(key_end, BLOCK_N) - first, 0)


@triton.jit
def count_tiles(lens_ptr, sequences, SCHEDULE: tl.constexpr, WINDOW_LEFT: tl.constexpr, BLOCK_N: tl.constexpr):
    """KV tiles of each of `sequences`, 0 beyond the last."""
    lengths = tl.load(lens_ptr + sequences, mask=sequences < SCHEDULE.num_seqs, other=0)
    key_begin, key_end = visible_keys(lengths, SCHEDULE.max_keys, WINDOW_LEFT)
    _, tiles = tile_range(key_begin, key_end, BLOCK_N)
    return tiles


@triton.jit
def tile_quota(lens_ptr, SCHEDULE: tl.constexpr, WINDOW_LEFT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles that a split holds at most, of eight candidates the one for which the batch should end first."""
    total = tl.zeros([SCHEDULE.block_s], tl.int64)  # lengths are data: even nonsense must not wrap round
    for start in range(0, SCHEDULE.num_seqs, SCHEDULE.block_s):
        total += count_tiles(lens_ptr, start + tl.arange(0, SCHEDULE.block_s), SCHEDULE, WINDOW_LEFT, BLOCK_N)
    mean = tl.minimum(tl.cdiv(tl.sum(total), SCHEDULE.capacity), MOST_TILES).to(tl.int32)
    ranks = tl.arange(0, 8)
    candidates = tl.maximum(tl.cdiv(mean * (11 - ranks), 8), SCHEDULE.min_tiles)  # 11/8 to 4/8 of the mean
    items = tl.zeros([8], tl.int32)
    for start in range(0, SCHEDULE.num_seqs, SCHEDULE.block_s):
        tiles = count_tiles(lens_ptr, start + tl.arange(0, SCHEDULE.block_s), SCHEDULE, WINDOW_LEFT, BLOCK_N)
        items += tl.sum(tl.cdiv(tiles[None, :], candidates[:, None]), 1)
    waves = tl.cdiv(items, SCHEDULE.capacity)
    costs = waves * (candidates + SCHEDULE.program_cost)
    best = tl.min(costs * 8 + ranks) & 7
    return tl.sum(tl.where(ranks == best, candidates, 0))


@triton.jit
def count_splits(tiles, quota, SCHEDULE: tl.constexpr):
    """Splits of a sequence of `tiles` tiles, never more than there are tiles."""
    if SCHEDULE.num_splits > 0:
        splits = tl.minimum(tiles, SCHEDULE.num_splits)
    else:
        splits = tl.cdiv(tiles, quota)
    return splits


@triton.jit
def split_begin(split, tiles, num_splits):
    """First tile of a split (of the one after the last: the end). The first splits take what does not divide."""
    return tiles // num_splits * split + tl.minimum(split, tiles % num_splits)


@triton.jit
def find_item(item, lens_ptr, quota, SCHEDULE: tl.constexpr, WINDOW_LEFT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sequence that work item `item` belongs to and the number of items before that sequence's."""
    sequence = tl.zeros([], tl.int32)
    items_before = tl.zeros([], tl.int32)
    counted = tl.zeros([], tl.int32)
    for start in range(0, SCHEDULE.num_seqs, SCHEDULE.block_s):
        sequences = start + tl.arange(0, SCHEDULE.block_s)
        tiles = count_tiles(lens_ptr, sequences, SCHEDULE, WINDOW_LEFT, BLOCK_N)
        end_items = counted + tl.cumsum(count_splits(tiles, quota, SCHEDULE), 0)
        passed = (end_items <= item) & (sequences < SCHEDULE.num_seqs)
        sequence += tl.sum(passed.to(tl.int32))
        items_before = tl.maximum(items_before, tl.max(tl.where(passed, end_items, 0)))
        counted = tl.max(end_items)
    return sequence, items_before


@triton.jit
def items_before_sequence(
    sequence, lens_ptr, quota, SCHEDULE: tl.constexpr, WINDOW_LEFT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Number of work items of all sequences before `sequence`."""
    items = tl.zeros([SCHEDULE.block_s], tl.int32)
    for start in range(0, SCHEDULE.num_seqs, SCHEDULE.block_s):
        sequences = start + tl.arange(0, SCHEDULE.block_s)
        tiles = count_tiles(lens_ptr, sequences, SCHEDULE, WINDOW_LEFT, BLOCK_N)
        items += tl.where(sequences < sequence, count_splits(tiles, quota, SCHEDULE), 0)
    return tl.sum(items)
