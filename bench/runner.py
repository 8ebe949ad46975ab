"""Compiles, times and checks one operation on cases that share a cache."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench.cases import KEY_SALT, VALUE_SALT, ArgumentSet, AttentionCase, Geometry, argument_sets, scramble
from bench.check import ROW_TOLERANCE, Check, build_check
from bench.operations import Config, Operation, config_name
from bench.results import CaseReport, Measurement
from bench.timing import CompiledCalls, compile_calls, measure_program
from jax_bridge.layouts import CacheSizes, cache_shape

PROGRAMS_AHEAD = 32  # compiled in threads before any of them is timed
SWEEP_FINALISTS = 3

Compiled = CompiledCalls | str
"""What a configuration compiled to, or how it failed."""


class Sampling(NamedTuple):
    """How often and how long to time."""

    repeats: int
    sample_seconds: float


SWEEP_SAMPLING = Sampling(5, 0.008)


@dataclass(frozen=True)
class Pool:
    """The K and V caches that the cases of one geometry share."""

    pages: int
    layout: str
    caches: tuple[jax.Array, jax.Array]

    @classmethod
    def build(cls, geometry: Geometry, pages: int, layout: str) -> Pool:
        key_cache, value_cache = (build_cache(geometry, pages, layout, salt) for salt in (KEY_SALT, VALUE_SALT))
        return cls(pages, layout, (key_cache, value_cache))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def build_cache(geometry: Geometry, pages: int, layout: str, salt: int) -> jax.Array:
    """A cache in `layout` whose contents depend on page, token, head and dim alone, as in the peers' caches."""
    shape = cache_shape(layout, CacheSizes(pages, geometry.page_size, geometry.num_kv_heads, geometry.head_dim))
    page, token, head, dim = (jax.lax.broadcasted_iota(jnp.uint32, shape, layout.index(axis)) for axis in "PTHD")
    within = (token * jnp.uint32(geometry.num_kv_heads) + head) * jnp.uint32(geometry.head_dim) + dim
    values: jax.Array = scramble(page, within, salt, jnp.uint32).astype(jnp.int32) - 128
    return (values.astype(jnp.float32) / 64).astype(jnp.bfloat16)


class Outcome(NamedTuple):
    """What came of one case: all measurements, the check, and the first right output for argument set 0."""

    measurements: list[Measurement]
    check: Check | None = None
    output: jax.Array | None = None


