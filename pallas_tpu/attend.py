"""A tile of query rows: taken from the queries, attended to blocks of keys, handed over as answers.

The tokens of a tile and the query heads that share a KV head are the rows of one matrix a KV head: row `r` is token
`r % tokens` and head `r // tokens` of its group, so that K and V are used once for all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_tpu import fetch, online_softmax, scores
from pallas_tpu.float16 import widened
from pallas_tpu.schedule import Item, Scalar
from pallas_tpu.specialization import Specialization


def load_rows(item: Item, tokens: int, refs: Any, spec: Specialization) -> None:
    """Arrange the queries in the buffer as rows, and let the state begin with the sinks."""
    group, num_rows = spec.group_size, tokens * spec.group_size
    queries = _staged(refs.query_buffer, tokens, refs)
    if queries is not refs.query_buffer:
        queries[:tokens, :, : spec.head_dim] = refs.query_buffer[:tokens].astype(jnp.float32)
    for head in range(spec.num_kv_heads):
        for heads, rows in _rows_of_heads(head, tokens, group):
            taken = queries[:tokens, heads, : spec.head_dim] if tokens > 1 else queries[0, heads]
            refs.rows[head, rows] = taken.reshape(-1, spec.head_dim).astype(refs.rows.dtype)
            if refs.sinks is not None:
                sinks = jnp.broadcast_to(refs.sinks[heads], refs.row_max[head, rows].shape)
                refs.row_max[head, rows] = sinks
                refs.row_sum[head, rows] = jnp.where(sinks == -jnp.inf, 0.0, 1.0)
            if refs.slopes is not None:
                refs.row_slopes[head, rows] = jnp.broadcast_to(refs.slopes[heads], refs.row_max[head, rows].shape)
        refs.accumulated[head, :num_rows] = jnp.zeros((num_rows, spec.value_head_dim), jnp.float32)
        if refs.sinks is None:
            refs.row_max[head, :num_rows] = jnp.full_like(refs.row_max[head, :num_rows], -jnp.inf)
            refs.row_sum[head, :num_rows] = jnp.zeros_like(refs.row_sum[head, :num_rows])
    if refs.qq_bias is not None:
        places = item.position - item.context + _token_of_row(tokens, group)
        refs.bias_rows[:, :num_rows] = scores.select_bias_rows(refs.qq_bias, places)


def attend_block(item: Item, block: Scalar, slot: Scalar, tokens: int, refs: Any, spec: Specialization) -> None:
    """Attend the rows of every KV head to the block of keys in a slot."""
    scoring, num_keys = spec.scoring, spec.blocks.keys
    num_rows = tokens * spec.group_size
    first_key = item.origin + block * num_keys
    keys = first_key + jax.lax.broadcasted_iota(jnp.int32, (1, num_keys), 1)
    positions = item.position + _token_of_row(tokens, spec.group_size)
    hidden = scores.hidden(keys, positions, item, spec)
    places = first_key + jax.lax.broadcasted_iota(jnp.int32, (num_keys, 1), 0)
    is_seen = (places >= item.key_begin) & (places < item.key_end)
    biases = None
    if refs.qq_bias is not None:
        biases = scores.select_bias_columns(refs.bias_rows[:, :num_rows], keys - item.context)

    @for_each_head(refs, spec)
    def attend(head: Scalar) -> None:
        rows = refs.rows[head, :num_rows]  # [M, D]
        head_keys = widened(fetch.head_keys(refs.key_buffer, slot, head, spec), rows.dtype)  # [N, D]
        logits = _dot(rows, head_keys, contract_keys_dim=1)  # [M, N]
        logits = scores.soft_cap(logits * _key_scale(head, refs, spec), scoring.soft_cap)
        if refs.slopes is not None:
            logits = logits + scores.alibi(refs.row_slopes[head, :num_rows, :1], keys, positions)
        if biases is not None:
            logits = logits + biases
        logits = jnp.where(hidden, -jnp.inf, logits)
        weights, rescale, row_max, row_sum = online_softmax.fold(
            logits, refs.row_max[head, :num_rows, :1], refs.row_sum[head, :num_rows, :1]
        )
        # Where nothing was fetched, or no row looks, anything may stand: a weight of 0 does not make NaN harmless.
        values = widened(fetch.head_keys(refs.value_buffer, slot, head, spec), rows.dtype)  # [N, Dv]
        values = jnp.where(is_seen, values, jnp.zeros_like(values))
        added = _dot(weights.astype(values.dtype), values, contract_keys_dim=0)  # [M, Dv]
        refs.accumulated[head, :num_rows] = refs.accumulated[head, :num_rows] * rescale + added
        refs.row_max[head, :num_rows] = jnp.broadcast_to(row_max, refs.row_max[head, :num_rows].shape)
        refs.row_sum[head, :num_rows] = jnp.broadcast_to(row_sum, refs.row_sum[head, :num_rows].shape)


def for_each_head(refs: Any, spec: Specialization) -> Callable[[Callable[[Scalar], None]], None]:
    """Runs a function of a KV head for all of them: in a loop where the chip can choose the head of a block then."""

    def run(function: Callable[[Scalar], None]) -> None:
        if spec.source.tokens_first and refs.key_buffer.dtype != jnp.float32:
            for head in range(spec.num_kv_heads):
                function(head)
        else:
            pl.loop(0, spec.num_kv_heads)(function)

    return run


def store_rows(tokens: int, refs: Any, spec: Specialization) -> None:
    """Normalise the rows and lay them out as answers in the buffers."""
    group = spec.group_size
    answers = _staged(refs.out_buffer, tokens, refs)
    for head in range(spec.num_kv_heads):
        for heads, rows in _rows_of_heads(head, tokens, group):
            row_max, row_sum = refs.row_max[head, rows, :1], refs.row_sum[head, rows, :1]
            out = online_softmax.normalised(refs.accumulated[head, rows], row_sum)
            if refs.v_scale is not None:
                out = out * _head_scale(refs.v_scale, head, spec)
            shape = (tokens, heads.stop - heads.start)
            out = out.reshape(*shape, spec.value_head_dim).astype(answers.dtype)
            answers[:tokens, heads, : spec.value_head_dim] = out
            if spec.return_lse:
                refs.lse_buffer[:tokens, heads] = online_softmax.log_sum(row_max, row_sum).reshape(*shape, 1)
    if answers is not refs.out_buffer:
        refs.out_buffer[:tokens] = answers[:tokens, :, : spec.value_head_dim].astype(refs.out_buffer.dtype)


def _staged(buffer: Any, tokens: int, refs: Any) -> Any:
    """A buffer from which, or to which, rows of one head move at once.

    Of several tokens they lie apart, in a half type in a half of a register's rows each, which the compiler takes to
    pieces at length; float32 moves with a stride.
    """
    return buffer if tokens == 1 or buffer.dtype == jnp.float32 else refs.staging


def _rows_of_heads(head: int, tokens: int, group: int) -> list[tuple[slice, slice]]:
    """Query heads of a KV head and their rows: those of a single token at once, else one after the other."""
    first = head * group
    if tokens == 1:
        return [(slice(first, first + group), slice(0, group))]
    return [(slice(first + m, first + m + 1), slice(m * tokens, (m + 1) * tokens)) for m in range(group)]


def _token_of_row(tokens: int, group: int) -> jax.Array:
    """Which token of the tile each row `[M, 1]` is."""
    return jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (tokens * group, 1), 0), jnp.int32(tokens))


def _dot(left: jax.Array, right: jax.Array, *, contract_keys_dim: int) -> jax.Array:
    """A product in float32; its operands are float32 to full precision, or bfloat16."""
    if right.shape[0] == 1:  # a single key: Mosaic multiplies by a vector, and mistakes the type where it is bfloat16
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (contract_keys_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _key_scale(head: Scalar, refs: Any, spec: Specialization) -> Any:
    scale = spec.scoring.softmax_scale
    return scale if refs.k_scale is None else scale * _head_scale(refs.k_scale, head, spec)


def _head_scale(scales: Any, head: Scalar, spec: Specialization) -> Any:
    """The scale of a KV head of this core, from one for all or one a head."""
    if scales.shape[0] == 1:
        return scales[0]
    return scales[head + pl.program_id(0) * spec.num_kv_heads] if spec.split.over_heads else scales[head]
