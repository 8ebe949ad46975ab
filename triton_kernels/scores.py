"""What happens to a tile of scores between the dot product and the softmax: one device function a concern."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4e38)  # a little less than float32 holds: a score may still be added
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tanh(x):
    """float32 to a few units in the last place: near 0 by the polynomial of Cephes' `tanhf`, elsewhere by `exp2`."""
    square = x * x
    polynomial = square * -5.70498872745e-3 + 2.06390887954e-2
    polynomial = polynomial * square - 5.37397155531e-2
    polynomial = polynomial * square + 1.33314422036e-1
    polynomial = polynomial * square - 3.33332819422e-1
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2_E)) + 1.0)
    return tl.where(magnitude < 0.625, x + x * (square * polynomial), tl.where(x < 0.0, -far, far))


@triton.jit
def doubled_share(products, scale, SCORING: tl.constexpr):
    """The exponent of 2 that gives `exp(2 x)` of logits as shares `x` of the soft cap."""
    return products * (scale * (2.0 * LOG2_E / SCORING.soft_cap))


@triton.jit
def soft_cap(products, scale, SCORING: tl.constexpr, IS_EXACT: tl.constexpr):
    """`cap * tanh(products * scale / cap)` in base 2, finite for every finite product.

    Unless it must be exact, as `1 - 2 / (exp(2 x) + 1)`, which is right for an infinite `exp` and off by 2^-22 of
    the cap, the reciprocal being one of approximate roots: half the instructions of a division. With a large cap that
    would be too much for any dtype.
    """
    limit: tl.constexpr = SCORING.soft_cap * LOG2_E
    if IS_EXACT or not SCORING.has_fast_cap:
        result = limit * tanh(products * (scale / SCORING.soft_cap))
    else:
        root = tl.rsqrt(tl.exp2(doubled_share(products, scale, SCORING)) + 1.0)
        result = limit - (2.0 * limit) * (root * root)
    return result


@triton.jit
def reciprocal(x):
    """`1 / x` to 2^-23, in one instruction of NVIDIA's: a division takes eight."""
    if IS_INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def load_score_scale(k_scale_ptr, kv_head, K_SCALE_STRIDE: tl.constexpr, SCORING: tl.constexpr):
    """What dot products of a KV head are multiplied by: with `log2(e)` where nothing comes between."""
    scale = SCORING.softmax_scale * (LOG2_E if SCORING.scale_is_folded else 1.0)
    if k_scale_ptr is not None:
        scale = tl.load(k_scale_ptr + kv_head * K_SCALE_STRIDE) * scale
    return scale


@triton.jit
def base_2_logits(products, scale, SCORING: tl.constexpr, IS_EXACT: tl.constexpr):
    """Dot products as base-2 logits but for a factor, and the factor: all of the scale, where it may wait."""
    logits = products
    unit = scale
    if not SCORING.scale_is_folded:
        unit = 1.0
        if SCORING.soft_cap is None:
            logits = products * (scale * LOG2_E)
        else:
            logits = soft_cap(products, scale, SCORING, IS_EXACT)
    return logits, unit


@triton.jit
def logits_from_cap(products, scale, SCORING: tl.constexpr):
    """`base_2_logits` of 16 bits, but counted from a soft cap that may be approximated: `from_cap` makes up for it.

    How far they are below it is `span / (1 + exp(2 x))` with the span `2 cap log2(e)`: as precise, with half the
    instructions, and softmax does not mind. The exponential and 1 are divided by the span before they are added.
    """
    unit = 1.0
    if SCORING.has_fast_cap:
        exponential = tl.exp2(doubled_share(products, scale, SCORING) - SCORING.log_cap_span)
        logits = reciprocal(-1.0 / SCORING.cap_span - exponential)
    else:
        logits, unit = base_2_logits(products, scale, SCORING, False)
    return logits, unit


@triton.jit
def from_cap(row_max, SCORING: tl.constexpr):
    """The base-2 maximum of `logits_from_cap`, as if these were not counted from the cap."""
    if SCORING.has_fast_cap:
        row_max += SCORING.soft_cap * LOG2_E
    return row_max


@triton.jit
def in_base_2(logits):
    """Natural logits that a caller gives, in base 2; finite ones stay finite, cut to what float32 holds if need be."""
    scaled = logits * LOG2_E
    return tl.where(tl.abs(logits) == float("inf"), scaled, tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST))


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
