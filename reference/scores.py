"""Scores, masks and softmax: the one float32 core behind every operation of this package.

Letters in shapes: `B` independent problems, `N` query rows, `K` keys, `Hq`/`Hkv` query/KV heads, `G = Hq // Hkv`,
`D`/`Dv` head dims of keys and values.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

PRECISION = jax.lax.Precision.HIGHEST


class Attended(NamedTuple):
    """Result of `attend`: the float32 output `[B, N, Hq, Dv]` and the LSE `[B, N, Hq]`."""

    out: Array
    lse: Array


def default_softmax_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The given scale, or `1 / sqrt(head_dim)` in Python's precision."""
    return 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale


def soft_capped(scores: Array, soft_cap: float | None) -> Array:
    """`cap * tanh(scores / cap)`, finite for every finite score; the scores themselves without a cap (None or 0)."""
    return soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores


def per_kv_head(scale: ArrayLike, num_kv_heads: int) -> Array:
    """A scalar, `[1]` or `[Hkv]` scale as float32 `[Hkv]`."""
    return jnp.broadcast_to(jnp.asarray(scale, jnp.float32).reshape(-1), (num_kv_heads,))


def per_head_sinks(sinks: Array | None, num_q_heads: int, *, one_a_head: bool) -> Array:
    """Sink logits as float32 `[Hq, n]` (n = 0 without sinks).

    `[Hq, n]` stays; `[n]` is shared by all heads, but with `one_a_head` a vector of length Hq is one a head.
    """
    if sinks is None:
        return jnp.zeros((num_q_heads, 0), jnp.float32)
    sinks = sinks.astype(jnp.float32)
    if sinks.ndim == 2:
        return sinks
    if one_a_head and sinks.shape[0] == num_q_heads:
        return sinks[:, None]
    return jnp.broadcast_to(sinks, (num_q_heads, sinks.shape[0]))


def softmax(scores: Array, visible: Array, sinks: Array, dtype: DTypeLike = jnp.float32) -> tuple[Array, Array]:
    """Softmax over the visible keys and the sinks.

    Args:
        scores: float32 `[B, Hq, N, K]`. What stands at invisible keys never matters.
        visible: bool, broadcastable to `[B, Hq, N, K]`.
        sinks: float32 `[Hq, n]` extra logits without a value.
        dtype: of the exponentials and the weights. Rows are shifted before they are rounded to it and summed in
            float32, so that neither scores nor sums are beyond its range.

    Returns:
        The weights `[B, Hq, N, K]` in `dtype`, exactly 0 at invisible keys, and the float32 natural logarithm of the
        denominator `[B, Hq, N]`, -inf where there is neither a key nor a sink.
    """
    sinks = sinks[None, :, None, :]
    scores = jnp.where(visible, scores, -jnp.inf)
    largest = jnp.maximum(
        jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf),
        jnp.max(sinks, axis=-1, keepdims=True, initial=-jnp.inf),
    )
    # A row without a logit would subtract -inf from -inf; and the pivot cancels out, so gradients must not see it.
    pivot = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
    weights, extra = (jnp.exp((logits - pivot).astype(dtype)) for logits in (scores, sinks))
    denominator = sum(jnp.sum(each, axis=-1, keepdims=True, dtype=jnp.float32) for each in (weights, extra))
    empty = denominator == 0
    safe = jnp.where(empty, 1, denominator)
    lse = jnp.where(empty, -jnp.inf, jnp.log(safe) + pivot)
    return (weights / safe).astype(dtype), lse[..., 0]


