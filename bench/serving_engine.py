"""Runs planned steps on the device: a few fixed shapes, a compiled program each, and a record of steps for later."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from bench.serving_model import (
    AttentionChoice,
    Caches,
    ModelConfig,
    StepInputs,
    StepProbe,
    attention_only,
    init_caches,
    init_weights,
    probe_step,
    serve_step,
)
from bench.serving_scheduler import StepPlan

type HostStep = StepInputs[npt.NDArray[np.int32]]

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
RECORDS_PER_SHAPE = 2


class StepShape(NamedTuple):
    """Sizes of a compiled step: as many tokens as sequences where all decode, more where some read prompts."""

    sequences: int
    tokens: int

    @property
    def has_chunks(self) -> bool:
        return self.tokens > self.sequences


@dataclass
class StepRecords:
    """How often a shape ran, and a uniform sample of its steps (reservoir sampling)."""

    count: int = 0
    sample: list[HostStep] = field(default_factory=list)


@dataclass(frozen=True)
class AttentionShare:
    """Seconds of all steps of the replay, estimated from recorded steps that were timed alone."""

    attention_seconds: float
    step_seconds: float
    timed_steps: int

    @property
    def share(self) -> float:
        return self.attention_seconds / self.step_seconds if self.step_seconds else 0.0


class Compilations:
    """Counts every program that XLA compiles in this process while it is watched."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def watch(self) -> Iterator[Compilations]:
        def listen(event: str, duration_secs: float, **_: str | int) -> None:
            self.count += event == COMPILE_EVENT

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)


