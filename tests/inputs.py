"""Draws the arrays of a case. Poison is the default: whatever SPEC says does not matter holds NaN or nonsense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.cases import PAGED, Case
from tests.poison import Array, numpy_dtype, poison_unused, wild_entries

POSITIONAL = {
    "page_attention": ("query", "key_cache", "value_cache", "context_lens", "block_tables"),
    "prefill_page_attention": ("query", "key_cache", "value_cache", "context_len", "page_indices"),
    "unified_attention": ("queries", "key_cache", "value_cache", "kv_lens", "block_tables", "query_start_loc"),
    "ragged_decode_attention": ("query", "key", "value", "sequence_start", "sequence_end", "softmax_aux"),
    "attention": ("query", "key", "value", "bias", "dropout_rng", "softmax_aux"),
}
"""The positional arrays of each operation, in order."""

STORED_SPREAD = 25.0
"""Standard deviation of the stored values of a cache that carries scales."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call: arrays by the operation's argument names, everything static in `options`."""

    case: Case
    arrays: Mapping[str, Array | None]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def operation(self) -> str:
        return self.case.operation

    def positional(self) -> list[Array | None]:
        return [self.arrays[name] for name in POSITIONAL[self.operation]]

    def keyword_arrays(self) -> dict[str, Array]:
        names = self.arrays.keys() - set(POSITIONAL[self.operation])
        return {name: array for name in sorted(names) if (array := self.arrays[name]) is not None}

    def array(self, name: str) -> Array:
        """An array that the call has."""
        array = self.arrays[name]
        if array is None:
            raise KeyError(f"{self.case.name}: {self.operation} without {name}")
        return array

    def with_arrays(self, **arrays: Array | None) -> Call:
        return Call(self.case, {**self.arrays, **arrays}, self.options)

    def with_options(self, **options: Any) -> Call:
        return Call(self.case, self.arrays, {**self.options, **options})


def window_bounds(case: Case) -> tuple[int | None, int | None]:
    """How many keys to the left and to the right of its own position a row may see; None is no bound."""
    if case.window is None:
        return None, None
    if isinstance(case.window, tuple):
        return case.window
    if case.operation == "attention":
        return case.window, case.window
    return case.window - 1, 0 if case.operation == "ragged_decode_attention" else None


def build(case: Case, seed: int = 0, *, poisoned: bool = True) -> Call:
    """Arrays and options of `case`, the same for the same seed."""
    rng = np.random.default_rng([seed, len(case.name), *case.name.encode()])
    if case.operation in PAGED:
        return _paged(case, rng, poisoned)
    if case.operation == "ragged_decode_attention":
        return _ragged(case, rng, poisoned)
    return _dense(case, rng, poisoned)


def _normal(case: Case, rng: np.random.Generator, *shape: int, kind: str) -> Array:
    """Standard normal values; `kind` is "query", "key" or "value"."""
    values = rng.standard_normal(shape)
    if case.negative_logits and kind != "value":
        values = (np.abs(values) + 5.0) * (1.0 if kind == "query" else -1.0)
    if kind == "query":
        return (values * case.query_gain).astype(numpy_dtype(case.dtype))
    dtype = numpy_dtype(case.stored_dtype)
    if case.kv_scale != "none":
        values = values * STORED_SPREAD
    if dtype == np.int8:
        values = np.clip(np.rint(values), -128, 127)
    return values.astype(dtype)


def _scales(case: Case) -> dict[str, Array | None]:
    """A key scale that brings the logits to order one, and a value scale on the other side of one."""
    if case.kv_scale == "none":
        return {"k_scale": None, "v_scale": None}
    k_scale = np.float32(1.0 / STORED_SPREAD)
    v_scale = np.float32(3.0)
    if case.kv_scale == "scalar":
        return {"k_scale": np.array(k_scale), "v_scale": np.array(v_scale)}
    heads = np.arange(case.num_kv_heads, dtype=np.float32)
    return {"k_scale": k_scale / (1.0 + heads), "v_scale": v_scale / (1.0 + 2.0 * heads)}


def _slopes(case: Case) -> Array | None:
    """The slopes of the ALiBi paper for a power-of-two number of heads."""
    if not case.alibi:
        return None
    heads = np.arange(1, case.num_q_heads + 1)
    return np.exp2(-8.0 * heads / case.num_q_heads).astype(np.float32)


def _sinks(case: Case, rng: np.random.Generator) -> Array | None:
    """Sinks below, around and above the logits; the last head's is much larger than any."""
    if case.sinks == 0:
        return None
    if case.shared_sinks:
        return rng.normal(1.0, 2.0, case.sinks).astype(np.float32)
    sinks = rng.normal(1.0, 2.0, (case.num_q_heads, case.sinks)).astype(np.float32)
    sinks[0] = -30.0
    sinks[-1] = 12.0
    if case.operation in PAGED or (case.operation == "attention" and case.sinks == 1):
        return sinks[:, 0]
    return sinks


