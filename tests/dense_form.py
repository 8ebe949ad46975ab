"""Every operation brought to one dense form, and that form evaluated in a chosen precision.

Two uses: the error of the same mathematics in the input's dtype calibrates the tolerances, and planted bugs are small
changes of it. `oracle.py` is independent of this module; `test_matrix.py` holds the two together in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.inputs import Call, dense_visibility, visible_range, window_bounds
from tests.poison import Array, numpy_dtype

Rounding = Callable[[Array], Array]


@dataclass(frozen=True)
class Result:
    """Answers as rows: `out` `[rows, Hq, Dv]`, `lse` `[rows, Hq]`, `weights` `[rows, Hq, K]` (dense only)."""

    out: Array
    lse: Array | None = None
    weights: Array | None = None


@dataclass(frozen=True)
class Sequence:
    """Rows that attend to one list of keys, poison left out; float64 throughout."""

    first_row: int
    query: Array  # [Q, Hq, D]
    key: Array  # [K, Hkv, D] as stored
    value: Array  # [K, Hkv, Dv] as stored
    query_positions: Array  # [Q]
    key_positions: Array  # [K]
    visible: Array  # [1 or Hq, Q, K]
    bias: Array  # [Hq, Q, K]
    sinks: Array  # [Hq, n]
    softmax_scale: float
    soft_cap: float | None
    k_scale: Array  # [Hkv]
    v_scale: Array  # [Hkv]


def exact(values: Array) -> Array:
    return values


def rounding_to(dtype: str) -> Rounding:
    """Rounds float64 values to `dtype`."""
    target = numpy_dtype(dtype)
    return lambda values: values.astype(target).astype(np.float64)


def evaluate(call: Call, rounding: Rounding = exact) -> Result:
    """The dense form with every intermediate rounded; rows without a key and padding rows are zeros."""
    case = call.case
    rows = num_rows(call)
    keys = case.kv_lens[0] if case.operation == "attention" else 0
    out = np.zeros((rows, case.num_q_heads, case.value_dim))
    lse = np.broadcast_to(sinks_lse(call), (rows, case.num_q_heads)).copy()
    weights = np.zeros((rows, case.num_q_heads, keys))
    for sequence in sequences(call):
        taken = slice(sequence.first_row, sequence.first_row + len(sequence.query))
        probabilities, lse[taken] = softmax(scores(sequence, rounding), sequence.sinks, rounding)
        out[taken] = weigh(sequence, probabilities, rounding)
        if keys:
            weights[taken, :, sequence.key_positions] = probabilities.transpose(1, 0, 2)
    return Result(out, lse, weights if case.return_weights else None)


def num_rows(call: Call) -> int:
    """How many query rows the call has, padding included."""
    if call.operation == "attention":
        return call.case.batch * call.case.query_lens[0]
    return len(call.array("queries" if call.operation == "unified_attention" else "query"))


def sinks_lse(call: Call) -> Array:
    """The LSE `[Hq]` of a row that sees no key."""
    return softmax(np.zeros((call.case.num_q_heads, 1, 0)), _common(call)["sinks"])[1][0]


def scores(sequence: Sequence, rounding: Rounding = exact) -> Array:
    """Logits `[Hq, Q, K]`, -inf where masked."""
    num_heads, group_size = sequence.query.shape[1], sequence.query.shape[1] // sequence.key.shape[1]
    key = rounding(sequence.key * sequence.k_scale[:, None]).repeat(group_size, axis=1)
    logits = rounding(sequence.softmax_scale * np.einsum("qhd,khd->hqk", sequence.query, key))
    if sequence.soft_cap is not None:
        logits = rounding(sequence.soft_cap * np.tanh(logits / sequence.soft_cap))
    logits = rounding(logits + sequence.bias)
    return np.where(np.broadcast_to(sequence.visible, (num_heads, *logits.shape[1:])), logits, -np.inf)


def softmax(logits: Array, sinks: Array, rounding: Rounding = exact) -> tuple[Array, Array]:
    """Weights `[Hq, Q, K]` and the LSE `[Q, Hq]`, the sinks in the denominator."""
    sinks = np.broadcast_to(sinks[:, None, :], (*logits.shape[:2], sinks.shape[1]))
    every = np.concatenate([logits, sinks], axis=2)
    largest = every.max(axis=2, initial=-np.inf, keepdims=True)
    pivot = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        denominator = np.exp(every - pivot).sum(axis=2, keepdims=True)
        weights = np.where(denominator > 0, np.exp(logits - pivot) / denominator, 0.0)
        lse = (pivot + np.log(denominator))[..., 0]
    return rounding(weights), lse.T


def weigh(sequence: Sequence, weights: Array, rounding: Rounding = exact) -> Array:
    """The weighted values `[Q, Hq, Dv]`."""
    group_size = sequence.query.shape[1] // sequence.key.shape[1]
    value = rounding(sequence.value * sequence.v_scale[:, None]).repeat(group_size, axis=1)
    return rounding(np.einsum("hqk,khd->qhd", weights, value))


def sequences(call: Call) -> Iterator[Sequence]:
    """The sequences of a call that have query rows."""
    if call.operation == "attention":
        yield from _dense_sequences(call)
    elif call.operation == "ragged_decode_attention":
        yield from _ragged_sequences(call)
    else:
        yield from _paged_sequences(call)


def _common(call: Call) -> dict[str, Any]:
    case = call.case
    sinks = call.arrays.get("softmax_aux" if "softmax_aux" in call.arrays else "attention_sink")
    if sinks is None:
        sinks = np.zeros((case.num_q_heads, 0))
    elif sinks.ndim == 1 and case.shared_sinks:
        sinks = np.broadcast_to(sinks, (case.num_q_heads, len(sinks)))
    elif sinks.ndim == 1:
        sinks = sinks[:, None]
    scales = {}
    for name in ("k_scale", "v_scale"):
        scale = call.arrays.get(name)
        scales[name] = np.broadcast_to(1.0 if scale is None else scale, (case.num_kv_heads,)).astype(np.float64)
    return {
        "sinks": sinks.astype(np.float64),
        "softmax_scale": case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale,
        "soft_cap": case.soft_cap,
        **scales,
    }


def _paged_sequences(call: Call) -> Iterator[Sequence]:
    case = call.case
    to_tokens_first = [call.options["kv_layout"].index(axis) for axis in "PTHD"]
    key_cache = call.array("key_cache").transpose(to_tokens_first)
    value_cache = call.array("value_cache").transpose(to_tokens_first)
    if case.operation == "prefill_page_attention":
        queries, tables = call.array("query"), call.array("page_indices")[None]
    elif case.operation == "unified_attention":
        queries, tables = call.array("queries"), call.array("block_tables")
    else:
        queries, tables = call.array("query"), call.array("block_tables")
    left, right = window_bounds(case)
    row = case.leading_rows
    for table, query_len, kv_len in zip(tables, case.query_lens, case.kv_lens, strict=True):
        if query_len == 0:
            continue
        positions = np.arange(kv_len - query_len, kv_len)
        keys = np.arange(*visible_range(case, query_len, kv_len))
        slots = table[keys // case.page_size].astype(np.int64), keys % case.page_size
        distance = keys[None, :] - positions[:, None]
        visible = np.ones(distance.shape, bool)
        if case.causal:
            visible &= distance <= 0
        if left is not None:
            visible &= distance >= -left
        if right is not None:
            visible &= distance <= right
        bias = np.zeros((case.num_q_heads, *distance.shape))
        if case.alibi:
            bias += call.array("alibi_slopes").astype(np.float64)[:, None, None] * distance
        if case.qq_bias:
            bias += _query_bias(call.array("qq_bias"), query_len, keys - (kv_len - query_len))
        yield Sequence(
            first_row=row,
            query=queries[row : row + query_len].astype(np.float64),
            key=key_cache[slots].astype(np.float64),
            value=value_cache[slots].astype(np.float64),
            query_positions=positions,
            key_positions=keys,
            visible=visible[None],
            bias=bias,
            **_common(call),
        )
        row += query_len


def _query_bias(matrix: Array, query_len: int, columns: Array) -> Array:
    """The part `[Q, K]` of the query-query bias that falls on each key."""
    side = len(matrix)
    rows = np.arange(query_len)
    inside = (rows[:, None] < side) & (columns[None, :] >= 0) & (columns[None, :] < side)
    picked = matrix[np.clip(rows, 0, side - 1)[:, None], np.clip(columns, 0, side - 1)[None, :]]
    return np.where(inside, picked.astype(np.float64), 0.0)


def _ragged_sequences(call: Call) -> Iterator[Sequence]:
    case = call.case
    left, right = window_bounds(case)
    for row, (start, end) in enumerate(zip(call.array("sequence_start"), call.array("sequence_end"), strict=True)):
        position = int(end) - 1
        first = int(start) if left is None else max(int(start), position - left)
        keys = np.arange(first, int(end) if right is None else min(int(end), position + right + 1))
        yield Sequence(
            first_row=row,
            query=call.array("query").reshape(-1, 1, case.num_q_heads, case.head_dim)[row].astype(np.float64),
            key=call.array("key")[row, keys].astype(np.float64),
            value=call.array("value")[row, keys].astype(np.float64),
            query_positions=np.array([position]),
            key_positions=keys,
            visible=np.ones((1, 1, len(keys)), bool),
            bias=np.zeros((case.num_q_heads, 1, len(keys))),
            **_common(call),
        )


def _dense_sequences(call: Call) -> Iterator[Sequence]:
    case = call.case
    visible = dense_visibility(case, call.arrays["mask"])
    rows = case.query_lens[0]
    bias = call.arrays["bias"]
    shape = (case.batch, case.num_q_heads, rows, case.kv_lens[0])
    bias = np.zeros(shape) if bias is None else np.broadcast_to(bias.astype(np.float64), shape)
    for batch in range(case.batch):
        keys = np.flatnonzero(visible[batch].any(axis=(0, 1)))
        yield Sequence(
            first_row=batch * rows,
            query=call.array("query")[batch].astype(np.float64),
            key=call.array("key")[batch, keys].astype(np.float64),
            value=call.array("value")[batch, keys].astype(np.float64),
            query_positions=np.arange(rows),
            key_positions=keys,
            visible=visible[batch][:, :, keys],
            bias=bias[batch][:, :, keys],
            **_common(call),
        )
