"""Dense attention: every query row of a batch row over the keys `[K]` beside it.

The query heads of a KV head are packed with the tokens as the rows of a tile. A program takes a tile of rows of one KV
head of one batch row and walks the keys that they see; it writes its rows, so nothing grows with `Q * K`.
"""

import triton
import triton.language as tl

from triton_kernels.attend import attend
from triton_kernels.online_softmax import store_rows
from triton_kernels.pages import clamp
from triton_kernels.rows import head_of_program, keys_of_rows, unpack_rows, visible_keys
from triton_kernels.schedule import tile_range
from triton_kernels.scores import load_score_scale
from triton_kernels.segments import load_row_segments, tiles_of_segments

SEGMENT_TILES = tl.constexpr(256)  # of keys, whose segments a program compares at once


@triton.jit
def dense_attention_kernel(
    q_ptr,  # [B, Q, Hq, D]
    k_ptr,  # [B, K, Hkv, D]
    v_ptr,  # [B, K, Hkv, Dv]
    lens_ptr,  # [B], or None: all keys
    row_segment_ptr,  # [B, Q] or None
    key_segment_ptr,  # [B, K], -1 for keys that no row sees; or None
    lowest_ptr,  # [B, tiles of keys] or None
    highest_ptr,  # [B, tiles of keys] or None
    sink_ptr,  # [Hq] or None
    out_ptr,  # [B, Q, Hq, Dv]
    QUERIES: tl.constexpr,
    CACHE: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
):
    """Attention of a tile of rows. The keys of a batch row are a page of `CACHE`, and there is no page table."""
    row_tiles: tl.constexpr = (QUERIES.num_tokens * QUERIES.group_size + TILE.block_m - 1) // TILE.block_m
    number, head = head_of_program(tl.program_id(0), row_tiles, QUERIES.num_seqs * QUERIES.num_kv_heads, HEADS_AT_ONCE)
    batch, kv_head = head // QUERIES.num_kv_heads, head % QUERIES.num_kv_heads
    first_row = (row_tiles - 1 - number) * TILE.block_m  # under a causal mask the last rows see most keys
    rows = first_row + tl.arange(0, TILE.block_m)
    tokens, heads, out_rows, row_mask = unpack_rows(rows, first_row, kv_head, QUERIES.num_tokens, QUERIES)
    # Pointers move to the tile's first token in 64 bits, so that 32 are enough for each row.
    first_token = first_row // QUERIES.group_size
    tile_row = (batch.to(tl.int64) * QUERIES.num_tokens + first_token) * QUERIES.num_q_heads
    dims = tl.arange(0, TILE.block_d)
    q = tl.load(
        q_ptr + tile_row * CACHE.head_dim + out_rows[:, None] * CACHE.head_dim + dims[None, :],
        mask=row_mask[:, None] & (dims < CACHE.head_dim)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]

    num_keys = first_row * 0 + NUM_KEYS
    if lens_ptr is not None:
        num_keys = clamp(tl.load(lens_ptr + batch), 0, NUM_KEYS)
    key_begin, key_end, whole_begin, whole_end = visible_keys(
        first_row, TILE.block_m, 0, QUERIES.num_tokens, num_keys, QUERIES, SCORING
    )
    row_begin, row_end = keys_of_rows(tokens, num_keys, SCORING)
    first_tile, num_tiles = tile_range(key_begin, key_end, TILE.block_n)
    end_tile = first_tile + num_tiles
    row_segments = None
    if key_segment_ptr is not None:
        key_tiles: tl.constexpr = (NUM_KEYS + TILE.block_n - 1) // TILE.block_n
        row_segments = load_row_segments(row_segment_ptr + batch.to(tl.int64) * QUERIES.num_tokens, tokens, row_mask)
        first_of_segments, end_of_segments = tiles_of_segments(
            row_segments, lowest_ptr + batch * key_tiles, highest_ptr + batch * key_tiles, key_tiles, SEGMENT_TILES
        )
        first_tile = tl.maximum(first_tile, first_of_segments)
        end_tile = tl.minimum(end_tile, end_of_segments)
        key_segment_ptr += batch.to(tl.int64) * NUM_KEYS

    row_max, row_sum, acc = attend(
        q,
        first_tile * TILE.block_n,
        end_tile * TILE.block_n,
        k_ptr + batch.to(tl.int64) * CACHE.k_page_stride + kv_head * CACHE.k_head_stride,
        v_ptr + batch.to(tl.int64) * CACHE.v_page_stride + kv_head * CACHE.v_head_stride,
        None,
        key_begin,
        key_end,
        whole_begin,
        whole_end,
        row_begin,
        row_end,
        tokens,
        0,
        None,
        None,
        load_score_scale(None, kv_head, 0, SCORING),
        CACHE,
        SCORING,
        TILE,
        row_segments,
        key_segment_ptr,
    )
    store_rows(
        row_max,
        row_sum,
        acc,
        out_rows,
        heads,
        row_mask,
        tl.arange(0, TILE.block_dv),
        sink_ptr,
        None,
        out_ptr + tile_row * CACHE.value_head_dim,
        None,
        0,
        QUERIES.group_size,
        CACHE.value_head_dim,
    )
