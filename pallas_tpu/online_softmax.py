"""The float32 softmax state of a tile of rows: running maximum (-inf until a key or sink is seen), sum, accumulator."""

import jax
import jax.numpy as jnp


def fold(scores: jax.Array, row_max: jax.Array, row_sum: jax.Array) -> tuple[jax.Array, ...]:
    """Take scores `[M, N]`, -inf where hidden, into the maximum and the sum `[M, 1]` of each row.

    Returns the weights `[M, N]`, the factor `[M, 1]` for what was accumulated before, the new maximum and sum.
    """
    new_max = jnp.maximum(row_max, jnp.max(scores, axis=1, keepdims=True))
    pivot = jnp.where(new_max == -jnp.inf, 0.0, new_max)
    weights = jnp.exp(scores - pivot)
    rescale = jnp.exp(row_max - pivot)
    return weights, rescale, new_max, row_sum * rescale + jnp.sum(weights, axis=1, keepdims=True)


def normalised(accumulated: jax.Array, row_sum: jax.Array) -> jax.Array:
    """The weighted means `[M, Dv]`; rows without any key stay zero."""
    return accumulated / jnp.where(row_sum > 0.0, row_sum, 1.0)


def log_sum(row_max: jax.Array, row_sum: jax.Array) -> jax.Array:
    """Natural logarithm of the denominator; -inf for rows without key and sink."""
    return jnp.where(row_sum > 0.0, row_max + jnp.log(jnp.where(row_sum > 0.0, row_sum, 1.0)), -jnp.inf)
