"""Writing new keys and values into a paged cache."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from reference import paging, scores


@jax.jit(static_argnames=("kv_layout",))
def write_kv_pages(
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    /,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    kv_layout: str = "PTHD",
) -> tuple[Array, Array]:
    """Stores new tokens in their slots of the cache; in place where the caches are donated.

    Args:
        key: `[T, Hkv, D]`.
        value: `[T, Hkv, Dv]`.
        key_cache: `[P, ps, Hkv, D]`, or the order of axes that `kv_layout` names; any float dtype, float8 or int8.
        value_cache: `[P, ps, Hkv, Dv]`, likewise.
        slot_mapping: integers `[T]`, `page * ps + token in page`; tokens with a slot outside the cache are dropped.
        k_scale: what keys are divided by before rounding, a scalar, `[1]` or `[Hkv]`.
        v_scale: likewise for values.
        kv_layout: order of the axes of the caches.

    Returns:
        The two caches.
    """
    slots = paging.as_index(slot_mapping)
    return (
        write(key, key_cache, slots, k_scale, kv_layout),
        write(value, value_cache, slots, v_scale, kv_layout),
    )


def write(tokens: Array, cache: Array, slots: Array, scale: ArrayLike | None, kv_layout: str) -> Array:
    """One cache with `tokens` `[T, H, D]` stored in `slots`."""
    num_pages, page_size, num_heads, _ = paging.cache_size(cache, kv_layout)
    if page_size == 0 or num_pages == 0:
        return cache
    stored = tokens
    if scale is not None:
        scales = jnp.broadcast_to(scores.per_kv_head(scale, num_heads)[:, None], tokens.shape)
        # Behind the barrier XLA does not see that few scales serve all tokens, and divides instead of multiplying by
        # reciprocals: a quotient that is a middle between two stored values must be exact.
        stored = tokens.astype(jnp.float32) / jax.lax.optimization_barrier(scales)
    if scale is not None or tokens.dtype != cache.dtype:
        stored = saturated(stored, cache.dtype)
    # A negative index would count from the end; the page past the last is dropped.
    pages = jnp.where(slots < 0, num_pages, slots // page_size)
    offsets = slots % page_size
    if jnp.issubdtype(cache.dtype, jnp.floating) and cache.dtype.itemsize == 1:
        return scatter_bits(cache, stored, pages, offsets, kv_layout)
    return scatter(cache, stored, pages, offsets, kv_layout)


def scatter(cache: Array, stored: Array, pages: Array, offsets: Array, kv_layout: str) -> Array:
    places = {"P": pages, "T": offsets}
    index = tuple(places.get(axis, slice(None)) for axis in kv_layout)
    # Index arrays that are neighbours keep their place among the axes; separated ones move to the front.
    return cache.at[index].set(stored.swapaxes(0, 1) if kv_layout == "HPTD" else stored, mode="drop")


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def scatter_bits(cache: Array, stored: Array, pages: Array, offsets: Array, kv_layout: str) -> Array:
    """`scatter` on the bit patterns of a float8 cache.

    XLA on CPUs would convert the whole cache to float16 and back; like this it copies the bytes.
    """
    bits = scatter(
        jax.lax.bitcast_convert_type(cache, jnp.uint8),
        jax.lax.bitcast_convert_type(stored, jnp.uint8),
        pages,
        offsets,
        kv_layout,
    )
    return jax.lax.bitcast_convert_type(bits, cache.dtype)


@scatter_bits.defjvp
def refuse_gradient(kv_layout: str, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    raise NotImplementedError("write_kv_pages cannot be differentiated where the cache is float8")


def saturated(tokens: Array, dtype: jnp.dtype) -> Array:
    """`tokens` rounded to the nearest value of `dtype`, ties to even, beyond its range at its ends."""
    tokens = tokens.astype(jnp.float32)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        tokens = jnp.where(jnp.isnan(tokens), 0, jnp.round(tokens))
        return jnp.clip(tokens, limits.min, limits.max).astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(tokens, -largest, largest).astype(dtype)
