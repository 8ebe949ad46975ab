"""What a multiprocessor and Triton's dot product ask of tiles, for all kernels with a loop over keys."""

from typing import Any

import jax.numpy as jnp

from jax_bridge.device import Device, current_device
from jax_bridge.launch import interpreting, kernels

MAX_HEAD_DIM = 512
_MOST_ELEMENTS = 1 << 20  # of a tensor in Triton
_FEWEST_REGISTERS = 128  # with fewer the loop over tiles spills
_FEWEST_REGISTERS_WIDE = 168  # likewise for head dims above 128, and for decoding with an exact soft cap or ALiBi
_REGISTERS_PER_SM, _MOST_REGISTERS = 65_536, 255
MOST_WARPS = _REGISTERS_PER_SM // (32 * _FEWEST_REGISTERS)  # that a multiprocessor has enough registers for
# Triton's wgmma has read past tiles with narrower rows (triton#10573, #11366); 3.9 is not known to be free of it.
_NARROWEST_WGMMA_TILE, _WGMMA_ROWS = 64, 64


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile's head axis: a power of two, and no less than a dot product takes."""
    return max(16, next_power_of_two(head_dim))


def widest_head(sizes: Any) -> int:
    """The larger head dim of a call, as wide as its tile."""
    return padded_head_dim(max(sizes.head_dim, sizes.value_head_dim))


def build_tile(
    operation: str,
    *,
    block_m: int,
    block_n: int,
    head_dim: int,
    value_head_dim: int,
    num_stages: int,
    skip_masks: bool,
    itemsize: int,
    device: Device,
) -> Any:
    """The `Tile` of a kernel for heads of these widths and keys of `itemsize` bytes an element.

    Raises:
        ValueError: the device can hold no such tile, which compiling would tell late and in words of Triton.
    """
    narrowest = _NARROWEST_WGMMA_TILE if block_m >= _WGMMA_ROWS else 0
    block_d, block_dv = (max(narrowest, padded_head_dim(width)) for width in (head_dim, value_head_dim))
    widest = max(block_d, block_dv)
    asked = f"{operation}: cfg asks for tiles of {block_m} rows and {block_n} keys, with heads {widest} wide:"
    smaller = "use fewer rows or keys a tile in cfg"
    elements, key_bytes = max(block_m * block_n, block_m * widest, block_n * widest), block_n * widest * itemsize
    if elements > _MOST_ELEMENTS:
        raise ValueError(f"{asked} {elements} elements, expected at most {_MOST_ELEMENTS}; {smaller}")
    if key_bytes > device.shared_memory and not interpreting():
        raise ValueError(
            f"{asked} {key_bytes} bytes of keys in shared memory, expected at most {device.shared_memory} on this "
            f"device; {smaller}"
        )
    sums = block_m * max(block_n, block_dv)
    if sums > _REGISTERS_PER_SM and not interpreting():
        most = f"the {_REGISTERS_PER_SM} of a multiprocessor"
        raise ValueError(f"{asked} {sums} registers of scores or sums, expected at most {most}; {smaller}")
    return kernels("specialization").Tile(
        block_m=block_m,
        block_n=block_n,
        block_d=block_d,
        block_dv=block_dv,
        num_stages=num_stages,
        skip_masks=skip_masks,
    )


def max_registers(num_warps: int, programs_per_sm: int, widest: int, *, is_plain: bool = True) -> int | None:
    """Registers a thread with which as many programs as planned fit a multiprocessor; None for no limit.

    Args:
        num_warps: Warps a program.
        programs_per_sm: Programs planned for a multiprocessor.
        widest: What `widest_head` answers.
        is_plain: Whether scores cost no more registers than usual.
    """
    fewest = _FEWEST_REGISTERS if widest <= 128 and is_plain else _FEWEST_REGISTERS_WIDE
    registers = max(fewest, _REGISTERS_PER_SM // (num_warps * 32 * programs_per_sm) // 8 * 8)
    return registers if registers < _MOST_REGISTERS else None


def lacks_cache_dtype(dtype: Any) -> str | None:
    """Words for a cache's dtype that the current device has no conversions for, or None."""
    if dtype == jnp.float8_e4m3fn and not interpreting() and not current_device().converts_e4m3:
        return "float8_e4m3fn caches before compute capability 8.9"
    return None
