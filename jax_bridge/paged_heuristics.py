"""Launch configurations of the paged operations, from static shapes and the device alone.

Measured on an H100 (docs/performance.md). Where decoding has a multiprocessor to itself, many programs with one tile in
flight each are best; beside prefilling it has one program, with a deeper pipeline.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_bridge import hopper_launch
from jax_bridge.configs import (
    FwdParams,
    PageAttentionConfig,
    PrefillPageAttentionConfig,
    RaggedDecodeAttentionConfig,
    UnifiedAttentionConfig,
    chosen,
)
from jax_bridge.device import Device
from jax_bridge.paged_launch import RowClass
from jax_bridge.tiles import next_power_of_two, padded_head_dim, widest_head
from jax_bridge.validation import PagedSizes

Classes = tuple[RowClass, ...]

_MOST_DECODE_ROWS = 64  # rows of a decode tile
_SPECULATIVE_TOKENS = 4  # tokens a sequence that a decode tile beside prefill tiles makes room for
_SHORT_TOKENS = 16  # tokens a sequence below which most of a batch is decoding, one token or a few at a time
_SPECIALIZED_ROWS = 256  # of a single sequence: with fewer the other programs begin and end sooner
_SPECIALIZED_TOKENS = 8  # tokens a sequence from which programs with specialised warps take a batch
_FULL_WAVES = 3  # programs a multiprocessor that large prefill tiles must make: fewer leave it idle at the end
_LONG_ROWS = 512  # rows a sequence that make the larger prefill tile better also where its keys will be split
_SHARES_PER_PROGRAM = 3  # of decoding beside prefilling: how evenly both end
_SHARES_BESIDE_OTHERS = 2  # of a program with specialised warps, likewise
_MIN_DECODE_TILES = 2  # of keys in a split
_SHORT_TILES = 8  # of keys, of sequences that are not divided where there are about as many as programs
_SIDE_BYTES = 20 << 10  # of shared memory that a decode loop takes beside its tiles, with every feature
_PREFILL_SIDE_BYTES = 2 << 10  # likewise of a prefill loop, beside its weights
_MIN_PREFILL_TILES = 16  # of keys in a split: fewer are not worth writing partial results of many rows
_MIN_SPECIALIZED_TILES = 4  # likewise, of tiles that are twice as long


@dataclasses.dataclass(frozen=True)
class TileShape:
    """Rows, keys, warps and pipeline depth of a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def is_full_precision(dtype: Any) -> bool:
    """Whether dot products are of float32: they run on FMA units, out of registers, and so in small tiles."""
    return np.dtype(dtype).itemsize == 4


def pipeline_bytes(sizes: PagedSizes, cache_dtype: Any, block_n: int, num_stages: int) -> int:
    """Shared memory of the K and V tiles in flight."""
    widths = padded_head_dim(sizes.head_dim) + padded_head_dim(sizes.value_head_dim)
    return block_n * widths * np.dtype(cache_dtype).itemsize * max(1, num_stages - 1)


