"""What happens to a tile of scores between the dot product and the softmax: one function a concern."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_tpu.schedule import Item, visible_keys
from pallas_tpu.specialization import Specialization

HIGHEST = jax.lax.Precision.HIGHEST


def soft_cap(scores: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(scores / cap)`; the scores themselves without a cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def alibi(slopes: jax.Array, keys: jax.Array, positions: jax.Array) -> jax.Array:
    """ALiBi biases `[M, N]`: slope `[M, 1]` times key position `[1, N]` minus row position `[M, 1]`."""
    return slopes * (keys - positions).astype(jnp.float32)


def hidden(keys: jax.Array, positions: jax.Array, item: Item, spec: Specialization) -> jax.Array:
    """Which keys `[1, N]` the rows at `positions` `[M, 1]` do not see."""
    begin, end = visible_keys(positions, positions, item.sequence_begin, item.sequence_end, spec)
    return (keys < begin) | (keys >= end)


def one_hot_rows(tokens: jax.Array, size: int) -> jax.Array:
    """`[M, size]`: 1 in the column that `tokens` `[M, 1]` name, and zeros for those outside."""
    columns = jax.lax.broadcasted_iota(jnp.int32, (tokens.shape[0], size), 1)
    return (columns == tokens).astype(jnp.float32)


def one_hot_columns(tokens: jax.Array, size: int) -> jax.Array:
    """`[size, N]`: 1 in the row that `tokens` `[1, N]` name, and zeros for those outside."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (size, tokens.shape[1]), 0)
    return (rows == tokens).astype(jnp.float32)


def select_bias_rows(bias: Any, tokens: jax.Array) -> jax.Array:
    """The rows of a `[2, Q, Q]` bias that `tokens` `[M, 1]` name, `[2, M, Q]`, zeros for tokens outside.

    A product with a one-hot matrix, exact in float32, stands in for the gather that the vector unit lacks.
    """
    selection = one_hot_rows(tokens, bias.shape[1])
    return jnp.stack([jnp.dot(selection, bias[kind], precision=HIGHEST) for kind in (0, 1)])


def select_bias_columns(rows: Any, tokens: jax.Array) -> jax.Array:
    """Biases `[M, N]` of the columns that `tokens` `[1, N]` name, 0 for those outside, from `[2, M, Q]`.

    The second matrix counts what hides a key: one-hot products could not carry an infinity.
    """
    selection = one_hot_columns(tokens, rows.shape[2])
    biases, hides = (jnp.dot(rows[kind], selection, precision=HIGHEST) for kind in (0, 1))
    return jnp.where(hides > 0.5, -jnp.inf, biases)
