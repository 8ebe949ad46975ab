"""Launches of the paged Triton kernels: specialisations, tile heuristics, grids and partial results."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bridge.configs import PageAttentionConfig
from jax_bridge.device import Device, current_device
from jax_bridge.launch import Output, interpreting, kernels, launch
from jax_bridge.layouts import cache_strides
from jax_bridge.validation import PagedSizes

Arrays = Mapping[str, Any]  # an operation's arguments by name, None where absent

_MAX_HEAD_DIM = 512
_MAX_BLOCK_S = 1024  # sequences that a program counts at once in its schedule
_MAX_REDUCE_ELEMENTS = 8192  # float32 partials that a reducing program holds: 64 registers a thread


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile's head axis: a power of two, and no less than a dot product takes."""
    return max(16, next_power_of_two(head_dim))


def paged_cache(sizes: PagedSizes, kv_layout: str, key_shape: tuple[int, ...], value_shape: tuple[int, ...]) -> Any:
    """`triton_kernels.specialization.PagedCache` of a pair of caches."""
    k_strides, v_strides = cache_strides(kv_layout, key_shape), cache_strides(kv_layout, value_shape)
    return kernels("specialization").PagedCache(
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        table_width=sizes.table_width,
        head_dim=sizes.head_dim,
        value_head_dim=sizes.value_head_dim,
        k_page_stride=k_strides.page,
        k_token_stride=k_strides.token,
        k_head_stride=k_strides.head,
        v_page_stride=v_strides.page,
        v_token_stride=v_strides.token,
        v_head_stride=v_strides.head,
    )


def lacks(sizes: PagedSizes, cache_dtype: Any) -> str | None:
    """Words for what the paged kernels cannot do on the current device, or None."""
    if max(sizes.head_dim, sizes.value_head_dim) > _MAX_HEAD_DIM:
        return f"head dims above {_MAX_HEAD_DIM} (here {max(sizes.head_dim, sizes.value_head_dim)})"
    if cache_dtype == jnp.float8_e4m3fn and not interpreting() and current_device().compute_capability < 89:
        return "float8_e4m3fn caches before compute capability 8.9"
    return None


