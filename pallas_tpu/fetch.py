"""Copies between HBM and VMEM: keys block by block into two slots, queries and answers tile by tile."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_tpu.schedule import Item, Scalar, quotient
from pallas_tpu.specialization import DenseRows, Pages, Specialization


def head_keys(buffer: Any, slot: Scalar, head: Scalar, spec: Specialization) -> jax.Array:
    """The keys or values `[N, D]` of one head in a slot."""
    if spec.source.tokens_first:
        return buffer[slot, :, head]
    pages = buffer[slot, :, head]  # [pages, ps, D]
    return pages.reshape(spec.blocks.keys, pages.shape[-1])


def start_keys(item: Item, block: Scalar, slot: Scalar, refs: Any, spec: Specialization) -> None:
    """Ask for a block of keys: only for the pages or tokens that a row of the item sees."""
    _for_each_copy(item, block, slot, refs, spec, lambda copy: copy.start())


def wait_for_keys(item: Item, block: Scalar, slot: Scalar, refs: Any, spec: Specialization) -> None:
    """Wait until the block that `start_keys` asked for with the same arguments is there."""
    _for_each_copy(item, block, slot, refs, spec, lambda copy: copy.wait())


def _for_each_copy(item: Item, block: Scalar, slot: Scalar, refs: Any, spec: Specialization, act: Any) -> None:
    source, first_key = spec.source, item.origin + block * spec.blocks.keys
    num_keys = jnp.clip(item.key_end - first_key, 0, spec.blocks.keys)
    if isinstance(source, DenseRows):

        @pl.when(num_keys > 0)
        def whole() -> None:
            for copy in _dense_copies(item.sequence, first_key, num_keys, slot, refs):
                act(copy)

        return
    first_page, pages = quotient(first_key, source.page_size), source

    @pl.loop(0, quotient(num_keys + source.page_size - 1, source.page_size))
    def each(page: Scalar) -> None:
        for copy in _page_copies(item.sequence, first_page, page, slot, refs, spec, pages):
            act(copy)


def _dense_copies(row: Scalar, first_key: Scalar, num_keys: Scalar, slot: Scalar, refs: Any) -> Iterator[Any]:
    wanted, room = pl.ds(first_key, num_keys), pl.ds(0, num_keys)
    for kind, (cache, buffer) in enumerate(((refs.keys, refs.key_buffer), (refs.values, refs.value_buffer))):
        yield pltpu.make_async_copy(cache.at[row, wanted], buffer.at[slot, room], refs.key_semaphores.at[kind, slot])


def _page_copies(
    sequence: Scalar, first_page: Scalar, page: Scalar, slot: Scalar, refs: Any, spec: Specialization, pages: Pages
) -> Iterator[Any]:
    """The copies of K and V of the page at place `first_page + page` of a sequence."""
    # The table is data: whatever stands there must not lead outside the cache.
    page_id = jnp.clip(refs.table[sequence * pages.table_width + first_page + page], 0, pages.num_pages - 1)
    where = {"P": page_id, "T": slice(None), "H": slice(None)}
    if spec.split.over_heads:
        where["H"] = pl.ds(pl.program_id(0) * spec.num_kv_heads, spec.num_kv_heads)
    source = tuple(where[axis] for axis in pages.layout[:3])
    room = pl.ds(page * pages.page_size, pages.page_size) if pages.tokens_first else page
    for kind, (cache, buffer) in enumerate(((refs.keys, refs.key_buffer), (refs.values, refs.value_buffer))):
        yield pltpu.make_async_copy(cache.at[source], buffer.at[slot, room], refs.key_semaphores.at[kind, slot])


def start_queries(item: Item, refs: Any, spec: Specialization) -> None:
    """Ask for the queries of an item."""

    @pl.when(item.num_tokens > 0)
    def start() -> None:
        _query_copy(item, refs, spec).start()


def wait_for_queries(item: Item, refs: Any, spec: Specialization) -> None:
    """Wait for the queries of an item."""

    @pl.when(item.num_tokens > 0)
    def wait() -> None:
        _query_copy(item, refs, spec).wait()


def _core(spec: Specialization) -> Scalar:
    """Which part of the heads is ours."""
    return pl.program_id(0) if spec.split.over_heads else 0


def _query_copy(item: Item, refs: Any, spec: Specialization) -> Any:
    rows = refs.queries.at[pl.ds(item.row, item.num_tokens), _core(spec)]
    return pltpu.make_async_copy(rows, refs.query_buffer.at[pl.ds(0, item.num_tokens)], refs.query_semaphore.at[0])


def send_answers(item: Item, refs: Any, spec: Specialization) -> None:
    """Start the copies of an item's answers to HBM. `wait_for_answers` must have freed their buffers."""
    refs.unsent[0] = item.row
    refs.unsent[1] = item.num_tokens

    @pl.when(item.num_tokens > 0)
    def start() -> None:
        for copy in _answer_copies(item.row, item.num_tokens, refs, spec):
            copy.start()


def wait_for_answers(refs: Any, spec: Specialization) -> None:
    """Wait until the answers that were sent last have left their buffers."""

    @pl.when(refs.unsent[1] > 0)
    def wait() -> None:
        for copy in _answer_copies(refs.unsent[0], refs.unsent[1], refs, spec):
            copy.wait()

    refs.unsent[1] = 0


def _answer_copies(row: Scalar, num_tokens: Scalar, refs: Any, spec: Specialization) -> Iterator[Any]:
    answers = [(refs.out, refs.out_buffer)]
    if spec.return_lse:
        answers.append((refs.lse, refs.lse_buffer))
    for kind, (array, buffer) in enumerate(answers):
        rows = array.at[pl.ds(row, num_tokens), _core(spec)]
        yield pltpu.make_async_copy(buffer.at[pl.ds(0, num_tokens)], rows, refs.answer_semaphores.at[kind])
