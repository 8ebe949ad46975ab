"""Launches of the dense Triton kernel, and their configurations from static shapes and the device alone."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import reference
from jax_bridge.configs import AttentionConfig, chosen
from jax_bridge.device import Device
from jax_bridge.launch import Output, kernels, launch
from jax_bridge.tiles import (
    MAX_HEAD_DIM,
    build_tile,
    max_registers,
    next_power_of_two,
    padded_head_dim,
    widest_head,
)
from jax_bridge.validation import Window

_FEW_ROWS = 64  # of a KV head: they fit one small tile
_FULL_WAVES = 3  # programs a multiprocessor that large tiles must make: fewer leave it idle at the end
_L2_BYTES = 32 << 20  # of keys and values that programs share at a time; of the 50 MB of an H100
_BLOCK_SEGMENT_ROWS, _SEGMENT_WARPS = 256, 8


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Static arguments of `attention`, normalised.

    Attributes:
        softmax_scale: factor on the scores.
        soft_cap: None for off, never 0.
        window: bounds `(left, right)`, inclusive; right 0 when causal.
        causal: whether row `i` sees no key after `i`.
        dtype: of the computation's inputs and of the results.
        softmax_dtype: of the softmax.
        dropout_prob: 0 where dropout is off.
        return_weights: whether the weights are answered too.
    """

    softmax_scale: float
    soft_cap: float | None
    window: Window | None
    causal: bool
    dtype: Any
    softmax_dtype: Any
    dropout_prob: float
    return_weights: bool

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """How many keys before and after its own position a row sees; None is no bound."""
        return self.window or (None, 0 if self.causal else None)


@dataclasses.dataclass(frozen=True)
class DenseSizes:
    """Sizes of one call; `q_len` and `kv_len` are `Q` and `K`, the rest as in `PagedSizes`."""

    batch: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    value_head_dim: int


def lacks(arrays: Mapping[str, Any], sizes: DenseSizes, options: AttentionOptions) -> str | None:
    """Words for the first thing asked for that the kernel cannot do, or None."""
    widest = max(sizes.head_dim, sizes.value_head_dim)
    missing = {
        "bias": arrays["bias"] is not None,
        "a boolean mask in mask_info (segments and key lengths it does)": arrays["mask"] is not None,
        "dropout_prob": options.dropout_prob > 0,
        "return_weights": options.return_weights,
        f"softmax_dtype={options.softmax_dtype}": options.softmax_dtype != jnp.float32,
        f"head dims above {MAX_HEAD_DIM} (here {widest})": widest > MAX_HEAD_DIM,
    }
    return next((words for words, is_missing in missing.items() if is_missing), None)


def attend(
    arrays: Mapping[str, Any], sizes: DenseSizes, options: AttentionOptions, cfg: AttentionConfig, device: Device
) -> jax.Array:
    """Launches dense attention.

    Args:
        arrays: The arrays of the operation by name, validated.
        sizes: Their sizes; there are rows and keys.
        options: Static arguments of the operation.
        cfg: A complete configuration.
        device: The GPU to launch for.

    Returns:
        The output `[B, Q, Hq, Dv]`.
    """
    query, key, value = (arrays[name].astype(options.dtype) for name in ("query", "key", "value"))
    sinks = merged_sinks(arrays["softmax_aux"], sizes.num_q_heads, one_a_head=True)
    tile = _tile(sizes, cfg, options, device)
    scoring = _scoring(options)
    queries = kernels("specialization").Queries(
        num_seqs=sizes.batch,
        num_segments=sizes.batch,
        num_tokens=sizes.q_len,
        num_q_heads=sizes.num_q_heads,
        num_kv_heads=sizes.num_kv_heads,
        group_size=sizes.group_size,
    )
    row_tiles = math.ceil(sizes.q_len * sizes.group_size / tile.block_m)
    results = launch(
        kernels("attention").dense_attention_kernel,
        outputs={"out_ptr": Output((*query.shape[:3], sizes.value_head_dim), options.dtype)},
        operands={
            "q_ptr": query,
            "k_ptr": key,
            "v_ptr": value,
            "lens_ptr": arrays["key_lengths"],
            **_segments(arrays, sizes, scoring, tile.block_n, device),
            "sink_ptr": sinks,
        },
        constants={
            "QUERIES": queries,
            "CACHE": _cache(sizes, tile.block_n),
            "SCORING": scoring,
            "TILE": tile,
            "NUM_KEYS": sizes.kv_len,
            "HEADS_AT_ONCE": min(chosen(cfg.kv_heads_at_once), sizes.batch * sizes.num_kv_heads),
        },
        num_programs=sizes.batch * sizes.num_kv_heads * row_tiles,
        num_warps=chosen(cfg.num_warps),
        num_stages=chosen(cfg.num_stages),
        device=device,
        operation="attention",
        max_registers=max_registers(chosen(cfg.num_warps), chosen(cfg.programs_per_sm), widest_head(sizes)),
    )
    return results["out_ptr"]