def decode_tile(sizes: PagedSizes, rows: int, query_dtype: Any, cache_dtype: Any, device: Device) -> TileShape:
    """The tile for sequences of up to `rows` rows."""
    widest = widest_head(sizes)
    if is_full_precision(query_dtype):
        block_m, block_n, num_warps = 16, max(16, min(32, 4096 // widest)), 4
    else:
        block_m = min(_MOST_DECODE_ROWS, max(8, next_power_of_two(rows)))
        block_n = 64 if widest <= 128 else 32
        num_warps = 4 if widest <= 256 else 8
    num_stages = 2
    while num_stages > 1 and pipeline_bytes(sizes, cache_dtype, block_n, num_stages) > device.shared_memory // 2:
        num_stages -= 1
    return TileShape(block_m, block_n, num_warps, num_stages)


def _decode_programs_per_sm(tile: TileShape) -> int:
    """As many as the registers of a decode tile let run at once."""
    return {8: 4, 16: 3, 32: 3}.get(tile.block_m, 2)


def _min_decode_tiles(sizes: PagedSizes, tile: TileShape, device: Device) -> int:
    """Tiles of a split: all that a table has room for, where many sequences are short: none waits long for another."""
    programs = device.num_sms * _decode_programs_per_sm(tile)
    fills_device = 4 * min(sizes.num_seqs, sizes.num_tokens) * sizes.num_kv_heads >= 3 * programs
    is_short = sizes.table_width * sizes.page_size <= _SHORT_TILES * tile.block_n
    return _SHORT_TILES if fills_device and is_short else _MIN_DECODE_TILES


def _prefill_programs_per_sm(sizes: PagedSizes) -> int:
    """As many as the registers of a prefill tile let run at once: two hide each other's waits, even if some spill."""
    return 2 if widest_head(sizes) <= 128 else 1


def prefill_tile(sizes: PagedSizes, cache_dtype: Any, device: Device) -> TileShape:
    """The tile for sequences of many rows, in 16-bit precision."""
    widest = widest_head(sizes)
    rows = sizes.num_tokens * sizes.group_size
    if widest <= 128:
        programs = rows // 128 * sizes.num_kv_heads
        fills_device = programs >= _FULL_WAVES * device.num_sms
        is_long_chunk = rows >= _LONG_ROWS * sizes.num_seqs and programs <= device.num_sms
        is_speculative = sizes.num_seqs > 1 and not _overlaps(sizes)
        if is_speculative:  # leaves shared memory for as many programs as decode tiles want
            tile = TileShape(64, 32, 4, 2)
        else:
            tile = TileShape(128, 64, 8, 3) if fills_device or is_long_chunk else TileShape(64, 64, 4, 2)
    elif widest <= 256:
        tile = TileShape(128, 32, 8, 2)
    else:
        tile = TileShape(64, 32, 8, 2)
    if widest <= 128 and device.shared_memory < _prefill_bytes(tile, sizes, cache_dtype):
        tile = TileShape(64, min(64, tile.block_n), 4, 2)
    while tile.num_stages > 1 and device.shared_memory < _prefill_bytes(tile, sizes, cache_dtype):
        tile = dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    return _narrowed(tile, sizes, cache_dtype, device)


def _prefill_bytes(tile: TileShape, sizes: PagedSizes, cache_dtype: Any) -> int:
    """Shared memory of a prefill tile in 16 bits: queries, the K and V tiles in flight, and weights with every feature.

    Three stages are two tiles in flight, one of page ids; so are two, where products run asynchronously.
    """
    queries = tile.block_m * padded_head_dim(sizes.head_dim) * 2
    keys = pipeline_bytes(sizes, cache_dtype, tile.block_n, min(3, tile.num_stages + 1))
    return queries + keys + tile.block_m * tile.block_n * 2 + _PREFILL_SIDE_BYTES


def _narrowed(tile: TileShape, sizes: PagedSizes, cache_dtype: Any, device: Device) -> TileShape:
    """`tile` with as many rows as fit without a pipeline, where K and V take turns in shared memory."""
    row_bytes = (padded_head_dim(sizes.head_dim) + tile.block_n) * 2
    key_bytes = tile.block_n * widest_head(sizes) * np.dtype(cache_dtype).itemsize + _PREFILL_SIDE_BYTES
    while tile.block_m > 16 and tile.block_m * row_bytes + key_bytes > device.shared_memory:
        tile = dataclasses.replace(tile, block_m=tile.block_m // 2)
    return tile


def _deep_stages(tile: TileShape, sizes: PagedSizes, cache_dtype: Any, device: Device) -> int:
    """Stages of decoding beside prefilling: five, or as many as fit; one of them holds page ids."""
    num_stages = 5
    while num_stages > 1 and device.shared_memory < _SIDE_BYTES + pipeline_bytes(
        sizes, cache_dtype, tile.block_n, num_stages - 1
    ):
        num_stages -= 1
    return num_stages


def page_attention_config(sizes: PagedSizes, query_dtype: Any, cache_dtype: Any, device: Device) -> PageAttentionConfig:
    """Tile shape and split target of page attention."""
    tile = decode_tile(sizes, sizes.group_size, query_dtype, cache_dtype, device)
    return PageAttentionConfig(
        **dataclasses.asdict(tile),
        programs_per_sm=_decode_programs_per_sm(tile),
        min_tiles_per_split=_min_decode_tiles(sizes, tile, device),
        skip_masks=False,
    )


def page_attention_classes(cfg: PageAttentionConfig) -> Classes:
    """How page attention runs every sequence; a `num_splits` that is open balances the batch."""
    return (_row_class(cfg, num_splits=cfg.num_splits or 0),)


def ragged_decode_attention_config(
    sizes: PagedSizes, query_dtype: Any, cache_dtype: Any, device: Device
) -> RaggedDecodeAttentionConfig:
    """Tile shape of ragged decode attention, as for page attention."""
    tile = decode_tile(sizes, sizes.group_size, query_dtype, cache_dtype, device)
    return RaggedDecodeAttentionConfig(
        FwdParams(
            blocksize_heads=tile.block_m,
            kv_blocksize=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            skip_masks=False,
        )
    )


def ragged_decode_attention_classes(cfg: RaggedDecodeAttentionConfig) -> Classes:
    """How ragged decode attention runs every row; a `num_key_splits` that is open balances the batch."""
    tile, params = ragged_tile(cfg), _params(cfg)
    rows = RowClass(
        **dataclasses.asdict(tile),
        skip_masks=bool(params.skip_masks),
        programs_per_sm=_decode_programs_per_sm(tile),
        min_tiles=_MIN_DECODE_TILES,
        num_splits=params.num_key_splits or 0,
    )
    return (rows,)


def _params(cfg: RaggedDecodeAttentionConfig) -> FwdParams:
    if cfg.fwd_params is None:
        raise TypeError("a configuration has open fields, expected every field to be chosen")
    return cfg.fwd_params


def ragged_tile(cfg: RaggedDecodeAttentionConfig) -> TileShape:
    """The tile of a complete configuration of ragged decode attention."""
    params = _params(cfg)
    return TileShape(
        block_m=chosen(params.blocksize_heads),
        block_n=chosen(params.kv_blocksize),
        num_warps=chosen(params.num_warps),
        num_stages=chosen(params.num_stages),
    )


def _specialized_fields(sizes: PagedSizes) -> dict[str, Any]:
    """Prefill tiles of programs with specialised warps, of which a multiprocessor holds one."""
    return {
        "block_m": hopper_launch.TILE_ROWS,
        "block_n": hopper_launch.block_n(sizes),
        "num_stages": hopper_launch.num_stages(sizes),
        "programs_per_sm": 1,
        "skip_masks": True,
        "warp_specialized": True,
    }


def prefill_page_attention_config(
    sizes: PagedSizes, query_dtype: Any, cache_dtype: Any, device: Device, *, warp_specialized: bool = False
) -> PrefillPageAttentionConfig:
    """Tile shape and split target of a chunk: a decode tile for a few rows, else a prefill tile."""
    rows = sizes.num_tokens * sizes.group_size
    if warp_specialized:
        return PrefillPageAttentionConfig(
            **_specialized_fields(sizes),
            num_warps=hopper_launch.COMPUTING_WARPS,
            min_tiles_per_split=_MIN_SPECIALIZED_TILES,
        )
    if rows <= _MOST_DECODE_ROWS or is_full_precision(query_dtype):
        tile = decode_tile(sizes, rows, query_dtype, cache_dtype, device)
        return PrefillPageAttentionConfig(
            **dataclasses.asdict(tile),
            programs_per_sm=_decode_programs_per_sm(tile),
            min_tiles_per_split=_MIN_DECODE_TILES,
            skip_masks=False,
            warp_specialized=False,
        )
    tile = prefill_tile(sizes, cache_dtype, device)
    return PrefillPageAttentionConfig(
        **dataclasses.asdict(tile),
        programs_per_sm=_prefill_programs_per_sm(sizes),
        min_tiles_per_split=_MIN_PREFILL_TILES,
        skip_masks=True,
        warp_specialized=False,
    )


def prefill_page_attention_classes(cfg: PrefillPageAttentionConfig, sizes: PagedSizes, device: Device) -> Classes:
    """How a chunk runs: its keys are divided where its row tiles alone would not fill the device."""
    rows = _row_class(cfg, num_splits=cfg.num_splits or 0)
    return (_undivided_if_full(rows, sizes, sizes.num_tokens * sizes.group_size, device),)


def _row_class(cfg: Any, *, num_splits: int) -> RowClass:
    return RowClass(
        block_m=cfg.block_m,
        block_n=cfg.block_n,
        num_warps=cfg.num_warps,
        num_stages=cfg.num_stages,
        skip_masks=cfg.skip_masks,
        programs_per_sm=cfg.programs_per_sm,
        min_tiles=cfg.min_tiles_per_split,
        num_splits=num_splits,
        warp_specialized=getattr(cfg, "warp_specialized", False),
    )


def specializes_warps(arrays: Mapping[str, Any], sizes: PagedSizes, device: Device) -> bool:
    """Whether programs with specialised warps can do a call, and are faster, if as many rows prefill as may."""
    rows = sizes.num_tokens * sizes.group_size
    if sizes.num_seqs == 1:
        is_worth_it = rows >= _SPECIALIZED_ROWS
    else:
        row_tiles = rows // hopper_launch.TILE_ROWS * sizes.num_kv_heads
        is_worth_it = sizes.num_tokens >= _SPECIALIZED_TOKENS * sizes.num_seqs and 2 * row_tiles >= device.num_sms
    return is_worth_it and not only_decodes(sizes) and hopper_launch.lacks(arrays, sizes, device) is None


def configuration(
    choose: Callable[..., Any], invocation: Any, device: Device, warp_specialized: bool | None = None
) -> Any:
    """What `choose` makes of a call, with specialised warps where these are faster, or as is demanded."""
    arrays, sizes = invocation.arrays, invocation.sizes
    if warp_specialized is None:
        warp_specialized = specializes_warps(arrays, sizes, device)
    query_dtype, cache_dtype = hopper_launch.queries_of(arrays).dtype, arrays["key_cache"].dtype
    return choose(sizes, query_dtype, cache_dtype, device, warp_specialized=warp_specialized)


def unified_attention_config(
    sizes: PagedSizes, query_dtype: Any, cache_dtype: Any, device: Device, *, warp_specialized: bool = False
) -> UnifiedAttentionConfig:
    """Both tile shapes of unified attention, and its split target."""
    decode_only = _is_decode_only(sizes, query_dtype)
    overlaps = not decode_only and not warp_specialized and _overlaps(sizes)
    wide = not decode_only and _prefill_programs_per_sm(sizes) == 1
    tokens = math.ceil(sizes.num_tokens / max(1, sizes.num_seqs))
    if not decode_only:
        tokens = _SPECULATIVE_TOKENS if overlaps or warp_specialized else max(tokens, _SPECULATIVE_TOKENS)
    decode = decode_tile(sizes, tokens * sizes.group_size, query_dtype, cache_dtype, device)
    if warp_specialized and not decode_only:
        return UnifiedAttentionConfig(
            **_specialized_fields(sizes),
            num_warps=hopper_launch.COMPUTING_WARPS,
            decode_block_m=decode.block_m,
            min_tiles_per_split=_MIN_SPECIALIZED_TILES,
        )
    prefill = prefill_tile(sizes, cache_dtype, device)
    return UnifiedAttentionConfig(
        num_warps=decode.num_warps if decode_only else prefill.num_warps,
        num_stages=prefill.num_stages,
        block_m=prefill.block_m,
        block_n=prefill.block_n,
        skip_masks=True,
        decode_block_m=decode.block_m,
        decode_block_n=decode.block_n,
        decode_num_stages=_deep_stages(decode, sizes, cache_dtype, device) if overlaps else decode.num_stages,
        programs_per_sm=_prefill_programs_per_sm(sizes),
        decode_programs_per_sm=1 if overlaps or wide else _decode_programs_per_sm(decode),
        min_tiles_per_split=_min_decode_tiles(sizes, decode, device) if decode_only else _MIN_DECODE_TILES,
        warp_specialized=warp_specialized,
    )


def unified_attention_classes(
    cfg: UnifiedAttentionConfig, sizes: PagedSizes, query_dtype: Any, device: Device
) -> Classes:
    """How unified attention runs its sequences: as decoding, as prefilling, or each as one of the two.

    Where there are no more tokens than sequences, or few of a single one, everything is decoding, which is right for
    any number of tokens; a single sequence of many tokens is prefilling. Otherwise both kinds share a launch: where
    there is room for much prefilling, decoding takes a part of each multiprocessor, to wait for memory while the rest
    computes; where there is not, it takes all of it first. Programs with specialised warps take a multiprocessor each,
    and do both kinds.
    """
    num_splits = cfg.num_par_softmax_segments or 0
    if cfg.seq_threshold_3d is not None and sizes.num_seqs > cfg.seq_threshold_3d:
        num_splits = 1
    num_rows = sizes.num_tokens * sizes.group_size
    decode_only = _is_decode_only(sizes, query_dtype)
    prefill = RowClass(
        block_m=chosen(cfg.block_m),
        block_n=chosen(cfg.block_n),
        num_warps=chosen(cfg.num_warps),
        num_stages=chosen(cfg.num_stages),
        skip_masks=bool(cfg.skip_masks),
        programs_per_sm=chosen(cfg.programs_per_sm),
        min_tiles=_MIN_SPECIALIZED_TILES if cfg.warp_specialized else _MIN_PREFILL_TILES,
        num_splits=num_splits,
        warp_specialized=bool(cfg.warp_specialized) and not decode_only,
    )
    if sizes.num_seqs == 1 and not decode_only:
        return (_undivided_if_full(prefill, sizes, num_rows, device),)
    most_decode_rows = chosen(cfg.decode_block_m)
    prefill = _undivided_if_full(prefill, sizes, num_rows - sizes.num_seqs * most_decode_rows, device)
    prefill = dataclasses.replace(prefill, fewest_rows=most_decode_rows + 1)
    if prefill.warp_specialized:
        prefill = dataclasses.replace(prefill, shares_per_program=_SHARES_BESIDE_OTHERS, even_splits=True)
        decode = dataclasses.replace(
            prefill,
            block_m=most_decode_rows,
            skip_masks=False,
            min_tiles=chosen(cfg.min_tiles_per_split),
            num_splits=num_splits,
            fewest_rows=1,
            most_rows=most_decode_rows,
        )
        return decode, prefill
    decode = RowClass(
        block_m=chosen(cfg.decode_block_m),
        block_n=chosen(cfg.decode_block_n),
        num_warps=chosen(cfg.num_warps),
        num_stages=chosen(cfg.decode_num_stages),
        skip_masks=False,
        programs_per_sm=chosen(cfg.decode_programs_per_sm),
        min_tiles=chosen(cfg.min_tiles_per_split),
        num_splits=num_splits,
    )
    if sizes.num_tokens <= sizes.num_seqs:
        return (decode,)
    if decode_only:
        return (_undivided_if_full(decode, sizes, num_rows, device),)
    decode = dataclasses.replace(decode, most_rows=decode.block_m)
    if _overlaps(sizes):
        return dataclasses.replace(decode, shares_per_program=_SHARES_PER_PROGRAM), prefill
    return decode, dataclasses.replace(prefill, num_splits=prefill.num_splits or 1)


def _overlaps(sizes: PagedSizes) -> bool:
    """Whether enough of a batch may be prefilling for decoding programs to leave room for it at once."""
    return sizes.num_tokens >= _SHORT_TOKENS * sizes.num_seqs


def only_decodes(sizes: PagedSizes) -> bool:
    """Whether all sequences of unified attention are decoding, going by how many tokens and sequences there are."""
    num_seqs = max(1, sizes.num_seqs)
    few_rows = num_seqs == 1 and sizes.num_tokens * sizes.group_size <= _MOST_DECODE_ROWS
    return sizes.num_tokens <= num_seqs or few_rows


def _is_decode_only(sizes: PagedSizes, query_dtype: Any) -> bool:
    """Whether unified attention runs all sequences as decoding."""
    return only_decodes(sizes) or is_full_precision(query_dtype)


def _undivided_if_full(rows: RowClass, sizes: PagedSizes, num_rows: int, device: Device) -> RowClass:
    """`rows` without splits, if these are left to the balance and `num_rows` rows occupy all programs."""
    programs = num_rows // rows.block_m * sizes.num_kv_heads
    if rows.num_splits or programs < device.num_sms * rows.programs_per_sm:
        return rows
    return dataclasses.replace(rows, num_splits=1)
