"""Reading a paged cache: pages of any layout, clamped lengths and ids, the key range a row sees."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

Window = int | tuple[int | None, int | None] | None
Bounds = tuple[int | None, int | None]


def as_index(values: Array) -> Array:
    """Integers of any dtype as int32, those beyond its range at its ends."""
    limits = jnp.iinfo(jnp.int32)
    own = jnp.iinfo(values.dtype)
    if own.max > limits.max:
        values = jnp.minimum(values, np.asarray(limits.max, values.dtype))
    if own.min < limits.min:
        values = jnp.maximum(values, np.asarray(limits.min, values.dtype))
    return values.astype(jnp.int32)


def causal_bounds(window: Window) -> Bounds:
    """Inclusive reach to the left and right of a row's position; an integer counts the row's own position as one."""
    if isinstance(window, int):
        return window - 1, None
    return (None, None) if window is None else window


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def is_static(*sizes: Any) -> bool:
    """Whether all sizes are numbers, and none a dimension of `jax.export.symbolic_shape`, which few can be compared."""
    return all(isinstance(size, int) for size in sizes)


def clipped_reach(reach: int | None, farthest: Any) -> int | None:
    """A reach of a window, but none beyond `farthest`, so that int32 positions cannot overflow with it."""
    return min(reach, farthest) if reach is not None and is_static(farthest) else reach


def last_at_or_before(starts: Array, values: Array) -> Array:
    """The index int32 `[N]` of the last of the ascending `starts` `[M]` that is no larger; -1 where none is."""
    if is_static(*starts.shape):  # JAX's search takes no others
        return jnp.searchsorted(starts, values, side="right").astype(jnp.int32) - 1
    return jnp.sum(starts <= values[:, None], axis=1, dtype=jnp.int32) - 1


def cache_size(cache: Array, kv_layout: str) -> tuple[int, int, int, int]:
    """Pages, tokens a page, KV heads and head dim of a cache whose axes `kv_layout` names in order."""
    pages, tokens, heads, head_dim = (cache.shape[kv_layout.index(axis)] for axis in "PTHD")
    return pages, tokens, heads, head_dim


def pages_of(tables: Array, sequences: Array, slots: Array) -> Array:
    """Table entries int32 `[N, W]` of `sequences` `[N]` at `slots` `[N, W]`; slots outside the table read its ends."""
    if slots.size == 0:
        return jnp.zeros(slots.shape, jnp.int32)
    return tables.at[sequences[:, None], slots].get(mode="clip")


def gather_pages(cache: Array, page_ids: Array, kv_layout: str) -> Array:
    """The tokens of pages, in the stored dtype.

    Args:
        cache: axes as `kv_layout` names them; without pages, `page_ids` must be empty.
        page_ids: int32 `[N, W]`; ids outside the cache read its first or last page.
        kv_layout: order of the axes `P`, `T`, `H`, `D`.

    Returns:
        `[N, W * ps, Hkv, D]`.
    """
    if page_ids.size == 0:
        _, page_size, heads, head_dim = cache_size(cache, kv_layout)
        return jnp.zeros((page_ids.shape[0], page_ids.shape[1] * page_size, heads, head_dim), cache.dtype)
    page_axis = kv_layout.index("P")
    pages = jnp.take(cache, page_ids, axis=page_axis, mode="clip")
    axes = kv_layout.replace("P", "NW")
    tokens = pages.transpose([axes.index(axis) for axis in "NWTHD"])
    return tokens.reshape(page_ids.shape[0], -1, *tokens.shape[3:])


def visible_range(positions: Array, starts: Array, ends: Array, *, causal: bool, window: Bounds) -> tuple[Array, Array]:
    """Half-open range `[lower, upper)` of the keys that the rows at `positions` see; empty where `lower >= upper`.

    `positions`, `starts` and `ends` are int32 and broadcast together; `window` reaches inclusively to both sides.
    """
    left, right = window
    lower, upper = starts, ends
    if left is not None:
        lower = jnp.maximum(lower, positions - left)
    if right is not None:
        upper = jnp.minimum(upper, positions + right + 1)
    if causal:
        upper = jnp.minimum(upper, positions + 1)
    lower, upper = jnp.broadcast_arrays(lower, upper)
    return lower, upper