def page_attention_config(sizes: PagedSizes, query_dtype: Any, cache_dtype: Any, device: Device) -> PageAttentionConfig:
    """Tile shape and split target of page attention, from static shapes and the device alone.

    Measured on an H100 (docs/performance.md): many programs with one tile in flight each beat fewer with deeper
    pipelines; a loop of its own for unmasked tiles saves nothing where memory decides, and its code makes some tiles
    spill registers.
    """
    block_d, block_dv = padded_head_dim(sizes.head_dim), padded_head_dim(sizes.value_head_dim)
    widest = max(block_d, block_dv)
    if np.dtype(query_dtype).itemsize == 4:  # IEEE dot products run on FMA units, out of registers
        block_m, block_n, num_warps = 16, max(16, min(32, 4096 // widest)), 4
    else:
        block_m = min(64, max(8, next_power_of_two(sizes.group_size)))
        block_n = 64 if widest <= 128 else 32
        num_warps = 4 if widest <= 256 else 8
    num_stages = 2
    while num_stages > 1 and _pipeline_bytes(sizes, cache_dtype, block_n, num_stages) > device.shared_memory // 2:
        num_stages -= 1
    return PageAttentionConfig(
        num_warps=num_warps,
        num_stages=num_stages,
        block_m=block_m,
        block_n=block_n,
        programs_per_sm=4,
        min_tiles_per_split=2,
        bulk_loop=False,
    )


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
        {"bulk_loop": not heuristic.bulk_loop},
        {"num_splits": 1},
    )
    candidates = dict.fromkeys(dataclasses.replace(heuristic, **changes) for changes in variations)
    return tuple(
        cfg
        for cfg in candidates
        if _pipeline_bytes(sizes, cache_dtype, cfg.block_n, cfg.num_stages) <= device.shared_memory
    )


def _pipeline_bytes(sizes: PagedSizes, cache_dtype: Any, block_n: int, num_stages: int) -> int:
    """Shared memory of the K and V tiles in flight."""
    widths = padded_head_dim(sizes.head_dim) + padded_head_dim(sizes.value_head_dim)
    return block_n * widths * np.dtype(cache_dtype).itemsize * max(1, num_stages - 1)


def page_attention(
    arrays: Arrays, sizes: PagedSizes, options: Any, config: Any, device: Device
) -> tuple[jax.Array, jax.Array | None]:
    """Launches page attention v1, or v2 and its reduction.

    Args:
        arrays: The operation's arrays by name, validated.
        sizes: Their sizes.
        options: Static arguments: softmax_scale, soft_cap, window, kv_layout, return_lse, num_splits, max_context_len.
        config: Every field chosen, `num_splits` None for a balanced schedule.
        device: The GPU to launch for.

    Returns:
        The output, and the LSE or None. At least one sequence and one head must be there.
    """
    specialization = kernels("specialization")
    query = arrays["query"]
    num_rows = (sizes.num_seqs, sizes.num_q_heads)
    outputs = {
        "out_ptr": Output((*num_rows, sizes.value_head_dim), query.dtype),
        "lse_ptr": Output(num_rows, jnp.float32) if options.return_lse else None,
    }
    window_left = options.window[0] if options.window else None
    max_keys = min(sizes.table_width * sizes.page_size, kernels("schedule").LONGEST) if sizes.num_pages else 0
    if options.max_context_len is not None:
        max_keys = min(max_keys, options.max_context_len)
    tile = specialization.Tile(
        block_m=config.block_m,
        block_n=config.block_n,
        block_d=padded_head_dim(sizes.head_dim),
        block_dv=padded_head_dim(sizes.value_head_dim),
        num_stages=config.num_stages,
        bulk_loop=config.bulk_loop,
    )
    programs_per_item = sizes.num_kv_heads * math.ceil(sizes.group_size / config.block_m)
    max_splits, max_items, capacity = split_bounds(
        sizes.num_seqs,
        max_keys if window_left is None else min(max_keys, window_left + config.block_n),
        config,
        max(1, device.num_sms * config.programs_per_sm // programs_per_item),
    )
    schedule = specialization.Schedule(
        num_seqs=sizes.num_seqs,
        max_keys=max_keys,
        num_splits=config.num_splits or 0,
        capacity=capacity,
        min_tiles=config.min_tiles_per_split,
        block_s=min(_MAX_BLOCK_S, next_power_of_two(sizes.num_seqs)),
    )
    constants = {
        "NUM_Q_HEADS": sizes.num_q_heads,
        "NUM_KV_HEADS": sizes.num_kv_heads,
        "CACHE": paged_cache(sizes, options.kv_layout, arrays["key_cache"].shape, arrays["value_cache"].shape),
        "SCORING": specialization.Scoring(
            softmax_scale=options.softmax_scale,
            soft_cap=options.soft_cap,
            window_left=window_left,
            scale_is_folded=options.soft_cap is None
            and arrays["alibi_slopes"] is None
            and arrays["k_scale"] is None
            and options.softmax_scale > 0,
        ),
        "SCHEDULE": schedule,
        "TILE": tile,
    }
    attend_operands = {
        "q_ptr": query,
        "k_ptr": arrays["key_cache"],
        "v_ptr": arrays["value_cache"],
        "lens_ptr": arrays["context_lens"],
        "table_ptr": arrays["block_tables"],
        "alibi_ptr": arrays["alibi_slopes"],
        "k_scale_ptr": arrays["k_scale"],
    }
    finish_operands = {"sink_ptr": arrays["attention_sink"], "v_scale_ptr": arrays["v_scale"]}
    k_scale_stride = {"K_SCALE_STRIDE": scale_stride(arrays["k_scale"])}
    v_scale_stride = {"V_SCALE_STRIDE": scale_stride(arrays["v_scale"])}
    launch_options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "device": device,
        "operation": "page_attention",
    }

    if max_splits <= 1:
        results = launch(
            kernels("page_attention").page_attention_kernel,
            outputs=outputs,
            operands=attend_operands | finish_operands,
            constants=constants | k_scale_stride | v_scale_stride,
            num_programs=sizes.num_seqs * programs_per_item,
            **launch_options,
        )
        return results["out_ptr"], results.get("lse_ptr")

    partials = launch(
        kernels("page_attention").page_attention_split_kernel,
        outputs={
            "partial_out_ptr": Output((max_items, sizes.num_q_heads, sizes.value_head_dim), jnp.float32),
            "partial_lse_ptr": Output((max_items, sizes.num_q_heads), jnp.float32),
        },
        operands=attend_operands,
        constants=constants | k_scale_stride,
        num_programs=capacity * programs_per_item,
        **launch_options,
    )
    block_splits, block_heads = reduce_blocks(sizes, tile.block_dv, max_splits, capacity, device)
    results = launch(
        kernels("split_reduce").split_reduce_kernel,
        outputs=outputs,
        operands=partials | finish_operands | {"lens_ptr": arrays["context_lens"]},
        constants=constants | v_scale_stride | {"BLOCK_SPLITS": block_splits, "BLOCK_HEADS": block_heads},
        num_programs=sizes.num_seqs * math.ceil(sizes.num_q_heads / block_heads),
        num_warps=4,
        num_stages=1,
        device=device,
        operation="page_attention",
    )
    return results["out_ptr"], results.get("lse_ptr")


def scale_stride(scale: jax.Array | None) -> int:
    """Step between the scales of two KV heads: 0 where one scale serves all."""
    return 0 if scale is None or scale.shape[0] == 1 else 1


def split_bounds(num_seqs: int, longest: int, config: Any, programs: int) -> tuple[int, int, int]:
    """What bounds the work of a split launch, whatever the lengths are.

    Args:
        num_seqs: Sequences.
        longest: Keys that a sequence attends to at most.
        config: Splits and tile size.
        programs: Work items that the GPU runs at once.

    Returns:
        The most splits of a sequence, the most work items of the batch, and the work items to run at once.
    """
    max_tiles = math.ceil(longest / config.block_n)
    if config.num_splits:
        max_splits = min(config.num_splits, max_tiles)
        max_items = num_seqs * max_splits
    else:
        max_splits = min(math.ceil(max_tiles / config.min_tiles_per_split), 2 * programs + 1)
        max_items = min(num_seqs * max_splits, num_seqs + 2 * programs)
    return max_splits, max_items, max(1, min(max_items, programs))


def reduce_blocks(sizes: PagedSizes, block_dv: int, max_splits: int, capacity: int, device: Device) -> tuple[int, int]:
    """Splits and query heads that one program of the reduction holds at once.

    A batch of equal lengths has `capacity / S` splits a sequence; twice as many are loaded in one go. More heads than
    one are taken where the programs would otherwise be too many for the SMs.
    """
    block_splits = min(64, next_power_of_two(min(max_splits, max(2, 2 * capacity // sizes.num_seqs))))
    fitting = max(1, _MAX_REDUCE_ELEMENTS // (block_dv * block_splits))
    for_occupancy = max(1, sizes.num_seqs * sizes.num_q_heads // (4 * device.num_sms))
    heads = min(fitting, for_occupancy, sizes.num_q_heads)
    return block_splits, 1 << heads.bit_length() - 1