def attention_weights(
    queries: Array,
    keys: Array,
    visible: Array,
    sinks: Array,
    *,
    softmax_scale: float,
    soft_cap: float | None = None,
    bias: Array | None = None,
    k_scale: ArrayLike | None = None,
    softmax_dtype: DTypeLike = jnp.float32,
) -> tuple[Array, Array]:
    """Weights `[B, Hq, N, K]` in `softmax_dtype` and float32 LSE `[B, Hq, N]`; arguments as `attend` takes them."""
    batch, num_rows, num_q_heads, head_dim = queries.shape
    num_keys, num_kv_heads = keys.shape[1:3]
    visible = visible_beside_bias(visible, bias)
    row_sees = jnp.any(visible, axis=(1, 3))
    queries = jnp.where(row_sees[:, :, None, None], queries.astype(jnp.float32), 0)
    keys = jnp.where(seen_keys(visible), keys.astype(jnp.float32), 0)
    queries = queries.reshape(batch, num_rows, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("bnhgd,bkhd->bhgnk", queries, keys, precision=PRECISION, preferred_element_type=jnp.float32)
    scale = jnp.float32(softmax_scale)
    if k_scale is not None:
        scale = (scale * per_kv_head(k_scale, num_kv_heads))[None, :, None, None, None]
    scores = (scores * scale).reshape(batch, num_q_heads, num_rows, num_keys)
    scores = soft_capped(scores, soft_cap)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    return softmax(scores, visible, sinks, softmax_dtype)


def weighted_values(weights: Array, values: Array, visible: Array, v_scale: ArrayLike | None = None) -> Array:
    """`sum_k weights[b, h, n, k] * values[b, k, h // G]` in float32, `[B, N, Hq, Dv]`; unseen values never matter."""
    batch, num_q_heads, num_rows, num_keys = weights.shape
    num_kv_heads, value_dim = values.shape[2:]
    values = jnp.where(seen_keys(visible), values.astype(jnp.float32), 0)
    weights = weights.astype(jnp.float32).reshape(batch, num_kv_heads, num_q_heads // num_kv_heads, num_rows, num_keys)
    out = jnp.einsum("bhgnk,bkhd->bnhgd", weights, values, precision=PRECISION, preferred_element_type=jnp.float32)
    if v_scale is not None:
        out = out * per_kv_head(v_scale, num_kv_heads)[:, None, None]
    return out.reshape(batch, num_rows, num_q_heads, value_dim)


def visible_beside_bias(visible: Array, bias: Array | None) -> Array:
    """`visible` without the keys that a bias of -inf hides; `bias` may be broadcast."""
    return visible if bias is None else visible & (bias.astype(jnp.float32) != -jnp.inf)


def seen_keys(visible: Array) -> Array:
    """Which keys any row sees, from `[B, H, N, K]` to `[B, K, 1, 1]`: the others may hold NaN."""
    return jnp.any(visible, axis=(1, 2))[:, :, None, None]


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    visible: Array,
    sinks: Array,
    *,
    softmax_scale: float,
    soft_cap: float | None = None,
    bias: Array | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> Attended:
    """Attention of `B` independent problems, in float32 throughout.

    Args:
        queries: `[B, N, Hq, D]`.
        keys: `[B, K, Hkv, D]`; keys that no row of the problem sees may hold anything.
        values: `[B, K, Hkv, Dv]`; likewise.
        visible: bool `[B or 1, Hq or 1, N, K]`: which keys a row sees.
        sinks: `[Hq, n]` logits that join the denominator only.
        softmax_scale: factor of the dot products.
        soft_cap: bound of the scaled scores, before the bias; None or 0 is none.
        bias: broadcastable to `[B, Hq, N, K]`, added as it is; -inf hides the key.
        k_scale: what the stored keys are to be multiplied by, a scalar, `[1]` or `[Hkv]`.
        v_scale: likewise for the values.
    """
    weights, lse = attention_weights(
        queries, keys, visible, sinks, softmax_scale=softmax_scale, soft_cap=soft_cap, bias=bias, k_scale=k_scale
    )
    seen = visible_beside_bias(visible, bias)
    return Attended(weighted_values(weights, values, seen, v_scale), jnp.swapaxes(lse, 1, 2))
