"""Merging attention results over disjoint keys: the softmax states of two parts of a row's keys made one."""

import triton
import triton.language as tl

from triton_kernels.online_softmax import base2_lse, divide_by_sum, guard
from triton_kernels.scores import LN_2, LOG2_E


@triton.jit
def merge_attention_states_kernel(
    out_a_ptr,  # [rows, D]
    lse_a_ptr,  # [rows]
    out_b_ptr,  # [rows, D]
    lse_b_ptr,  # [rows]
    out_ptr,  # [rows, D]
    lse_ptr,  # [rows] float32
    NUM_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program merges BLOCK_ROWS rows; a row is one head of one token."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < NUM_ROWS
    lse_a = tl.load(lse_a_ptr + rows, mask=row_mask, other=float("-inf")).to(tl.float32)
    lse_b = tl.load(lse_b_ptr + rows, mask=row_mask, other=float("-inf")).to(tl.float32)
    # The difference before the change of base: of large LSEs that are close it is exact.
    pivot = guard(tl.maximum(lse_a, lse_b))
    share_a = tl.exp2((lse_a - pivot) * LOG2_E)
    share_b = tl.exp2((lse_b - pivot) * LOG2_E)
    total = share_a + share_b
    tl.store(lse_ptr + rows, pivot + base2_lse(0.0, total) * LN_2, mask=row_mask)
    for start in range(0, HEAD_DIM, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        offsets = rows[:, None] * HEAD_DIM + dims[None, :]
        mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
        # What stands beside a share of 0 is not even read: it may be NaN.
        out_a = tl.load(out_a_ptr + offsets, mask=mask & (share_a != 0.0)[:, None], other=0.0).to(tl.float32)
        out_b = tl.load(out_b_ptr + offsets, mask=mask & (share_b != 0.0)[:, None], other=0.0).to(tl.float32)
        merged = divide_by_sum(share_a[:, None] * out_a + share_b[:, None] * out_b, total)
        tl.store(out_ptr + offsets, merged.to(out_ptr.dtype.element_ty), mask=mask)