@dataclass(frozen=True)
class Bench:
    """How to compile, time and check one operation."""

    operation: Operation
    platform: str
    max_calls: int
    jobs: int
    check: bool
    deadline: float

    def run(
        self, cases: Sequence[AttentionCase], configs: Sequence[Config], pool: Pool, sampling: Sampling, *, sweep: bool
    ) -> Iterator[tuple[AttentionCase, Outcome]]:
        """Time every case with every configuration; a sweep times all shortly and the fastest ones again."""
        for case, compiled in self._compile_all(cases, configs, pool):
            outcome = self._time_case(case, compiled, pool, SWEEP_SAMPLING if sweep else sampling)
            if sweep:
                outcome = self._refine(case, compiled, pool, sampling, outcome)
            yield case, outcome

    def _compile_all(
        self, cases: Sequence[AttentionCase], configs: Sequence[Config], pool: Pool
    ) -> Iterator[tuple[AttentionCase, dict[str, Compiled]]]:
        """Every case with its compiled configurations by name, some cases ahead of the one that is timed."""
        ahead = max(1, PROGRAMS_AHEAD // len(configs))
        with ThreadPoolExecutor(self.jobs) as threads:
            for start in range(0, len(cases), ahead):
                pairs = list(itertools.product(cases[start : start + ahead], configs))
                results = threads.map(lambda pair: self._compile(pair[0], pair[1], pool), pairs)
                compiled: dict[str, dict[str, Compiled]] = {}
                for (case, config), result in zip(pairs, results, strict=True):
                    compiled.setdefault(case.name, {})[config_name(config)] = result
                for case in cases[start : start + ahead]:
                    yield case, compiled.pop(case.name)  # executables hold memory of the device

    def _compile(self, case: AttentionCase, config: Config, pool: Pool) -> Compiled:
        """The calls of one program, or how that failed: a sweep meets configurations that do not fit."""
        if time.monotonic() > self.deadline:
            return "time limit"
        calls, _ = case.rotation(self.max_calls)
        try:
            cfg = self.operation.config_type(**config) if config else None
            fn = functools.partial(attend_case, self.operation, case, pool.layout, self.platform, cfg)
            return compile_calls(fn, [_call_shapes(case)] * calls, shared=pool.caches)
        except Exception as error:
            return _words(error)

    def _time_case(
        self, case: AttentionCase, compiled: Mapping[str, Compiled], pool: Pool, sampling: Sampling
    ) -> Outcome:
        if time.monotonic() > self.deadline:
            return Outcome([Measurement(name, None, failure="time limit") for name in compiled])
        calls, chunks = case.rotation(self.max_calls)
        plain_sets = argument_sets(case, pool.pages, calls * chunks)
        check = build_check(case, pool.caches, pool.layout, plain_sets[0]) if self.check else None
        sets = [call_arrays(case, plain_set) for plain_set in plain_sets]
        outcome = Outcome([], check)
        for name, executable in compiled.items():
            measurement, output = self._time(name, executable, sets, pool, check, sampling)
            outcome.measurements.append(measurement)
            if outcome.output is None and measurement.failure is None:
                outcome = outcome._replace(output=output)
        return outcome

    def _time(
        self,
        name: str,
        compiled: Compiled,
        sets: Sequence[tuple[Any, ...]],
        pool: Pool,
        check: Check | None,
        sampling: Sampling,
    ) -> tuple[Measurement, jax.Array | None]:
        if isinstance(compiled, str):
            return Measurement(name, None, failure=compiled), None
        if time.monotonic() > self.deadline:
            return Measurement(name, None, failure="time limit"), None
        try:
            program = compiled.bind(sets, shared=pool.caches)
            output = jnp.copy(program.run(0)[0])  # the next run overwrites it
            error_found = check.error(output) if check else None
            timing = measure_program(program, **sampling._asdict())
        except Exception as error:
            return Measurement(name, None, failure=_words(error)), None
        failure = None
        if error_found is not None and not error_found <= ROW_TOLERANCE:
            failure = f"wrong: row error {error_found:.2e} exceeds {ROW_TOLERANCE:.2e}"
        elif timing.median <= 0:
            failure = "lost in noise: more calls took no longer than fewer"
        return Measurement(name, timing, error_found, failure), output

    def _refine(
        self, case: AttentionCase, compiled: Mapping[str, Compiled], pool: Pool, sampling: Sampling, quick: Outcome
    ) -> Outcome:
        """Time the fastest configurations of a sweep again."""
        ranking = CaseReport(case, tuple(quick.measurements), {}, {}).timed
        finalists = {measurement.config: compiled[measurement.config] for _, measurement in ranking[:SWEEP_FINALISTS]}
        again = self._time_case(case, finalists, pool, sampling).measurements
        settled = {measurement.config: measurement for measurement in again if measurement.failure is None}
        return quick._replace(measurements=[settled.get(m.config, m) for m in quick.measurements])


def attend_case(
    operation: Operation, case: AttentionCase, layout: str, platform: str, cfg: Any, *arrays: Any
) -> jax.Array:
    """One call of an operation on a case, whose arrays are both caches and what `call_arrays` answers."""
    key_cache, value_cache, query, kv_lens, starts, tables, sinks = arrays
    attended: jax.Array = operation.call(
        query,
        key_cache,
        value_cache,
        kv_lens,
        starts,
        tables,
        case.soft_cap,
        sliding_window=case.window,
        attention_sink=sinks,
        kv_layout=layout,
        platform=platform,
        cfg=cfg,
    )
    return attended


def call_arrays(case: AttentionCase, arguments: ArgumentSet) -> tuple[Any, ...]:
    """What one call gets after the caches: query, kv_lens, query_start_loc, block_tables, sinks."""
    sinks = case.sink_logits
    return (
        jnp.asarray(arguments.query, jnp.bfloat16),
        jnp.array(case.lengths, jnp.int32),
        jnp.asarray(case.query_start_loc),
        jnp.asarray(arguments.block_tables),
        None if sinks is None else jnp.asarray(sinks),
    )


def _call_shapes(case: AttentionCase) -> tuple[Any, ...]:
    """Shapes and dtypes of `call_arrays`."""
    return (
        jax.ShapeDtypeStruct((case.num_tokens, case.num_q_heads, case.head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((case.num_seqs,), jnp.int32),
        jax.ShapeDtypeStruct((case.num_seqs + 1,), jnp.int32),
        jax.ShapeDtypeStruct((case.num_seqs, case.table_width), jnp.int32),
        jax.ShapeDtypeStruct((case.num_q_heads,), jnp.float32) if case.sinks else None,
    )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
