"""Holds outputs to the float32 reference, on some query rows of each case."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import reference
from bench.cases import SEED, ArgumentSet, AttentionCase

CHECKED_SEQUENCES, CHECKED_ROWS = 16, 64
ROWS_AT_ONCE = 16  # of one sequence, by the reference

# Rounding an output to bfloat16 and rounding the weights to bfloat16 before they meet V each add a relative error of
# at most 2^-8 to a term, evenly spread: about 0.6 * 2^-8 of the norm of a row of head_dim values. Twice 2^-8 is three
# times that; one key left out of 4096 moves the worst of 32 heads by several times this.
ROW_TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class Check:
    """What the reference answers for some query rows of argument set 0."""

    rows: NDArray[np.intp]
    expected: NDArray[np.float32]  # [len(rows), Hq, D]

    def error(self, output: jax.Array) -> float:
        """Largest relative error of those rows of `output [T, Hq, D]`; NaN if anything at all is not finite."""
        if not bool(jnp.isfinite(output).all()):
            return math.nan
        return row_error(output[self.rows], self.expected)


def row_error(actual: Any, expected: Any) -> float:
    """Largest norm of a difference of rows (last axis), relative to the expected row."""
    return float(_largest_row_error(jnp.asarray(actual), jnp.asarray(expected)))


@jax.jit
def _largest_row_error(actual: jax.Array, expected: jax.Array) -> jax.Array:
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.max(jnp.linalg.norm(actual - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1))


def checked_rows(case: AttentionCase) -> NDArray[np.intp]:
    """Up to `CHECKED_ROWS` query rows: the first and the last of some sequences, and some drawn from all."""
    sequences = np.linspace(0, case.num_seqs - 1, min(case.num_seqs, CHECKED_SEQUENCES)).round().astype(np.intp)
    starts = case.query_start_loc
    edges = np.unique([starts[sequences], starts[sequences + 1] - 1])
    others = np.setdiff1d(np.arange(case.num_tokens), edges)
    drawn = np.random.default_rng(SEED).permutation(others)[: CHECKED_ROWS - len(edges)]
    return np.sort(np.append(edges, drawn)).astype(np.intp)


def build_check(case: AttentionCase, caches: tuple[jax.Array, jax.Array], layout: str, arguments: ArgumentSet) -> Check:
    """Run the float32 reference on the checked rows, each as the newest token of a sequence that ends there.

    Rows of one sequence run together, on its pages alone, copied out of the pool; so memory stays bounded. Their number
    and that of the pages are rounded up, so that few different shapes are compiled.
    """
    rows = checked_rows(case)
    starts = case.query_start_loc
    owners = np.searchsorted(starts, rows, side="right") - 1
    contexts = np.array(case.lengths) - np.array(case.query_lens)
    width = 1 << (case.table_width - 1).bit_length()
    expected = np.empty((len(rows), case.num_q_heads, case.head_dim), np.float32)
    for owner in np.unique(owners):
        places = np.flatnonzero(owners == owner)
        page_ids = np.zeros(width, np.int32)
        page_ids[: case.table_width] = arguments.block_tables[owner]
        for start in range(0, len(places), ROWS_AT_ONCE):
            chosen = places[start : start + ROWS_AT_ONCE]
            count = 1 << (len(chosen) - 1).bit_length()
            padded = rows[np.resize(chosen, count)]
            with jax.default_matmul_precision("highest"):
                answer = _attend_rows(
                    arguments.query[padded],
                    *caches,
                    (contexts[owner] + padded - starts[owner] + 1).astype(np.int32),
                    page_ids,
                    case.sink_logits,
                    layout=layout,
                    window=case.window,
                    soft_cap=case.soft_cap,
                )
            expected[chosen] = np.asarray(answer)[: len(chosen)]
    return Check(rows, expected)


@functools.partial(jax.jit, static_argnames=("layout", "window", "soft_cap"))
def _attend_rows(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    context_lens: jax.Array,
    page_ids: jax.Array,
    sinks: jax.Array | None,
    *,
    layout: str,
    window: int | None,
    soft_cap: float | None,
) -> Any:
    """The reference on rows of one sequence, `[R, Hq, D]`, with its pages `[W]` as float32."""
    pages = (jnp.take(cache, page_ids, axis=layout.index("P")) for cache in (key_cache, value_cache))
    tables = jnp.broadcast_to(jnp.arange(page_ids.size, dtype=jnp.int32), (query.shape[0], page_ids.size))
    return reference.page_attention(
        query,
        *(page.astype(jnp.float32) for page in pages),
        context_lens,
        tables,
        sliding_window=window,
        attn_logits_soft_cap=soft_cap,
        attention_sink=sinks,
        kv_layout=layout,
    )
