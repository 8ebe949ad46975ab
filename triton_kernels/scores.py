"""What happens to a tile of scores between the dot product and the softmax: one device function a concern."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soft_cap(scores, CAP: tl.constexpr):
    """`CAP * tanh(scores / CAP)` through `exp(-2 |x|)`, which cannot overflow."""
    decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / CAP))
    capped = CAP * (1.0 - decay) / (1.0 + decay)
    return tl.where(scores < 0, -capped, capped)


@triton.jit
def alibi(slopes, keys, positions):
    """ALiBi biases `[M, N]`: slope times (key position - query position)."""
    return slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)


@triton.jit
def hide(scores, keys, row_begin, row_end):
    """-inf where a row `[M]` does not see a key `[N]`: every mask of the SPEC is a range of keys per row."""
    visible = (keys[None, :] >= row_begin[:, None]) & (keys[None, :] < row_end[:, None])
    return tl.where(visible, scores, float("-inf"))
