"""What happens to a tile of scores between the dot product and the softmax: one device function a concern."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soft_cap(products, scale, CAP: tl.constexpr, IS_EXACT: tl.constexpr):
    """`CAP * tanh(products * scale / CAP)` in base 2, tanh as `1 - 2 / (exp(2 x) + 1)`: right for an infinite `exp`.

    Unless it must be exact, the reciprocal is one of approximate roots: half the instructions of a division, and 22
    bits of `CAP`.
    """
    limit: tl.constexpr = CAP * LOG2_E
    denominator = tl.exp2(products * (scale * (2.0 * LOG2_E / CAP))) + 1.0
    if IS_EXACT:
        result = limit - (2.0 * limit) / denominator
    else:
        root = tl.rsqrt(denominator)
        result = limit - (2.0 * limit) * (root * root)
    return result


@triton.jit
def alibi(slopes, keys, positions):
    """ALiBi biases `[M, N]`: slope times (key position - query position)."""
    return slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)


@triton.jit
def qq_bias(qq_bias_ptr, columns, rows, SIZE: tl.constexpr):
    """Biases `[M, N]` between new tokens of a sequence, counted from its first one; 0 outside of the matrix."""
    mask = (rows < SIZE)[:, None] & ((columns >= 0) & (columns < SIZE))[None, :]
    return tl.load(qq_bias_ptr + rows[:, None] * SIZE + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def hide(scores, keys, row_begin, row_end):
    """-inf where a row `[M]` does not see a key `[N]`: every mask of the SPEC is a range of keys per row."""
    visible = (keys[None, :] >= row_begin[:, None]) & (keys[None, :] < row_end[:, None])
    return tl.where(visible, scores, float("-inf"))
