"""Merging attention results over disjoint keys."""

import jax
import jax.numpy as jnp
from jax import Array


@jax.jit
def merge_attention_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, /) -> tuple[Array, Array]:
    """Joins two results over disjoint keys into the result over all of them.

    Args:
        out_a: `[T, Hq, D]`.
        lse_a: `[T, Hq]`, natural logarithms of the softmax denominators; -inf marks a result over no keys.
        out_b: like `out_a`.
        lse_b: like `lse_a`.

    Returns:
        The output in the dtype of `out_a` and the float32 LSE; zeros and -inf where both results are over no keys.
    """
    lse_a, lse_b = lse_a.astype(jnp.float32), lse_b.astype(jnp.float32)
    largest = jnp.maximum(lse_a, lse_b)
    pivot = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
    share_a, share_b = jnp.exp(lse_a - pivot), jnp.exp(lse_b - pivot)
    total = share_a + share_b
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = weighted(share_a / total, out_a) + weighted(share_b / total, out_b)
    return out.astype(out_a.dtype), jnp.where(empty, -jnp.inf, jnp.log(total) + pivot)


def weighted(share: Array, out: Array) -> Array:
    """`share * out` in float32, and 0 where the share is, whatever stands there."""
    return share[..., None] * jnp.where((share == 0)[..., None], 0, out.astype(jnp.float32))
