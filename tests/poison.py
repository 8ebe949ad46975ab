"""Fills everything that must not matter: NaN where a dtype has it, extreme bytes where not, wild table entries."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NAN_BYTE = 0x7F
"""NaN in float8_e4m3fn and in float8_e5m2."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name, the extended floats of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def poison_like(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Values that spoil whatever they touch."""
    if dtype == np.int8:
        signs = np.arange(int(np.prod(shape))) % 2
        return np.where(signs == 0, 127, -128).astype(np.int8).reshape(shape)
    if dtype.itemsize == 1:
        return np.full(shape, NAN_BYTE, np.uint8).view(dtype)
    return np.full(shape, np.nan, dtype)


def poison_unused(array: Array, used: NDArray[np.bool_]) -> Array:
    """A copy of `array` `[..., *rest]` with everything poisoned where `used` `[...]` is false."""
    result = array.copy()
    result[~used] = poison_like(result[~used].shape, result.dtype)
    return result


def wild_entries(count: int, num_pages: int, dtype: np.dtype[Any], rng: np.random.Generator) -> Array:
    """Page ids that must never be followed: negative, huge, one past the pool."""
    limits = np.iinfo(dtype)
    candidates = [-1, -7, num_pages, num_pages + 1000, limits.min, limits.max]
    allowed = [entry for entry in candidates if limits.min <= entry <= limits.max]
    return rng.choice(np.array(allowed, dtype), size=count)