def merged_sinks(sinks: jax.Array | None, num_q_heads: int, *, one_a_head: bool) -> jax.Array | None:
    """Sinks as the one logit a head, float32 `[Hq]`, that adds as much to the denominator; None without any.

    Args:
        sinks: `[n]` for all heads, `[Hq, n]`, or None.
        num_q_heads: `Hq`.
        one_a_head: whether a vector of length `Hq` is one a head.
    """
    per_head = reference.scores.per_head_sinks(sinks, num_q_heads, one_a_head=one_a_head)
    return jax.nn.logsumexp(per_head, axis=1) if per_head.shape[1] else None


def _tile(sizes: DenseSizes, cfg: AttentionConfig, options: AttentionOptions, device: Device) -> Any:
    return build_tile(
        "attention",
        block_m=chosen(cfg.block_q),
        block_n=chosen(cfg.block_k),
        head_dim=sizes.head_dim,
        value_head_dim=sizes.value_head_dim,
        num_stages=chosen(cfg.num_stages),
        skip_masks=bool(cfg.skip_masks),
        itemsize=np.dtype(options.dtype).itemsize,
        device=device,
    )


def _scoring(options: AttentionOptions) -> Any:
    left, right = options.bounds
    return kernels("specialization").Scoring(
        softmax_scale=options.softmax_scale,
        soft_cap=options.soft_cap,
        window_left=left,
        window_right=right,
        scale_is_folded=options.soft_cap is None and options.softmax_scale > 0,
    )


def _cache(sizes: DenseSizes, block_n: int) -> Any:
    """Keys and values as a cache whose pages are the batch rows, each as long as it needs to be."""
    return kernels("specialization").PagedCache(
        num_pages=sizes.batch,
        page_size=next_power_of_two(max(sizes.kv_len, block_n)),
        table_width=1,
        head_dim=sizes.head_dim,
        value_head_dim=sizes.value_head_dim,
        k_page_stride=sizes.kv_len * sizes.num_kv_heads * sizes.head_dim,
        k_token_stride=sizes.num_kv_heads * sizes.head_dim,
        k_head_stride=sizes.head_dim,
        v_page_stride=sizes.kv_len * sizes.num_kv_heads * sizes.value_head_dim,
        v_token_stride=sizes.num_kv_heads * sizes.value_head_dim,
        v_head_stride=sizes.value_head_dim,
    )


def _segments(
    arrays: Mapping[str, Any], sizes: DenseSizes, scoring: Any, block_n: int, device: Device
) -> dict[str, jax.Array | None]:
    """The segments of rows and keys as the kernel takes them, and their range in each tile of keys."""
    if arrays["q_segment_ids"] is None:
        return dict.fromkeys(("row_segment_ptr", "key_segment_ptr", "lowest_ptr", "highest_ptr"))
    rows, keys = _int32_segments(arrays["q_segment_ids"], arrays["kv_segment_ids"])
    key_tiles = math.ceil(sizes.kv_len / block_n)
    marked = launch(
        kernels("segments").mark_segments_kernel,
        outputs={
            "seen_segment_ptr": Output((sizes.batch, sizes.kv_len), jnp.int32),
            "lowest_ptr": Output((sizes.batch, key_tiles), jnp.int32),
            "highest_ptr": Output((sizes.batch, key_tiles), jnp.int32),
        },
        operands={"row_segment_ptr": rows, "key_segment_ptr": keys},
        constants={
            "NUM_ROWS": sizes.q_len,
            "NUM_KEYS": sizes.kv_len,
            "SCORING": scoring,
            "BLOCK_ROWS": _BLOCK_SEGMENT_ROWS,
            "BLOCK_N": block_n,
        },
        num_programs=sizes.batch * key_tiles,
        num_warps=_SEGMENT_WARPS,
        num_stages=1,
        device=device,
        operation="attention",
    )
    bounds = {name: marked[name] for name in ("lowest_ptr", "highest_ptr")}
    return {"row_segment_ptr": rows, "key_segment_ptr": marked["seen_segment_ptr"], **bounds}


