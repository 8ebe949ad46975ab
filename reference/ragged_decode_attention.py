"""Decode attention over a dense cache, of which each row of the batch sees one range."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from reference import blocks, paging, scores
from reference.paging import Window


@jax.jit(static_argnames=("softmax_scale", "sliding_window", "logits_soft_cap", "return_lse"))
def ragged_decode_attention(
    query: Array,
    key: Array,
    value: Array,
    sequence_start: Array,
    sequence_end: Array,
    softmax_aux: Array | None = None,
    /,
    *,
    softmax_scale: float | None = None,
    sliding_window: Window = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attends one token of each batch row to the keys `[start, end)` of that row; the token stands at `end - 1`.

    Args:
        query: `[B, Hq, D]` or `[B, 1, Hq, D]`.
        key: `[B, L, Hkv, D]`; what lies outside the range may be anything.
        value: `[B, L, Hkv, Dv]`, likewise.
        sequence_start: integers `[B]`, clamped to `[0, L]`.
        sequence_end: integers `[B]`, clamped to `[0, L]`; exclusive.
        softmax_aux: sink logits, `[n]` for all heads or `[Hq, n]`.
        softmax_scale: factor of the dot products, `1 / sqrt(D)` by default.
        sliding_window: `(left, right)`, inclusive around the token; an integer W sees the last W tokens.
        logits_soft_cap: bound of the scaled scores; None or 0 is none.
        return_lse: whether to return the log of the softmax denominator too.

    Returns:
        `[B, Hq, Dv]` in the dtype and rank of `query`; with `return_lse` also float32 `[B, Hq]` (`[B, 1, Hq]`).
    """
    batch, length, num_kv_heads, head_dim = key.shape
    num_q_heads = query.shape[-2]
    page_size = dense_page_size(length)
    pages_per_row = length // page_size
    starts, ends = (jnp.clip(paging.as_index(bound), 0, length) for bound in (sequence_start, sequence_end))
    keys = blocks.PagedKeys(
        key_cache=key.reshape(batch * pages_per_row, page_size, num_kv_heads, head_dim),
        value_cache=value.reshape(batch * pages_per_row, page_size, num_kv_heads, value.shape[-1]),
        starts=starts,
        ends=ends,
        tables=jnp.arange(batch * pages_per_row, dtype=jnp.int32).reshape(batch, pages_per_row),
    )
    out, lse = blocks.attend_blocks(
        query.reshape(batch, num_q_heads, head_dim),
        keys,
        blocks.single_row_blocks(ends - 1),
        1,
        kv_layout="PTHD",
        softmax_scale=scores.default_softmax_scale(softmax_scale, head_dim),
        causal=True,
        window=paging.causal_bounds(sliding_window),
        soft_cap=logits_soft_cap,
        sinks=scores.per_head_sinks(softmax_aux, num_q_heads, one_a_head=False),
    )
    out, lse = out.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])
    return (out, lse) if return_lse else out


def dense_page_size(length: int) -> int:
    """Tokens of the pages into which a dense row is cut, so that short ranges of long rows cost what they are.

    Where the length is symbolic, 1, which divides it.
    """
    if not paging.is_static(length):
        return 1
    divisor = math.gcd(length, 128)
    return divisor if divisor >= 16 else max(length, 1)
