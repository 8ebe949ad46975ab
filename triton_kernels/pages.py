"""From a page table to addresses: page ids one tile ahead, cache offsets in int64, any layout by strides."""

import triton
import triton.language as tl


@triton.jit
def clamp(value, low, high):
    """`value` brought into `[low, high]`."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def load_page_ids(table_ptr, start, key_begin, key_end, CACHE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the keys `[start, start + BLOCK_N)`: one id where a tile never leaves a page, else one for each key.

    `table_ptr` is a sequence's row `[MP]`. Only entries of keys in `[key_begin, key_end)` are read, and ids are clamped
    into the cache: the table is data. Without a table all keys lie in the page at which the cache's pointers stand.
    """
    if table_ptr is None:
        page_ids = tl.zeros([], tl.int32)
    elif CACHE.page_size % BLOCK_N == 0:
        page_ids = tl.load(table_ptr + start // CACHE.page_size, mask=start < key_end, other=0)
    else:
        keys = start + tl.arange(0, BLOCK_N)
        page_ids = tl.load(table_ptr + keys // CACHE.page_size, mask=(keys >= key_begin) & (keys < key_end), other=0)
    return clamp(page_ids, 0, CACHE.num_pages - 1)


@triton.jit
def key_offsets(
    page_ids,
    start,
    PAGE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Offsets `[BLOCK_N]` of a tile's keys in a cache, in elements."""
    lanes = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        slot = tl.cast(start % PAGE_SIZE, tl.int64)
        return page_ids.to(tl.int64) * PAGE_STRIDE + slot * TOKEN_STRIDE + lanes * TOKEN_STRIDE
    slots = ((start + lanes) % PAGE_SIZE).to(tl.int64)
    return page_ids.to(tl.int64) * PAGE_STRIDE + slots * TOKEN_STRIDE


@triton.jit
def load_tile(cache_ptr, offsets, in_range, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Cache rows `[BLOCK_N, BLOCK]` at `offsets` `[BLOCK_N]`; 0 for keys not `in_range` `[BLOCK_N]`."""
    dims = tl.arange(0, BLOCK)
    pointers = cache_ptr + offsets[:, None] + dims[None, :]
    if SIZE == BLOCK:
        tile = tl.load(pointers, mask=in_range[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=in_range[:, None] & (dims < SIZE)[None, :], other=0.0)
    return tile
