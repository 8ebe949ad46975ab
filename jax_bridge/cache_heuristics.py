"""Launch parameters of the kernels that move rows from memory to memory: `write_kv_pages`, `merge_attention_states`."""

from jax_bridge.configs import CacheConfig
from jax_bridge.device import Device
from jax_bridge.operation import Invocation
from jax_bridge.tiles import next_power_of_two

NUM_WARPS = 4
WRITE_ELEMENTS = 4096  # of a program: 32 a thread, in bfloat16 four loads of 16 bytes that are all in flight
MERGE_ELEMENTS = 2048  # likewise, of either part
_MOST_COLUMNS = 1024
_FEWEST_COLUMNS = 64  # 128 bytes of bfloat16: blocks that divide a row evenly are no narrower
_PROGRAMS_PER_SM = 1  # below which a program takes fewer rows


def cache_config(invocation: Invocation, device: Device) -> CacheConfig:
    """Nothing is open; asked for, the device becomes part of what a program is compiled for."""
    del invocation, device
    return CacheConfig()


def columns_per_block(num_columns: int) -> int:
    """Columns of a row that a program holds: a power of two, which divides them all where that is not too narrow."""
    dividing = min(num_columns & -num_columns, _MOST_COLUMNS)
    return dividing if dividing >= _FEWEST_COLUMNS else min(next_power_of_two(num_columns), _MOST_COLUMNS)


def rows_per_program(num_rows: int, columns: int, elements: int, device: Device, *, blocks: int = 1) -> int:
    """Rows that a program takes, a power of two: fewer where there would be too few programs for the device otherwise.

    Args:
        num_rows: rows of the call, at least one.
        columns: columns of a row that a program holds.
        elements: what a program holds at most, unless one row is more.
        device: the device.
        blocks: programs that share a row.
    """
    wanted = num_rows * blocks // (_PROGRAMS_PER_SM * device.num_sms)
    most = max(1, elements // columns)
    return min(most, 1 << max(wanted, 1).bit_length() - 1)