def _int32_segments(rows: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Segment ids as int32: equal where they were equal, negative where they were negative."""
    dtype = jnp.promote_types(rows.dtype, keys.dtype)
    if jnp.iinfo(dtype).max <= jnp.iinfo(jnp.int32).max:
        return rows.astype(jnp.int32), keys.astype(jnp.int32)
    rows, keys = rows.astype(dtype), keys.astype(dtype)
    known = jnp.sort(jnp.concatenate([rows.reshape(-1), keys.reshape(-1)]))

    def rank(ids: jax.Array) -> jax.Array:
        return jnp.where(ids < 0, -1, jnp.searchsorted(known, ids).astype(jnp.int32))

    return rank(rows), rank(keys)


def heuristic_cfg(
    sizes: DenseSizes, options: AttentionOptions, device: Device, *, has_segments: bool
) -> AttentionConfig:
    """Tile shape and order of programs for a call.

    As measured for prefill over pages on an H100, two programs of 128 rows that share a multiprocessor hide each
    other's waits. Segments are loaded a stage ahead of the keys that they let through.
    """
    itemsize, num_rows, widest = np.dtype(options.dtype).itemsize, sizes.q_len * sizes.group_size, widest_head(sizes)
    num_heads, num_warps = sizes.batch * sizes.num_kv_heads, 4
    if itemsize == 4:  # dot products run on FMA units, out of registers: small tiles
        block_q, block_k = 16, max(16, min(32, 4096 // widest))
    elif num_rows <= _FEW_ROWS:
        block_q, block_k = max(16, next_power_of_two(num_rows)), 64 if widest <= 128 else 32
        num_warps = 4 if widest <= 256 else 8
    elif widest <= 128:
        fills_device = num_rows // 128 * num_heads >= _FULL_WAVES * device.num_sms
        block_q, block_k, num_warps = (128, 64, 8) if fills_device else (64, 64, 4)
    else:
        block_q, block_k, num_warps = 128 if widest <= 256 else 64, 32, 8
    cfg = AttentionConfig(
        block_q=block_q,
        block_k=block_k,
        num_warps=num_warps,
        num_stages=3 if has_segments else 2,
        programs_per_sm=2 if widest <= 128 else 1,
        skip_masks=itemsize < 4 and num_rows > _FEW_ROWS,
    )
    cfg = dataclasses.replace(cfg, kv_heads_at_once=_kv_heads_at_once(sizes, cfg, itemsize, device))
    while chosen(cfg.num_stages) > 1 and _shared_bytes(sizes, cfg, itemsize) > device.shared_memory:
        cfg = dataclasses.replace(cfg, num_stages=chosen(cfg.num_stages) - 1)
    while chosen(cfg.block_q) > 16 and _shared_bytes(sizes, cfg, itemsize) > device.shared_memory:
        cfg = dataclasses.replace(cfg, block_q=chosen(cfg.block_q) // 2)
    return cfg


def _kv_heads_at_once(sizes: DenseSizes, cfg: AttentionConfig, itemsize: int, device: Device) -> int:
    """One where its row tiles occupy the device and more, so that others only crowd its keys out; else what fits L2."""
    row_tiles = math.ceil(sizes.q_len * sizes.group_size / chosen(cfg.block_q))
    if 2 * row_tiles >= 3 * device.num_sms * chosen(cfg.programs_per_sm):
        return 1
    heads = _L2_BYTES // _bytes_of_keys(sizes, max(1, sizes.kv_len), itemsize)
    return max(1, min(sizes.batch * sizes.num_kv_heads, heads))


def candidate_cfgs(
    sizes: DenseSizes, options: AttentionOptions, device: Device, *, has_segments: bool
) -> tuple[AttentionConfig, ...]:
    """Configurations worth timing: variations of the heuristic one that fit the device's shared memory."""
    heuristic: Any = heuristic_cfg(sizes, options, device, has_segments=has_segments)
    itemsize = np.dtype(options.dtype).itemsize
    variations: tuple[dict[str, Any], ...] = (
        {},
        {"num_stages": heuristic.num_stages + 1},
        {"num_stages": heuristic.num_stages + 1, "programs_per_sm": 1},
        {"programs_per_sm": 1},
        {"block_k": 2 * heuristic.block_k, "programs_per_sm": 1},
        {"block_k": 2 * heuristic.block_k, "programs_per_sm": 1, "num_stages": heuristic.num_stages + 1},
        {"block_q": max(16, heuristic.block_q // 2), "num_warps": 4},
        {"skip_masks": not heuristic.skip_masks},
        {"kv_heads_at_once": 2 * heuristic.kv_heads_at_once},
    )
    candidates = dict.fromkeys(dataclasses.replace(heuristic, **changes) for changes in variations)
    return tuple(cfg for cfg in candidates if _shared_bytes(sizes, cfg, itemsize) <= device.shared_memory)


def _bytes_of_keys(sizes: DenseSizes, num_keys: int, itemsize: int) -> int:
    """Bytes of `num_keys` keys and values of one head, as wide as their tiles."""
    return num_keys * (padded_head_dim(sizes.head_dim) + padded_head_dim(sizes.value_head_dim)) * itemsize


def _shared_bytes(sizes: DenseSizes, cfg: AttentionConfig, itemsize: int) -> int:
    """Shared memory of a program: its queries, and the tiles of keys and values in flight."""
    query_bytes = chosen(cfg.block_q) * padded_head_dim(sizes.head_dim) * itemsize
    return query_bytes + _bytes_of_keys(sizes, chosen(cfg.block_k) * chosen(cfg.num_stages), itemsize)
