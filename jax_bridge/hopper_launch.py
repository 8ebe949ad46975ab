"""The warp-specialised kernel for Hopper: which calls it serves, its tiles, and the caches as its TMA sees them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_bridge.configs import DECODE_TILE_FIELDS, SPECIALIZED_ROWS
from jax_bridge.device import Device
from jax_bridge.launch import descriptor, kernels, lacks_gluon
from jax_bridge.layouts import cache_strides
from jax_bridge.tiles import padded_head_dim
from jax_bridge.validation import PagedSizes

TILE_ROWS = SPECIALIZED_ROWS  # of two warpgroups
WARPS = 4  # of a warpgroup, which is all that a launch asks for: the kernel adds the others
COMPUTING_WARPS = 2 * WARPS
# Tiles are 64, 128 or 256 wide: the TMA swizzles shared memory by 64 numbers. Narrower heads would be half padding.
# It moves 8 numbers at once.
_HEAD_DIMS = range(40, 256 + 1, 8)
_SMALLEST_PAGE = 8  # tokens: the TMA swizzles shared memory by eight rows
_MOST_CACHE_ROWS = 1 << 30  # MOST_CACHE_ROWS of the kernel, without importing it
_TILE_BYTES = 32 << 10  # of K or V
_MOST_KEYS = 256  # a tile: the widest product of a warpgroup, and the longest box of the TMA


def queries_of(arrays: Mapping[str, Any]) -> Any:
    """The queries of a paged operation, under either name."""
    return arrays["queries"] if "queries" in arrays else arrays["query"]


def lacks(arrays: Mapping[str, Any], sizes: PagedSizes, device: Device) -> str | None:
    """Words for what the kernel cannot do of a call, or None.

    Args:
        arrays: The operation's arrays by the names of its arguments, or None where absent.
        sizes: Their sizes.
        device: The GPU to run on.
    """
    queries, keys, page = queries_of(arrays), arrays["key_cache"], sizes.page_size
    missing = {
        f"devices but those of compute capability 9.0 (here {device.name})": not device.specializes_warps,
        f"{queries.dtype} queries with {keys.dtype} caches, but one 16-bit dtype": queries.dtype != keys.dtype
        or np.dtype(keys.dtype).itemsize != 2,
        f"heads {sizes.head_dim} and {sizes.value_head_dim} wide, but of one width from {_HEAD_DIMS[0]} to "
        f"{_HEAD_DIMS[-1]} by {_HEAD_DIMS.step}": sizes.head_dim != sizes.value_head_dim
        or sizes.head_dim not in _HEAD_DIMS,
        f"pages of {page} tokens, but of a power of two from {_SMALLEST_PAGE}": page < _SMALLEST_PAGE
        or page & (page - 1) != 0,
        "empty caches": sizes.num_pages == 0,
        f"caches of more than {_MOST_CACHE_ROWS} tokens times heads": sizes.num_pages * page * sizes.num_kv_heads
        > _MOST_CACHE_ROWS,
        "alibi_slopes": arrays["alibi_slopes"] is not None,
        "qq_bias": arrays.get("qq_bias") is not None,
    }
    return next((words for words, is_missing in missing.items() if is_missing), None) or lacks_gluon()


def block_n(sizes: PagedSizes) -> int:
    """Keys a tile."""
    return min(128, _TILE_BYTES // (2 * padded_head_dim(sizes.head_dim)))


def num_stages(sizes: PagedSizes) -> int:
    """Tiles of K, and as many of V, in shared memory: beside prompts there may be decoding, which waits for memory."""
    widest = 128 if sizes.num_seqs > 1 else 64
    return 3 if padded_head_dim(sizes.head_dim) <= widest else 2


def check(invocation: Any, cfg: Any, device: Device) -> None:
    """Refuse a configuration that asks for the kernel where it cannot follow.

    Args:
        invocation: The call, not one that only decodes.
        cfg: Its complete configuration.
        device: The GPU to run on.

    Raises:
        NotImplementedError: It cannot do what the call asks for.
        ValueError: A field is none of its tiles.
    """
    if not cfg.warp_specialized:
        return
    if words := lacks(invocation.arrays, invocation.sizes, device):
        raise NotImplementedError(
            f"{invocation.operation}[triton] with warp_specialized=True does not support {words}; leave it out of cfg"
        )
    tile = {"block_m": TILE_ROWS, "skip_masks": True, "num_warps": COMPUTING_WARPS}
    expected: dict[str, Any] = tile | dict.fromkeys(DECODE_TILE_FIELDS)
    for name, value in expected.items():
        if (given := getattr(cfg, name, None)) != value:
            raise ValueError(
                f"{invocation.operation}: cfg.{name} is {given}, expected {value} with warp_specialized=True"
            )
    for name, most in {"block_n": _MOST_KEYS, "decode_block_m": TILE_ROWS}.items():
        if (given := getattr(cfg, name, most)) > most:
            raise ValueError(
                f"{invocation.operation}: cfg.{name} is {given}, expected at most {most} with warp_specialized=True"
            )


def cache_descriptors(keys: Any, values: Any, kv_layout: str, keys_a_tile: int) -> dict[str, Any]:
    """Both caches as rows of tokens, each of one head or of all, fetched a head of a page or of a tile at a time."""
    layout = kernels("hopper_attention").SWIZZLED_HEADS.value
    page_size = keys.shape[kv_layout.index("T")]
    box = min(page_size, keys_a_tile)

    def rows_of_tokens(cache: Any) -> Any:
        head_dim = cache.shape[-1]
        heads = cache_strides(kv_layout, cache.shape).token // head_dim
        shape = (cache.size // (heads * head_dim), heads, head_dim)
        return descriptor(cache, shape, (box, 1, padded_head_dim(head_dim)), layout)

    return {"k_desc": rows_of_tokens(keys), "v_desc": rows_of_tokens(values)}
