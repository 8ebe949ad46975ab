"""Launch configurations of the paged operations worth timing: variations of those that the heuristics choose."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from jax_bridge.configs import (
    PageAttentionConfig,
    PrefillPageAttentionConfig,
    RaggedDecodeAttentionConfig,
    UnifiedAttentionConfig,
)
from jax_bridge.device import Device
from jax_bridge.paged_heuristics import Classes, pipeline_bytes, ragged_tile, unified_attention_classes
from jax_bridge.tiles import MOST_WARPS, padded_head_dim
from jax_bridge.validation import PagedSizes


def heuristics_of_both_kernels(heuristics: Callable[..., Any], invocation: Any, device: Device) -> tuple[Any, ...]:
    """The configuration that an operation's heuristics choose, and if its warps are specialised the one without."""
    chosen_cfg = heuristics(invocation, device)
    return (chosen_cfg, heuristics(invocation, device, False)) if chosen_cfg.warp_specialized else (chosen_cfg,)


def page_attention_candidates(
    sizes: PagedSizes, cache_dtype: Any, heuristic: Any, device: Device
) -> tuple[PageAttentionConfig, ...]:
    """Configurations worth timing: variations of the heuristic one that fit the device's shared memory."""
    variations: tuple[dict[str, Any], ...] = (
        {},
        {"num_stages": 3, "programs_per_sm": 3},
        {"programs_per_sm": 3},
        {"num_warps": 2},
        {"block_m": max(16, heuristic.block_m), "num_warps": 2},
        {"block_n": 2 * heuristic.block_n, "programs_per_sm": 3},
        {"block_n": max(16, heuristic.block_n // 2)},
        {"skip_masks": not heuristic.skip_masks},
        {"num_splits": 1},
    )
    candidates = (dataclasses.replace(heuristic, **changes) for changes in variations)
    return _fitting(candidates, lambda cfg: _decode_bytes(sizes, cache_dtype, cfg), device)


def ragged_decode_attention_candidates(
    sizes: PagedSizes, cache_dtype: Any, heuristic: Any, device: Device
) -> tuple[RaggedDecodeAttentionConfig, ...]:
    """Configurations worth timing, as for page attention."""
    params = heuristic.fwd_params
    variations: tuple[dict[str, Any], ...] = (
        {},
        {"num_stages": params.num_stages + 1},
        {"num_stages": params.num_stages + 2},
        {"num_warps": 2},
        {"blocksize_heads": max(16, params.blocksize_heads)},
        {"blocksize_heads": max(16, params.blocksize_heads), "num_warps": 2},
        {"kv_blocksize": 2 * params.kv_blocksize},
        {"kv_blocksize": max(16, params.kv_blocksize // 2)},
        {"skip_masks": not params.skip_masks},
        {"num_key_splits": 1},
    )
    candidates = (
        dataclasses.replace(heuristic, fwd_params=dataclasses.replace(params, **changes)) for changes in variations
    )
    return _fitting(candidates, lambda cfg: _decode_bytes(sizes, cache_dtype, ragged_tile(cfg)), device)


def prefill_page_attention_candidates(
    sizes: PagedSizes, cache_dtype: Any, heuristic: Any, device: Device
) -> tuple[PrefillPageAttentionConfig, ...]:
    """Configurations worth timing, as for page attention."""
    candidates = (dataclasses.replace(heuristic, **changes) for changes in _prefill_variations(heuristic))
    return _fitting(candidates, lambda cfg: _tile_bytes(sizes, cache_dtype, cfg), device)


def unified_attention_candidates(
    sizes: PagedSizes, query_dtype: Any, cache_dtype: Any, heuristic: Any, device: Device
) -> tuple[UnifiedAttentionConfig, ...]:
    """Configurations worth timing, as for page attention: one of those that launch the same for this call."""
    variations: tuple[dict[str, Any], ...] = (*_prefill_variations(heuristic), {"seq_threshold_3d": 0})
    if heuristic.decode_block_n is not None:
        variations += (
            {"decode_num_stages": heuristic.decode_num_stages + 1},
            {"decode_block_n": 2 * heuristic.decode_block_n},
            {"decode_programs_per_sm": heuristic.decode_programs_per_sm + 1},
        )
    candidates = (dataclasses.replace(heuristic, **changes) for changes in variations)

    def shared_bytes(cfg: Any) -> int:
        if cfg.decode_block_n is None:
            return _tile_bytes(sizes, cache_dtype, cfg)
        decode = pipeline_bytes(sizes, cache_dtype, cfg.decode_block_n, cfg.decode_num_stages - 1)
        return max(decode, _tile_bytes(sizes, cache_dtype, cfg))

    by_classes: dict[Classes, UnifiedAttentionConfig] = {}
    for cfg in _fitting(candidates, shared_bytes, device):
        by_classes.setdefault(unified_attention_classes(cfg, sizes, query_dtype, device), cfg)
    return tuple(by_classes.values())


def _prefill_variations(heuristic: Any) -> tuple[dict[str, Any], ...]:
    if heuristic.warp_specialized:
        other_stages = 3 if heuristic.num_stages == 2 else 2
        return ({}, {"num_stages": other_stages}, {"block_n": 64}, {"block_n": 64, "num_stages": 4})
    wider = {"block_m": 2 * heuristic.block_m, "num_warps": min(MOST_WARPS, 2 * heuristic.num_warps)}
    wider["programs_per_sm"] = max(1, MOST_WARPS // wider["num_warps"])
    shorter = max(16, heuristic.block_n // 2)
    return (
        {},
        {"num_stages": heuristic.num_stages + 1},
        {"num_warps": 8},
        wider,
        {**wider, "block_n": shorter},
        {"block_m": max(16, heuristic.block_m // 2), "num_warps": 4},
        {"block_n": 2 * heuristic.block_n, "num_warps": 8},
        {"block_n": shorter},
    )


def _fitting[C](candidates: Iterable[C], shared_bytes: Callable[[C], int], device: Device) -> tuple[C, ...]:
    """Distinct candidates whose tiles fit the shared memory of a program."""
    return tuple(cfg for cfg in dict.fromkeys(candidates) if shared_bytes(cfg) <= device.shared_memory)


def _decode_bytes(sizes: PagedSizes, cache_dtype: Any, cfg: Any) -> int:
    return pipeline_bytes(sizes, cache_dtype, cfg.block_n, cfg.num_stages)


def _tile_bytes(sizes: PagedSizes, cache_dtype: Any, cfg: Any) -> int:
    """Shared memory of a prefill tile: its queries in 16 bits, and the K and V tiles in flight."""
    query_bytes = cfg.block_m * padded_head_dim(sizes.head_dim) * 2
    return query_bytes + pipeline_bytes(sizes, cache_dtype, cfg.block_n, cfg.num_stages + 1)
