"""Checks of values, which tracing cannot see: for debugging, as they read the arrays."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_bridge.operation import INDEX_ARGUMENTS, Invocation
from jax_bridge.registry import find_operation
from jax_bridge.validation import describe, listed_errors, listing

Values = Mapping[str, np.ndarray]


def check_values(op: Any, *args: Any, **kwargs: Any) -> None:
    """Check that the arguments fit, and that lengths, tables and slots stay inside the arrays they refer to.

    Args:
        op: an operation's name, function or object.
        *args: the arguments of the call, with concrete arrays.
        **kwargs: the keyword arguments of the call; `platform`, `cfg` and those of sharding do not matter.

    Raises:
        ValueError: lists every problem: arrays of a wrong type, dtype or shape, or other arguments that the call would
            refuse; where there is none of these, values out of range.
        TypeError: an array is not concrete, or the operation has no such arguments.
    """
    operation = find_operation(op)
    elsewhere = ("platform", "cfg", "mesh", "in_specs", "out_specs")
    options = {name: value for name, value in kwargs.items() if name not in elsewhere}
    operation.check_names(*args, **options)
    with listed_errors() as refused:
        invocation = listing(operation.invocation, operation.name, refused)(*args, **options)
    if refused:
        raise _summary(operation.name, [str(error).removeprefix(f"{operation.name}: ") for error in refused])
    values = {
        name: _concrete(operation.name, name, array)
        for name, array in invocation.arrays.items()
        if array is not None and name in _READ
    }
    if problems := [*_scales(values), *_CHECKS.get(operation.name, _nothing)(invocation, values)]:
        raise _summary(operation.name, problems)


def _summary(operation: str, problems: Sequence[str]) -> ValueError:
    count = f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}"
    return ValueError("\n".join([f"{operation}: {count}", *(f"- {p}" for p in problems)]))


_READ = INDEX_ARGUMENTS | {"k_scale", "v_scale"}


def _concrete(operation: str, name: str, array: Any) -> np.ndarray:
    if isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"{operation}: {name} is {describe(array)}, expected a concrete array, as check_values reads it"
        )
    return np.asarray(array) if name in ("k_scale", "v_scale") else np.asarray(array).astype(object)


def _nothing(invocation: Invocation, values: Values) -> Iterator[str]:
    del invocation, values
    yield from ()


def _scales(values: Values) -> Iterator[str]:
    for name in ("k_scale", "v_scale"):
        if name in values:
            scale = values[name].astype(np.float32)
            if not (np.isfinite(scale) & (scale != 0)).all():
                yield f"{name} holds {scale.tolist()}, expected finite numbers other than 0"


def _pages(
    invocation: Invocation, lengths_name: str, lengths: Any, tables_name: str, tables: Any, query_lens: Any
) -> Iterator[str]:
    """Problems of lengths and of the page ids that they make used."""
    sizes, options = invocation.sizes, invocation.options
    capacity = sizes.table_width * sizes.page_size
    bound = getattr(options, "max_context_len", None)
    for sequence, (length, table, query_len) in enumerate(zip(lengths, tables, query_lens, strict=True)):
        where = f"{lengths_name}[{sequence}] is {length}"
        if length < 0:
            yield f"{where}, expected >= 0"
        if length > capacity:
            yield f"{where}, expected at most {capacity}: {sizes.table_width} pages of {sizes.page_size} tokens"
        if bound is not None and length > bound:
            yield f"{where}, expected at most max_context_len = {bound}"
        if query_len == 0:  # its keys are not read
            continue
        first_row = max(0, length - query_len)
        first_key = 0 if options.window is None else max(0, first_row - options.window[0])
        last_page = -(-min(length, capacity) // sizes.page_size)
        for slot in range(first_key // sizes.page_size, last_page):
            if not 0 <= table[slot] < sizes.num_pages:
                entry = f"{tables_name}[{sequence}, {slot}]" if len(tables) > 1 or tables_name == "block_tables" else ""
                entry = entry or f"{tables_name}[{slot}]"
                yield f"{entry} is {table[slot]}, expected a page from 0 to {sizes.num_pages - 1}"


def _page_attention(invocation: Invocation, values: Values) -> Iterator[str]:
    lengths = values["context_lens"]
    yield from _pages(
        invocation, "context_lens", lengths, "block_tables", values["block_tables"], np.ones(len(lengths), int)
    )


def _prefill(invocation: Invocation, values: Values) -> Iterator[str]:
    lengths = values["context_len"].reshape(1)
    tables = values["page_indices"][None]
    yield from _pages(invocation, "context_len", lengths, "page_indices", tables, [invocation.sizes.num_tokens])


def _unified(invocation: Invocation, values: Values) -> Iterator[str]:
    starts, num_tokens = values["query_start_loc"], invocation.sizes.num_tokens
    for place, start in enumerate(starts):
        if not 0 <= start <= num_tokens:
            yield f"query_start_loc[{place}] is {start}, expected from 0 to the {num_tokens} rows of queries"
        if place and start < starts[place - 1]:
            yield f"query_start_loc[{place}] is {start}, expected at least {starts[place - 1]} as in the entry before"
    query_lens = starts[1:] - starts[:-1]
    yield from _pages(invocation, "kv_lens", values["kv_lens"], "block_tables", values["block_tables"], query_lens)


def _ragged(invocation: Invocation, values: Values) -> Iterator[str]:
    kv_len = invocation.sizes.kv_len
    for name in ("sequence_start", "sequence_end"):
        for row, position in enumerate(values[name]):
            if not 0 <= position <= kv_len:
                yield f"{name}[{row}] is {position}, expected from 0 to L = {kv_len}"


def _dense(invocation: Invocation, values: Values) -> Iterator[str]:
    kv_len = invocation.sizes.kv_len
    for row, length in enumerate(values.get("key_lengths", ())):
        if not 0 <= length <= kv_len:
            yield f"key_lengths[{row}] is {length}, expected from 0 to K = {kv_len}"


def _write(invocation: Invocation, values: Values) -> Iterator[str]:
    num_slots = invocation.sizes.num_pages * invocation.sizes.page_size
    seen: dict[int, int] = {}
    for token, slot in enumerate(values["slot_mapping"]):
        if slot >= num_slots:
            yield f"slot_mapping[{token}] is {slot}, expected below the {num_slots} slots of the cache"
        if slot >= 0 and seen.setdefault(slot, token) != token:
            yield f"slot_mapping[{token}] is {slot}, the slot of token {seen[slot]}, expected a slot of its own"


_CHECKS: dict[str, Callable[[Invocation, Values], Iterator[str]]] = {
    "page_attention": _page_attention,
    "prefill_page_attention": _prefill,
    "unified_attention": _unified,
    "ragged_decode_attention": _ragged,
    "attention": _dense,
    "write_kv_pages": _write,
}
