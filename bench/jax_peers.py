"""Peers that are called from JAX, in the process of `bench.peers`, timed as our own operations are.

`pallas` is JAX's own paged attention, see `bench.jax_paged`: decoding only. `cudnn` is `jax.nn.dot_product_attention`,
which knows no pages: it gets the keys of every sequence one after another, gathered beforehand, outside the timed
region. `xla` is this project's own operation on `platform="xla"`: what JAX does without any kernel.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import ArgumentSet, AttentionCase, argument_sets, by_geometry, num_pool_pages
from bench.jax_paged import KV_LAYOUT as PALLAS_LAYOUT
from bench.jax_paged import jax_paged_attention
from bench.operations import OPERATIONS
from bench.peers import Answer, Request
from bench.runner import Pool, attend_case, call_arrays
from bench.timing import Timing, compile_program, measure_program

ON_GPU = jax.default_backend() == "gpu"

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class _Peer:
    facts: str
    layout: str
    lacks: Callable[[AttentionCase], str | None]
    """Words for what it does not do, or None."""
    arrays: Callable[[AttentionCase, Pool, ArgumentSet], Arrays]
    """What one call gets, in the order in which `attend` takes it."""
    attend: Callable[..., jax.Array]
    """One call, of a case and its arrays: `[T, Hq, D]`."""
    takes_caches: bool = True
    """Whether `attend` gets both caches before its arrays."""


def _pallas_lacks(case: AttentionCase) -> str | None:
    if not case.is_decode:
        return "several new tokens a sequence"
    if case.window is not None:
        return "windows"
    return "sinks" if case.sinks else None


def _pallas_arrays(case: AttentionCase, pool: Pool, arguments: ArgumentSet) -> Arrays:
    del pool
    query, lens, _, tables, _ = call_arrays(case, arguments)
    return query, lens, tables


def _pallas_attend(case: AttentionCase, *arrays: Any) -> jax.Array:
    key_cache, value_cache, query, lens, tables = arrays
    return jax_paged_attention(query, key_cache, value_cache, lens, tables, soft_cap=case.soft_cap)


def _cudnn_lacks(case: AttentionCase) -> str | None:
    if case.soft_cap is not None:
        return "soft caps"
    if case.sinks:
        return "sinks"
    if case.is_decode:
        return None if case.window is None else "windows over lengths"
    if case.query_lens != case.lengths or len(set(case.lengths)) > 1:
        return "chunks behind a context, or prompts of several lengths"
    return None


def _cudnn_arrays(case: AttentionCase, pool: Pool, arguments: ArgumentSet) -> Arrays:
    key, value = (_gathered(cache, arguments.block_tables, max(case.lengths)) for cache in pool.caches)
    query = jnp.asarray(arguments.query, jnp.bfloat16)
    return query, key, value, jnp.asarray(case.lengths, jnp.int32)


@functools.partial(jax.jit, static_argnums=2)
def _gathered(cache: jax.Array, tables: jax.Array, length: int) -> jax.Array:
    """The keys of every sequence one after another, `[S, length, Hkv, D]`, of a cache `[P, ps, Hkv, D]`."""
    pages = cache[tables]
    rows: jax.Array = pages.reshape(pages.shape[0], -1, *pages.shape[3:])
    return rows[:, :length]


def _cudnn_attend(case: AttentionCase, query: Any, key: Any, value: Any, lens: Any) -> jax.Array:
    rows = query.reshape(case.num_seqs, -1, case.num_q_heads, case.head_dim)
    masks: dict[str, Any] = {"key_value_seq_lengths": lens} if case.is_decode else {"is_causal": True}
    if case.window is not None:
        masks["local_window_size"] = (case.window - 1, 0)
    attended: jax.Array = jax.nn.dot_product_attention(
        rows, key, value, scale=case.head_dim**-0.5, implementation="cudnn" if ON_GPU else "xla", **masks
    )
    return attended.reshape(query.shape)


def _xla_attend(case: AttentionCase, *arrays: Any) -> jax.Array:
    return attend_case(OPERATIONS["unified_attention"], case, "PTHD", "xla", None, *arrays)


_PEERS = {
    "pallas": _Peer(
        "jax.experimental.pallas.ops.gpu.paged_attention, K/V [Hkv, P, ps, D], default sizes",
        PALLAS_LAYOUT,
        _pallas_lacks,
        _pallas_arrays,
        _pallas_attend,
    ),
    "cudnn": _Peer(
        "jax.nn.dot_product_attention(implementation='cudnn') over dense rows, gathered beforehand",
        "PTHD",
        _cudnn_lacks,
        _cudnn_arrays,
        _cudnn_attend,
        takes_caches=False,
    ),
    "xla": _Peer(
        "unified_attention(platform='xla'), K/V [P, ps, Hkv, D]",
        "PTHD",
        lambda case: None,
        lambda case, pool, arguments: call_arrays(case, arguments),
        _xla_attend,
    ),
}


def serve(request: Request, answer: Answer) -> None:
    """Time the cases of a request; those that the peer does not do are named."""
    peer = _PEERS[request.peer]
    answer.add_facts(**{request.peer: f"{peer.facts}, jax {jax.__version__}"})
    for group in by_geometry(request.cases).values():
        todo = []
        for case in group:
            if lack := peer.lacks(case):
                answer.add_error(case, f"{request.peer} does not do {lack}")
            else:
                todo.append(case)
        if todo:
            _time_group(peer, todo, request, answer)


def _time_group(peer: _Peer, cases: Sequence[AttentionCase], request: Request, answer: Answer) -> None:
    pool = Pool.build(cases[0].geometry, num_pool_pages(cases, request.pool_bytes), peer.layout)
    for case in cases:
        if time.monotonic() > request.deadline:
            answer.add_error(case, "time limit")
            continue
        try:
            timing, output = _time_case(peer, case, pool, request)
        except Exception as error:  # reported by the parent; the other cases still run
            answer.add_error(case, f"{type(error).__name__}: {error}")
        else:
            bits = np.asarray(jax.lax.bitcast_convert_type(output, jnp.int16))
            answer.add_timing(case, timing.low, timing.median, timing.high, bits)


def _time_case(peer: _Peer, case: AttentionCase, pool: Pool, request: Request) -> tuple[Timing, jax.Array]:
    """Seconds a call, and the output for argument set 0."""
    calls, chunks = case.rotation(request.max_calls)
    sets = [peer.arrays(case, pool, arguments) for arguments in argument_sets(case, pool.pages, calls * chunks)]
    program = compile_program(
        functools.partial(peer.attend, case),
        sets,
        shared=pool.caches if peer.takes_caches else (),
        calls_per_program=calls,
    )
    output = jnp.copy(program.run(0)[0])  # the next run overwrites it
    timing = measure_program(program, repeats=request.repeats, sample_seconds=request.sample_seconds)
    if not math.isfinite(timing.median) or timing.median <= 0:
        raise ArithmeticError("lost in noise: more calls took no longer than fewer")
    return timing, output
