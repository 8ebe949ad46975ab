"""Seconds that a call keeps a device busy: many calls to a program, so that neither launches nor the host decide."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_IN_FLIGHT = 24  # JAX blocks the host at 32 computations in flight, which would be read as a slow host


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over repeats, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float
    host: float
    """Seconds a call that the host needed to enqueue the work; near `median` the host was the bottleneck."""

    @classmethod
    def of(cls, samples: Sequence[float], host: float = 0.0) -> Timing:
        low, median, high = (float(x) for x in np.quantile(samples, (0.1, 0.5, 0.9)))
        return cls(median, low, high, host)

    @property
    def host_bound(self) -> bool:
        return self.host > 0.85 * self.median


@dataclass
class Program:
    """Several calls compiled into one executable, and the groups of arguments that it takes in turn.

    Every execution donates the outputs of the one before, as a serving loop does: addresses stay the same, so that XLA
    replays its command buffers instead of recording them anew.
    """

    compiled: Callable[..., Any]
    shared: tuple[Any, ...]
    chunks: Sequence[tuple[tuple[Any, ...], ...]]
    outputs: tuple[Any, ...]

    @property
    def calls(self) -> int:
        return len(self.chunks[0])

    def run(self, index: int) -> tuple[Any, ...]:
        """Enqueue the program on its `index`-th group of arguments; its outputs, valid until the next run."""
        self.outputs = self.compiled(self.shared, self.chunks[index % len(self.chunks)], self.outputs)
        return self.outputs


@dataclass(frozen=True)
class CompiledCalls:
    """Several calls compiled into one executable that has no arrays yet."""

    compiled: Callable[..., Any]
    calls: int
    output_shapes: tuple[Any, ...]

    def bind(self, argument_sets: Sequence[tuple[Any, ...]], *, shared: tuple[Any, ...] = ()) -> Program:
        """The program over `argument_sets`, which it runs on in groups, one after another.

        Outputs start as NaN, so that what a call leaves unwritten shows.

        Raises:
            ValueError: the number of sets is not a positive multiple of the calls.
        """
        chunks = _chunks(argument_sets, self.calls)
        return Program(self.compiled, shared, chunks, jax.tree.map(_unwritten, self.output_shapes))


def _chunks(argument_sets: Sequence[tuple[Any, ...]], calls: int) -> list[tuple[tuple[Any, ...], ...]]:
    if calls < 1 or not argument_sets or len(argument_sets) % calls:
        raise ValueError(f"{len(argument_sets)} argument sets cannot be split into programs of {calls} calls")
    return [tuple(argument_sets[start : start + calls]) for start in range(0, len(argument_sets), calls)]


def _unwritten(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.full(shape.shape, jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0, shape.dtype)


def compile_calls(
    fn: Callable[..., Any],
    argument_sets: Sequence[tuple[Any, ...]],
    *,
    shared: tuple[Any, ...] = (),
    chained: bool = False,
    compiler_options: Mapping[str, str] | None = None,
) -> CompiledCalls:
    """Compile one program that calls `fn(*shared, *arguments)` for each of `argument_sets`.

    Every output is an output of the program, so nothing is dead code; the sets are parameters of their own, so equal
    calls are not merged.

    Args:
        fn: traceable function.
        argument_sets: arrays or their `jax.ShapeDtypeStruct`s for each call; all of the same shapes.
        shared: leading arguments that every call gets, such as a cache; arrays or `jax.ShapeDtypeStruct`s.
        chained: whether a call's first argument behind the shared ones is the output of the call before, as queries
            are in a model: no two calls run at once then.
        compiler_options: of XLA, for this program.
    """
    inner = jax.jit(fn)  # traced and lowered once for all calls of the program

    def program(common: tuple[Any, ...], sets: tuple[tuple[Any, ...], ...], reused: Any) -> tuple[Any, ...]:
        del reused
        outputs: list[Any] = []
        for first, *others in sets:
            outputs.append(inner(*common, outputs[-1] if chained and outputs else first, *others))
        return tuple(outputs)

    sets = tuple(argument_sets)
    shapes = jax.eval_shape(functools.partial(program, reused=None), shared, sets)
    step = jax.jit(program, donate_argnames="reused", keep_unused=True)
    compiled = step.lower(shared, sets, shapes).compile(dict(compiler_options or {}))
    return CompiledCalls(compiled, len(sets), shapes)


def compile_program(
    fn: Callable[..., Any],
    argument_sets: Sequence[tuple[Any, ...]],
    *,
    shared: tuple[Any, ...] = (),
    calls_per_program: int | None = None,
    **options: Any,
) -> Program:
    """Compile one program that calls `fn(*shared, *arguments)` for `calls_per_program` argument sets.

    Args:
        fn: traceable function.
        argument_sets: one tuple of arrays for each call; all of the same shapes.
        shared: leading arguments that every call gets, such as a cache.
        calls_per_program: calls in one program; default: all sets. The program runs on one group of sets after another.
        **options: of `compile_calls`.

    Raises:
        ValueError: the number of sets is not a positive multiple of `calls_per_program`.
    """
    calls = len(argument_sets) if calls_per_program is None else calls_per_program
    first, *_ = _chunks(argument_sets, calls)
    return compile_calls(fn, first, shared=shared, **options).bind(argument_sets, shared=shared)


def measure(
    enqueue: Callable[[int], Any],
    *,
    calls: int = 1,
    repeats: int = 20,
    sample_seconds: float = 0.03,
    warm_up: int = 3,
) -> Timing:
    """Time `enqueue(index)`, which starts device work and returns arrays to wait for.

    A sample is what twice as many executions, enqueued back to back, take longer than once as many. So neither the time
    until the device starts on the first one nor the way back to the host counts, which CUDA events leave out too.

    Args:
        enqueue: called with 0, 1, 2, ...; must not wait for the device.
        calls: timed calls in one execution.
        repeats: samples.
        sample_seconds: aimed length of a sample.
        warm_up: executions before anything is timed.
    """
    executions = itertools.count()

    def batch(size: int) -> tuple[float, float]:
        start = time.perf_counter()
        result = None
        for _ in range(size):
            result = enqueue(next(executions))
        enqueued = time.perf_counter()
        jax.block_until_ready(result)
        return time.perf_counter() - start, enqueued - start

    batch(warm_up)
    single = batch(2)[0] / 2
    size = min(max(math.ceil(sample_seconds / single), 1), MAX_IN_FLIGHT // 2)
    batch(2 * size)
    samples = [(batch(size), batch(2 * size)) for _ in range(repeats)]
    per_call = size * calls
    host = float(np.median([enqueued for _, (_, enqueued) in samples])) / (2 * per_call)
    return Timing.of([(long - short) / per_call for (short, _), (long, _) in samples], host)


def measure_program(program: Program, *, repeats: int = 20, sample_seconds: float = 0.03) -> Timing:
    """Time one call of `program`, with as many warm-up executions as it has groups of arguments."""
    return measure(
        program.run,
        calls=program.calls,
        repeats=repeats,
        sample_seconds=sample_seconds,
        warm_up=max(3, len(program.chunks)),
    )
