"""KV-cache layouts: a name such as "PTHD" lists the axes in order; sizes and strides follow, nothing is guessed."""

from typing import Any, NamedTuple

LAYOUTS = ("PTHD", "PHTD", "HPTD")
"""Axes of a cache: P page, T token in page, H KV head, D head dim."""


class CacheSizes(NamedTuple):
    """Sizes of a paged cache."""

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int


class CacheStrides(NamedTuple):
    """Strides of a row-major cache in elements; the head dim is contiguous."""

    page: int
    token: int
    head: int


def cache_shape(kv_layout: str, sizes: CacheSizes) -> tuple[int, ...]:
    """Shape of a cache of `sizes` laid out as `kv_layout`."""
    named = dict(zip("PTHD", sizes, strict=True))
    return tuple(named[axis] for axis in kv_layout)


def cache_strides(kv_layout: str, shape: tuple[int, ...]) -> CacheStrides:
    """Strides of a row-major 4-D cache `shape` laid out as `kv_layout`."""
    strides, step = {}, 1
    for axis, size in zip(reversed(kv_layout), reversed(shape), strict=True):
        strides[axis] = step
        step *= size
    return CacheStrides(strides["P"], strides["T"], strides["H"])


def scale_stride(scale: Any) -> int:
    """Step between the scales of two KV heads in an array `[1]` or `[Hkv]`, or None: 0 where one serves all."""
    return 0 if scale is None or scale.shape[0] == 1 else 1