def visible_range(case: Case, query_len: int, kv_len: int) -> tuple[int, int]:
    """The keys `[first, last)` that some row of a sequence of a paged operation sees."""
    if query_len == 0:
        return 0, 0
    left, right = window_bounds(case)
    first_position, last_position = kv_len - query_len, kv_len - 1
    first = 0 if left is None else max(0, first_position - left)
    last = kv_len if right is None or case.causal else min(kv_len, last_position + right + 1)
    return min(first, last), last


def _tables(case: Case, rng: np.random.Generator) -> tuple[Array, int]:
    """A page table `[S, MP]` of valid pages and the number of pages in the pool."""
    size = case.page_size
    needed = [-(-length // size) for length in case.kv_lens]
    width = max([*needed, 0]) + case.table_slack
    num_pages = max(1, sum(needed) + case.spare_pages)
    table = rng.integers(0, num_pages, (len(needed), width))
    if case.page_order == "duplicate":
        return table, num_pages
    order = rng.permutation(num_pages)
    start = 0
    for sequence, count in enumerate(needed):
        table[sequence, :count] = order[start : start + count]
        start += count
    if case.page_order == "shared" and needed:
        prefix = max(1, needed[0] // 2)
        for sequence, count in enumerate(needed):
            common = min(prefix, count)
            table[sequence, :common] = table[0, :common]
    return table, num_pages


def _paged(case: Case, rng: np.random.Generator, poisoned: bool) -> Call:
    size = case.page_size
    table, num_pages = _tables(case, rng)
    used_slots = np.zeros((num_pages, size), bool)
    used_entries = np.zeros(table.shape, bool)
    for sequence, (query_len, kv_len) in enumerate(zip(case.query_lens, case.kv_lens, strict=True)):
        positions = np.arange(*visible_range(case, query_len, kv_len))
        used_entries[sequence, positions // size] = True
        used_slots[table[sequence, positions // size], positions % size] = True
    keys = _normal(case, rng, num_pages, size, case.num_kv_heads, case.head_dim, kind="key")
    values = _normal(case, rng, num_pages, size, case.num_kv_heads, case.value_dim, kind="value")
    index_dtype = numpy_dtype(case.index_dtype)
    table = table.astype(index_dtype)
    if poisoned:
        keys, values = poison_unused(keys, used_slots), poison_unused(values, used_slots)
        unused = ~used_entries
        # A stream of its own: the rest of the call is the same with and without poison.
        table[unused] = wild_entries(int(unused.sum()), num_pages, index_dtype, np.random.default_rng(len(case.name)))
    axes = ["PTHD".index(axis) for axis in case.layout]
    arrays: dict[str, Array | None] = {
        "key_cache": np.ascontiguousarray(keys.transpose(axes)),
        "value_cache": np.ascontiguousarray(values.transpose(axes)),
        "attention_sink": _sinks(case, rng),
        "alibi_slopes": _slopes(case),
        **_scales(case),
    }
    options: dict[str, Any] = {"kv_layout": case.layout, "sliding_window": case.window, "return_lse": case.return_lse}
    lens = np.array(case.kv_lens, index_dtype)
    if case.operation == "page_attention":
        arrays |= {
            "query": _normal(case, rng, len(lens), case.num_q_heads, case.head_dim, kind="query"),
            "context_lens": lens,
            "block_tables": table,
        }
        options |= {
            "attn_scale": case.softmax_scale,
            "attn_logits_soft_cap": case.soft_cap,
            "num_splits": case.num_splits,
            "max_context_len": case.max_context_len,
        }
    elif case.operation == "prefill_page_attention":
        arrays |= {
            "query": _normal(case, rng, case.query_lens[0], case.num_q_heads, case.head_dim, kind="query"),
            "context_len": lens,
            "page_indices": table[0],
        }
        options |= {"softmax_scale": case.softmax_scale, "attn_logits_soft_cap": case.soft_cap}
    else:
        starts = case.leading_rows + np.cumsum([0, *case.query_lens])
        rows = int(starts[-1]) + case.trailing_rows
        queries = _normal(case, rng, rows, case.num_q_heads, case.head_dim, kind="query")
        if poisoned:
            owned = np.zeros(rows, bool)
            owned[starts[0] : starts[-1]] = True
            queries = poison_unused(queries, owned)
        arrays |= {
            "queries": queries,
            "kv_lens": lens,
            "block_tables": table,
            "query_start_loc": starts.astype(index_dtype),
            "qq_bias": rng.normal(0.0, 2.0, (case.qq_bias, case.qq_bias)).astype(np.float32) if case.qq_bias else None,
        }
        options |= {
            "softmax_scale": case.softmax_scale,
            "logits_soft_cap": case.soft_cap,
            "causal": case.causal,
        }
    return Call(case, arrays, options)


def _ragged(case: Case, rng: np.random.Generator, poisoned: bool) -> Call:
    batch = len(case.kv_lens)
    lens = np.array(case.kv_lens, np.int64)
    start = rng.integers(0, case.dense_len - lens + 1) if batch else lens
    end = start + lens
    left, _ = window_bounds(case)
    key = _normal(case, rng, batch, case.dense_len, case.num_kv_heads, case.head_dim, kind="key")
    value = _normal(case, rng, batch, case.dense_len, case.num_kv_heads, case.head_dim, kind="value")
    if poisoned:
        first = start if left is None else np.maximum(start, end - 1 - left)
        positions = np.arange(case.dense_len)
        used = (positions >= first[:, None]) & (positions < end[:, None])
        key, value = poison_unused(key, used), poison_unused(value, used)
    query = _normal(case, rng, batch, case.num_q_heads, case.head_dim, kind="query")
    index_dtype = numpy_dtype(case.index_dtype)
    return Call(
        case,
        {
            "query": query[:, None] if case.rank_four else query,
            "key": key,
            "value": value,
            "sequence_start": start.astype(index_dtype),
            "sequence_end": end.astype(index_dtype),
            "softmax_aux": _sinks(case, rng),
        },
        {
            "softmax_scale": case.softmax_scale,
            "sliding_window": case.window,
            "logits_soft_cap": case.soft_cap,
            "return_lse": case.return_lse,
        },
    )


def _mask(case: Case, rng: np.random.Generator) -> tuple[Array | None, dict[str, Array]]:
    """The boolean mask `[B, 1 or Hq, Q, K]` with a row and a key that see nothing; beside it segments or lengths."""
    rows, keys = case.query_lens[0], case.kv_lens[0]
    if case.mask == "none":
        return None, {}
    if case.mask == "segments":
        query_ids = np.sort(rng.integers(0, 3, (case.batch, rows)), axis=1).astype(np.int32)
        key_ids = np.sort(rng.integers(0, 3, (case.batch, keys)), axis=1).astype(np.int32)
        query_ids[:, -2:] = -1
        key_ids[:, -3:] = -1
        mask = (query_ids[:, :, None] == key_ids[:, None, :]) & (query_ids[:, :, None] >= 0)
        return mask[:, None], {"q_segment_ids": query_ids, "kv_segment_ids": key_ids}
    if case.mask == "lengths":
        lengths = rng.integers(0, keys + 1, case.batch).astype(np.int32)
        lengths[:1] = 0
        mask = np.arange(keys) < lengths[:, None, None, None]
        return np.broadcast_to(mask, (case.batch, 1, rows, keys)), {"key_lengths": lengths}
    heads = case.num_q_heads if case.mask == "heads" else 1
    mask = rng.random((case.batch, heads, rows, keys)) < 0.6
    mask[:, :, rows // 2, :] = False
    mask[:, :, :, keys // 3] = False
    return mask, {}


def dense_visibility(case: Case, mask: Array | None) -> Array:
    """Which keys each row may see: `[B, 1 or Hq, Q, K]`."""
    rows, keys = np.arange(case.query_lens[0])[:, None], np.arange(case.kv_lens[0])[None, :]
    visible = np.ones((case.batch, 1, rows.size, keys.size), bool) if mask is None else mask.copy()
    if case.causal:
        visible &= keys <= rows
    left, right = window_bounds(case)
    if left is not None:
        visible &= keys >= rows - left
    if right is not None:
        visible &= keys <= rows + right
    return visible


def _dense(case: Case, rng: np.random.Generator, poisoned: bool) -> Call:
    rows, keys = case.query_lens[0], case.kv_lens[0]
    mask, segments = _mask(case, rng)
    key = _normal(case, rng, case.batch, keys, case.num_kv_heads, case.head_dim, kind="key")
    value = _normal(case, rng, case.batch, keys, case.num_kv_heads, case.value_dim, kind="value")
    if poisoned:
        used = dense_visibility(case, mask).any(axis=(1, 2))
        key, value = poison_unused(key, used), poison_unused(value, used)
    bias = None
    if case.bias is not None:
        full = (case.batch, case.num_q_heads, rows)
        shape = tuple(size if wanted else 1 for size, wanted in zip(full, case.bias, strict=True))
        bias = rng.normal(0.0, 2.0, (*shape, keys)).astype(numpy_dtype(case.dtype))
        bias[:, :, -1, : keys // 2] = -np.inf
    return Call(
        case,
        {
            "query": _normal(case, rng, case.batch, rows, case.num_q_heads, case.head_dim, kind="query"),
            "key": key,
            "value": value,
            "bias": bias,
            "dropout_rng": None,
            "softmax_aux": _sinks(case, rng),
            "mask": mask,
            **segments,
        },
        {
            "softmax_scale": case.softmax_scale,
            "logits_soft_cap": case.soft_cap,
            "sliding_window": case.window,
            "causal": case.causal,
            "dtype": case.dtype,
            "return_weights": case.return_weights,
        },
    )
