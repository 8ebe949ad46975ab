"""The float32 softmax state of a tile of rows: running maximum (base 2, -inf until a key is seen), sum, accumulator.

Where scores are bounded some number stands for the maximum, also of rows without keys: that there is one the sum tells.
"""

import triton
import triton.language as tl

from triton_kernels.scores import LN_2, in_base_2


@triton.jit
def guard(row_max):
    """A finite pivot for `exp2`. The state itself keeps -inf, so that no split claims a maximum that it never saw."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def online_softmax(scores, unit, row_max, row_sum):
    """Fold scores `[M, N]` (-inf where masked; base-2 logits once multiplied by `unit` > 0) into the row state.

    Returns the weights `[M, N]`, the factor `[M]` for what was accumulated before, and the new maximum and sum.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
    pivot = guard(new_max)
    weights = tl.exp2(scores * unit - pivot[:, None])
    rescale = tl.exp2(row_max - pivot)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def add_sinks(row_max, row_sum, sinks):
    """Count each row's sink logit (base 2) in its denominator: new maximum and sum, and the accumulator's factor."""
    new_max = tl.maximum(row_max, sinks)
    pivot = guard(new_max)
    rescale = tl.exp2(row_max - pivot)
    return new_max, row_sum * rescale + tl.exp2(sinks - pivot), rescale


@triton.jit
def divide_by_sum(acc, row_sum):
    """The normalised rows `[M, D]`; rows without any key stay zero."""
    return acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]


@triton.jit
def base2_lse(row_max, row_sum):
    """Base-2 log of the denominator; -inf for rows without key and sink."""
    return tl.where(row_sum > 0.0, row_max + tl.log2(row_sum), float("-inf"))


@triton.jit
def store_rows(
    row_max,  # [M]
    row_sum,  # [M]
    acc,  # [M, BLOCK_DV]
    out_rows,  # [M]
    heads,  # [M] query heads
    mask,  # [M]
    dims,  # [BLOCK_DV] 0, 1, 2 and so on
    sink_ptr,  # [Hq] or None
    v_scale_ptr,  # [1] or [Hkv] or None
    out_ptr,  # [rows, Dv]
    lse_ptr,  # [rows] or None
    V_SCALE_STRIDE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
):
    """Finish rows that have seen all their keys: sinks once, normalise, scale, write the output and the natural LSE."""
    if sink_ptr is not None:
        sinks = in_base_2(tl.load(sink_ptr + heads, mask=mask, other=0.0).to(tl.float32))
        row_max, row_sum, rescale = add_sinks(row_max, row_sum, sinks)
        acc = acc * rescale[:, None]
    out = divide_by_sum(acc, row_sum)
    if v_scale_ptr is not None:
        out = out * tl.load(v_scale_ptr + heads // GROUP_SIZE * V_SCALE_STRIDE, mask=mask, other=0.0)[:, None]
    tl.store(
        out_ptr + out_rows[:, None] * VALUE_HEAD_DIM + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask[:, None] & (dims < VALUE_HEAD_DIM)[None, :],
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + out_rows, base2_lse(row_max, row_sum) * LN_2, mask=mask)
