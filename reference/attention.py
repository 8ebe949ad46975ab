"""Dense attention with masks, biases, sinks, dropout and gradients."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from reference import paging, scores
from reference.paging import Window


@jax.jit(
    static_argnames=(
        "deterministic",
        "softmax_scale",
        "logits_soft_cap",
        "dtype",
        "softmax_dtype",
        "dropout_prob",
        "causal",
        "sliding_window",
        "return_weights",
    )
)
def attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    dropout_rng: Array | None = None,
    softmax_aux: Array | None = None,
    /,
    *,
    mask: Array | None = None,
    deterministic: bool = True,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    dtype: DTypeLike | None = jnp.bfloat16,
    softmax_dtype: DTypeLike | None = None,
    dropout_prob: float = 0.0,
    causal: bool = False,
    sliding_window: Window = None,
    return_weights: bool = False,
) -> Array | tuple[Array, Array]:
    """Dense attention of every query row over the keys of its batch row.

    The scores of all rows and keys exist at once: memory grows with `B * Hq * Q * K`.

    Args:
        query: `[B, Q, Hq, D]`.
        key: `[B, K, Hkv, D]`; keys that no row of the batch row may see can hold anything.
        value: `[B, K, Hkv, Dv]`, likewise.
        bias: broadcastable to `[B, Hq, Q, K]`, added to the scores after scale and cap; -inf hides a key.
        dropout_rng: random key; needed with `deterministic=False` and `dropout_prob > 0`.
        softmax_aux: sink logits: `[n]` for all heads, `[Hq]` for one a head, or `[Hq, n]`.
        mask: bool `[B, 1 or Hq, Q, K]`, True where a row may see a key.
        deterministic: whether dropout is off.
        softmax_scale: factor of the dot products, `1 / sqrt(D)` by default.
        logits_soft_cap: bound of the scaled scores; None or 0 is none.
        dtype: what query, key and value are cast to first, and the dtype of the results; None is the query's.
        softmax_dtype: dtype of the softmax, float32 by default.
        dropout_prob: share of the weights that dropout drops, in `[0, 1)`; the others grow by `1 / (1 - p)`.
        causal: whether row `i` sees no key after `i`, both counted from the first.
        sliding_window: `(left, right)`, inclusive around the row; an integer W is `(W, W)`.
        return_weights: whether to return the weights too.

    Returns:
        `[B, Q, Hq, Dv]`; with `return_weights` also `[B, Hq, Q, K]`, as dropout left them. Rows without a visible key
        are zeros.
    """
    out_dtype = query.dtype if dtype is None else jnp.dtype(dtype)
    query, key, value = (rounded(x, out_dtype) for x in (query, key, value))
    visible = visible_keys(query.shape[1], key.shape[1], causal=causal, sliding_window=sliding_window)
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    weights, _ = scores.attention_weights(
        query,
        key,
        visible,
        scores.per_head_sinks(softmax_aux, query.shape[2], one_a_head=True),
        softmax_scale=scores.default_softmax_scale(softmax_scale, query.shape[-1]),
        soft_cap=logits_soft_cap,
        bias=bias,
        softmax_dtype=jnp.float32 if softmax_dtype is None else softmax_dtype,
    )
    if not deterministic and dropout_prob > 0:
        if dropout_rng is None:
            raise ValueError("attention: dropout needs a dropout_rng, got None")
        kept = jax.random.bernoulli(dropout_rng, 1.0 - dropout_prob, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout_prob), 0)
    out = scores.weighted_values(weights, value, scores.visible_beside_bias(visible, bias)).astype(out_dtype)
    return (out, weights.astype(out_dtype)) if return_weights else out


def rounded(array: Array, dtype: jnp.dtype) -> Array:
    """`array` in `dtype`; on GPUs XLA would leave out a cast to bfloat16 that is followed by one to float32.

    float16 keeps to the cast alone: `reduce_precision` would flush its subnormal numbers.
    """
    kind, given = jnp.finfo(dtype), jnp.finfo(array.dtype)
    if kind.nexp == given.nexp and kind.nmant < given.nmant:
        array = jax.lax.reduce_precision(array, kind.nexp, kind.nmant)
    return array.astype(dtype)


def visible_keys(num_rows: int, num_keys: int, *, causal: bool, sliding_window: Window) -> Array:
    """What causality and the window let a row see, bool `[1, 1, Q, K]`."""
    window = (sliding_window, sliding_window) if isinstance(sliding_window, int) else sliding_window or (None, None)
    left, right = (paging.clipped_reach(side, num_rows + num_keys) for side in window)
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    keys = jnp.arange(num_keys, dtype=jnp.int32)
    ends = jnp.full_like(rows, num_keys)
    lower, upper = paging.visible_range(rows, jnp.zeros_like(rows), ends, causal=causal, window=(left, right))
    return ((keys >= lower) & (keys < upper))[None, None]
