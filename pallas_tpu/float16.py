"""float16 on a chip that has none: stored as the integers of its bits, and computed with as float32."""

from typing import Any

import jax
import jax.numpy as jnp

_MANTISSA_BITS, _LARGEST_EXPONENT = 10, 31
_WIDER_MANTISSA = 13
"""Bits that the mantissa of float32 has beyond that of float16."""
_WIDER_BIAS = 112 << 23
_INFINITY = 0x7F800000


def as_bits(array: jax.Array) -> jax.Array:
    """float16 as int16, which costs nothing; anything else as it is."""
    return jax.lax.bitcast_convert_type(array, jnp.int16) if array.dtype == jnp.float16 else array


def widened(stored: jax.Array, dtype: Any) -> jax.Array:
    """Elements of a cache in the dtype of the queries; int16 stands for the bits of float16."""
    if stored.dtype != jnp.int16:
        return stored.astype(dtype)
    bits = stored.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    exponent = magnitude >> _MANTISSA_BITS
    aligned = magnitude << _WIDER_MANTISSA
    normal = _float32(aligned + _WIDER_BIAS)
    # The vector unit takes subnormal numbers for zero: these are counted in units of the smallest one.
    small = magnitude.astype(jnp.float32) * jnp.finfo(jnp.float16).smallest_subnormal.astype(jnp.float32)
    value = jnp.where(exponent == 0, small, normal)
    value = jnp.where(exponent == _LARGEST_EXPONENT, _float32(aligned | _INFINITY), value)
    return jnp.where(bits < 0, -value, value).astype(dtype)


def _float32(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