def row_buckets(largest: int) -> tuple[int, ...]:
    """The row counts that get a compiled step: a quarter of the largest, and the largest."""
    return tuple(sorted({-(-largest // 4), largest}))


class Engine:
    """Weights, caches and compiled steps of one replay."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        pool_pages: int,
        page_size: int,
        max_batch: int,
        max_context: int,
        step_tokens: int,
        attention: AttentionChoice,
        seed: int,
    ) -> None:
        self.config = config
        self.pool_pages = pool_pages
        self.page_size = page_size
        self.table_width = -(-max_context // page_size)
        decoding = (StepShape(rows, rows) for rows in row_buckets(max_batch))
        # Padding among the sequences costs next to nothing beside a chunk.
        mixed = (StepShape(max_batch, max(rows, max_batch + 1)) for rows in row_buckets(step_tokens))
        self.shapes = tuple(dict.fromkeys((*decoding, *mixed)))
        self.weights = init_weights(config, seed)
        self.caches = init_caches(config, pool_pages, page_size, attention.kv_layout)
        self.kv_layout = attention.kv_layout
        self.records: dict[StepShape, StepRecords] = {}
        self._random = np.random.default_rng(seed)
        # A fresh function object for each engine: jit shares its cache between wrappers of one function.
        self._step = jax.jit(functools.partial(serve_step, config=config, attention=attention), donate_argnums=1)
        self._probe = jax.jit(functools.partial(probe_step, config=config, attention=attention), donate_argnums=1)
        self._attention = jax.jit(functools.partial(attention_only, config=config, attention=attention))

    @property
    def compiled_steps(self) -> int:
        """How many programs the jitted step holds."""
        return int(self._step._cache_size())  # type: ignore[attr-defined]

    def warm_up(self, advance: Callable[[], None]) -> None:
        """Compile every shape on an empty step, calling `advance` after each."""
        for shape in self.shapes:
            self._run(self._empty_inputs(shape))
            advance()

    def run(self, plan: StepPlan) -> tuple[list[int], list[float]]:
        """Run a step and wait for it.

        Returns:
            Tokens and their logits: one for each of `plan.spans`.
        """
        inputs, shape = self.build_inputs(plan)
        self._record(shape, inputs)
        tokens, logits = self._run(inputs)
        count = len(plan.spans)
        return tokens[:count].tolist(), logits[:count].tolist()

    def _run(self, inputs: HostStep) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        self.caches, outputs = self._step(self.weights, self.caches, inputs)
        host = jax.device_get(outputs)
        return host.tokens, host.logits

    def probe(self, inputs: HostStep) -> StepProbe:
        """Run a recorded step again, answering the queries and outputs of attention in every layer.

        Its K/V are written again; what other requests left in the pages it reads has changed since.
        """
        self.caches, probe = self._probe(self.weights, self.caches, inputs)
        return probe

    def read_pages(
        self, layer: int, pages: npt.NDArray[np.int32], tokens: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """K and V of the first tokens of one sequence in one layer, each `[tokens, Hkv, D]`.

        Args:
            layer: the layer.
            pages: the sequence's whole table: of one width, so that nothing compiles but once.
            tokens: how many.
        """
        places = np.asarray(pages) + int(layer) * self.pool_pages
        to_token_major = [self.kv_layout.index(axis) for axis in "PTHD"]
        shape = (-1, self.config.kv_heads, self.config.head_dim)

        def read(cache: jax.Array) -> npt.NDArray[np.float64]:
            own = np.asarray(jnp.take(cache, places, axis=self.kv_layout.index("P"))).transpose(to_token_major)
            return own.reshape(shape)[:tokens].astype(np.float64)

        return read(self.caches.key), read(self.caches.value)

    def build_inputs(self, plan: StepPlan) -> tuple[HostStep, StepShape]:
        """The arrays of a step, padded to the smallest compiled shape that holds it."""
        spans = plan.spans
        starts = np.cumsum([0, *(span.count for span in spans)])
        shape = next(
            shape
            for shape in self.shapes
            if shape.sequences >= len(spans) and shape.tokens >= starts[-1] and shape.has_chunks == bool(plan.chunks)
        )
        inputs = self._empty_inputs(shape)
        inputs.query_start_loc[:] = starts[-1]
        inputs.query_start_loc[: len(starts)] = starts
        for row, span in enumerate(spans):
            stop = span.start + span.count
            rows = slice(starts[row], starts[row + 1])
            positions = np.arange(span.start, stop, dtype=np.int32)
            pages = np.asarray(span.request.pages, np.int32)
            inputs.tokens[rows] = span.request.tokens(span.start, stop)
            inputs.positions[rows] = positions
            inputs.slots[rows] = pages[positions // self.page_size] * self.page_size + positions % self.page_size
            inputs.kv_lens[row] = stop
            inputs.block_tables[row, : len(pages)] = pages
        return inputs, shape

    def _empty_inputs(self, shape: StepShape) -> HostStep:
        return StepInputs(
            tokens=np.zeros(shape.tokens, np.int32),
            positions=np.zeros(shape.tokens, np.int32),
            slots=np.full(shape.tokens, -1, np.int32),
            kv_lens=np.zeros(shape.sequences, np.int32),
            block_tables=np.zeros((shape.sequences, self.table_width), np.int32),
            query_start_loc=np.zeros(shape.sequences + 1, np.int32),
        )

    def _record(self, shape: StepShape, inputs: HostStep) -> None:
        records = self.records.setdefault(shape, StepRecords())
        records.count += 1
        if len(records.sample) < RECORDS_PER_SHAPE:
            records.sample.append(inputs)
        elif (place := int(self._random.integers(records.count))) < RECORDS_PER_SHAPE:
            records.sample[place] = inputs

    def measure_attention(self, repeats: int = 3) -> AttentionShare:
        """Time recorded steps twice: whole, and only their attention calls; weigh each shape by how often it ran."""
        attention_seconds = step_seconds = 0.0
        timed = 0
        for shape, records in self.records.items():
            query_shape = (shape.tokens, self.config.heads, self.config.head_dim)
            queries = jnp.asarray(self._random.standard_normal(query_shape), self.config.dtype)
            for inputs in records.sample:
                weight = records.count / len(records.sample)
                step_seconds += weight * _median_seconds(functools.partial(self._run, inputs), repeats)
                # The caches of this moment: the step above has been given, and has replaced, the ones before.
                attend = functools.partial(self._attention, queries, self.caches, inputs)
                attention_seconds += weight * _median_seconds(attend, repeats)
                timed += 1
        return AttentionShare(attention_seconds, step_seconds, timed)


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call that has run once before, for compilation."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cache_bytes(caches: Caches) -> int:
    """Bytes of K and V together."""
    return int(caches.key.nbytes + caches.value.nbytes)
