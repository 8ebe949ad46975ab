"""Writing new tokens into the pages of a cache: any layout by strides, scaled, rounded and saturated on the way."""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class StoredFormat:
    """What new tokens become in a cache of another dtype: at least `lowest`, at most `largest`.

    With `mantissa_bits` they are rounded to so many bits behind the leading one before they are converted, below
    `smallest_normal` to the steps of the numbers there.
    """

    lowest: float
    largest: float
    mantissa_bits: int | None = None
    smallest_normal: float = 0.0


@dataclass(frozen=True)
class TokenRows:
    """New tokens, K or V, and where their rows go; strides in elements.

    A program writes `block_features` of the `num_heads * head_dim` features of a token. Without `format` they are
    stored as they are.
    """

    num_heads: int
    head_dim: int
    page_stride: int
    token_stride: int
    head_stride: int
    scale_stride: int
    block_features: int
    format: StoredFormat | None


MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
EXPONENT_BITS = tl.constexpr(0x7F800000)


@triton.jit
def round_to_format(values, FORMAT: tl.constexpr):
    """float32 `values` as the nearest ones that FORMAT holds, ties to even, so that the conversion is exact.

    Conversions to 8 bits differ: some go through float16 and round twice, the interpreter's takes ties away from zero.
    """
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & MAGNITUDE_BITS
    # Adding 1.5 * 2^23 steps of the format leaves no bit of a float32 for anything finer, and taking them away again
    # is exact. A step is 2^-mantissa_bits of the value's binade, or of the lowest binade.
    binade = (magnitude & EXPONENT_BITS).to(tl.float32, bitcast=True)
    rounder = tl.maximum(binade, FORMAT.smallest_normal) * (1.5 * 2.0 ** (23 - FORMAT.mantissa_bits))
    rounded = ((magnitude.to(tl.float32, bitcast=True) + rounder) - rounder).to(tl.int32, bitcast=True)
    # All bits of the format's mantissa and no other: the only NaN of float8_e4m3fn, converted as a number would be.
    nan: tl.constexpr = 0x7F800000 + (2**FORMAT.mantissa_bits - 1) * 2 ** (23 - FORMAT.mantissa_bits)
    rounded = tl.where(magnitude > EXPONENT_BITS, nan, rounded)
    return (rounded | (bits ^ magnitude)).to(tl.float32, bitcast=True)


@triton.jit
def write_rows(
    tokens_ptr,  # [T, H, D]
    scale_ptr,  # [1] or [H] float32, or None
    cache_ptr,  # [P, ps, H, D] in any order of the axes before D
    slots,  # [BLOCK_TOKENS] int32
    tokens,  # [BLOCK_TOKENS] int64
    mask,  # [BLOCK_TOKENS]
    block,
    ROWS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Store number `block` of the blocks of features of some tokens, heads and dims taken as one axis."""
    num_features: tl.constexpr = ROWS.num_heads * ROWS.head_dim
    features = block * ROWS.block_features + tl.arange(0, ROWS.block_features)
    tile_mask = mask[:, None]
    if num_features % ROWS.block_features != 0:
        tile_mask = tile_mask & (features < num_features)[None, :]
    heads = features // ROWS.head_dim
    values = tl.load(tokens_ptr + (tokens * num_features)[:, None] + features[None, :], mask=tile_mask)
    if scale_ptr is not None:
        scales = tl.load(scale_ptr + heads * ROWS.scale_stride, mask=features < num_features, other=1.0)
        values = tl.div_rn(values.to(tl.float32), tl.broadcast_to(scales[None, :], values.shape))
    if ROWS.format is not None:
        values = values.to(tl.float32)
        values = tl.clamp(values, ROWS.format.lowest, ROWS.format.largest, propagate_nan=tl.PropagateNan.ALL)
        if cache_ptr.dtype.element_ty.is_int():
            values = tl.where(values == values, values, 0.0)
        if ROWS.format.mantissa_bits is not None:
            values = round_to_format(values, ROWS.format)
    rows = (slots // PAGE_SIZE).to(tl.int64) * ROWS.page_stride + (slots % PAGE_SIZE).to(tl.int64) * ROWS.token_stride
    columns = heads.to(tl.int64) * ROWS.head_stride + features % ROWS.head_dim
    tl.store(cache_ptr + rows[:, None] + columns[None, :], values.to(cache_ptr.dtype.element_ty), mask=tile_mask)


@triton.jit
def write_kv_pages_kernel(
    key_ptr,  # [T, Hkv, D]
    value_ptr,  # [T, Hkv, Dv]
    slots_ptr,  # [T] int32
    k_scale_ptr,  # [1] or [Hkv] float32, or None
    v_scale_ptr,  # [1] or [Hkv] float32, or None
    key_cache_ptr,  # [P, ps, Hkv, D] in any order of the axes before D
    value_cache_ptr,  # [P, ps, Hkv, Dv] likewise
    NUM_TOKENS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    K_ROWS: tl.constexpr,
    V_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One program writes a block of features of K or of V for BLOCK_TOKENS tokens; slots outside the cache are left."""
    k_blocks: tl.constexpr = tl.cdiv(K_ROWS.num_heads * K_ROWS.head_dim, K_ROWS.block_features)
    v_blocks: tl.constexpr = tl.cdiv(V_ROWS.num_heads * V_ROWS.head_dim, V_ROWS.block_features)
    block = tl.program_id(0) % (k_blocks + v_blocks)
    tokens = (tl.program_id(0) // (k_blocks + v_blocks)).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slots = tl.load(slots_ptr + tokens, mask=tokens < NUM_TOKENS, other=-1)
    mask = (slots >= 0) & (slots // PAGE_SIZE < NUM_PAGES)
    if block < k_blocks:
        write_rows(key_ptr, k_scale_ptr, key_cache_ptr, slots, tokens, mask, block, K_ROWS, PAGE_SIZE)
    else:
        write_rows(value_ptr, v_scale_ptr, value_cache_ptr, slots, tokens, mask, block - k_blocks, V_ROWS, PAGE_SIZE)
