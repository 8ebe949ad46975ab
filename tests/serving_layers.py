"""The layers of a serving step, each writing its cache and attending, in the ways that programs keep those caches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_bridge import unified_attention, write_kv_pages


class Batch(NamedTuple):
    """What layers share: lengths, page tables, first tokens and slots of new tokens, within the pages of a layer."""

    lens: Any
    tables: Any
    starts: Any
    slots: Any


Caches = tuple[Any, Any]
Step = Callable[..., tuple[Caches, jax.Array]]


def one_layer(platform: str, caches: Caches, query: Any, new: Any, batch: Batch) -> tuple[Caches, jax.Array]:
    """Keys and values `new`, `[2, T, Hkv, D]`, go into the caches, over which the queries then attend."""
    caches = write_kv_pages(*new, *caches, batch.slots, platform=platform)
    attended = unified_attention(query, *caches, batch.lens, batch.tables, batch.starts, platform=platform)
    return caches, attended


def carried(platform: str, caches: Caches, queries: Any, new: Any, batch: Batch, *, is_unrolled: bool = False) -> Any:
    """The pages of all layers follow one another in `[L * P, ps, Hkv, D]`, which a scan carries."""
    layers = len(queries)
    num_pages, page_size = caches[0].shape[0] // layers, caches[0].shape[1]

    def layer(caches: Caches, inputs: Any) -> tuple[Caches, jax.Array]:
        query, new, index = inputs
        here = batch._replace(
            tables=batch.tables + index * num_pages,
            slots=jnp.where(batch.slots < 0, -1, batch.slots + index * num_pages * page_size),
        )
        return one_layer(platform, caches, query, new, here)

    inputs = (queries, new, jnp.arange(layers))
    return jax.lax.scan(layer, caches, inputs, unroll=layers if is_unrolled else 1)


def scanned(platform: str, caches: Caches, queries: Any, new: Any, batch: Batch) -> Any:
    """Each layer has caches of its own in `[L, P, ps, Hkv, D]`, which a scan takes apart and puts together again."""

    def layer(_: None, inputs: Any) -> Any:
        caches, query, new = inputs
        return None, one_layer(platform, caches, query, new, batch)

    return jax.lax.scan(layer, None, (caches, queries, new))[1]


def assigned(platform: str, caches: Caches, queries: Any, new: Any, batch: Batch) -> Any:
    """Each layer has caches of its own in `[L, P, ps, Hkv, D]`, indexed and set by a loop in Python."""
    answers = []
    for layer in range(len(queries)):
        here = (caches[0][layer], caches[1][layer])
        written, attended = one_layer(platform, here, queries[layer], new[layer], batch)
        caches = (caches[0].at[layer].set(written[0]), caches[1].at[layer].set(written[1]))
        answers.append(attended)
    return caches, jnp.stack(answers)


STEPS: dict[str, Step] = {
    "carried": carried,
    "unrolled": functools.partial(carried, is_unrolled=True),
    "scanned": scanned,
    "assigned": assigned,
}
"""By the way caches are kept: functions of a platform, caches, queries `[L, T, Hq, D]`, new ones and the batch."""

ONE_CACHE = ("carried", "unrolled")
"""Those that keep the pages of all layers in one axis."""
