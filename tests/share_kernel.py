"""A kernel that says how long the shares of a batch are."""

import triton
import triton.language as tl

from triton_kernels.schedule import measure_shares


@triton.jit
def share_length_kernel(  # type: ignore[no-untyped-def]
    lens_ptr,  # [S]
    begins_ptr,  # [S]
    length_ptr,  # [1]
    QUERIES: tl.constexpr,
    SCORING: tl.constexpr,
    TILE: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Length of a share, in units of the line."""
    lanes = tl.arange(0, SCHEDULE.block_s)
    length, _, _ = measure_shares(lanes, None, lens_ptr, begins_ptr, QUERIES, SCORING, TILE, SCHEDULE)
    tl.store(length_ptr, length)
