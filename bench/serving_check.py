"""Is what the replay served right? The books, the served tokens against a dense decoder, and recorded steps' attention
against float64 arithmetic, in this process and by the Triton kernel under Triton's interpreter."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array, lax

from bench.serving_engine import Engine, HostStep
from bench.serving_model import LayerWeights, ModelConfig, Weights
from bench.serving_scheduler import Request, RequestState, Scheduler

REPOSITORY = Path(__file__).resolve().parents[1]
DENSE_ROWS = 128  # dense lengths are padded to a multiple: few compilations
CHECKED_LAYERS = 4
CHECKED_SEQUENCES = 16  # of each of the recorded steps
CHECKED_ROWS = 16  # of each of these sequences
INTERPRETED_ROWS = 3  # of each of the sequences that the interpreter gets
INTERPRETED_TOKENS = 192  # and their keys
INTERPRETER_SECONDS = 300

type Floats = npt.NDArray[np.floating[Any]]


class CheckError(RuntimeError):
    """A result of the replay that must not be: it names what was expected and what came."""


@dataclass(frozen=True)
class Check:
    """One check in words, and whether it was passed; None: it could not be made."""

    name: str
    detail: str
    passed: bool | None


class Budget:
    """Time for one check: parts of its work are done in turn until it is used up, the first one in any case."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.done = 0
        self.planned = 0
        self._start = time.perf_counter()

    def parts[Part](self, planned: Sequence[Part]) -> Iterator[Part]:
        """Those of the parts that there is time for."""
        self.planned += len(planned)
        for part in planned:
            if self.done and time.perf_counter() - self._start > self.seconds:
                return
            yield part
            self.done += 1

    def __str__(self) -> str:
        spent = time.perf_counter() - self._start
        return (
            f"{self.done} of {self.planned} parts of the sample in {spent:.1f} s, the budget being {self.seconds:g} s"
        )


def check_books(requests: Sequence[Request], scheduler: Scheduler, *, unfinished: bool) -> Check:
    """Nothing lost, nothing served twice, every token computed and generated counted once.

    Args:
        requests: All that were submitted.
        scheduler: What served them.
        unfinished: Whether the replay ended before all of them were served or refused.

    Raises:
        CheckError: the books do not balance.
    """
    served = [request for request in requests if request.state is RequestState.SERVED]
    refused = sum(request.state is RequestState.REFUSED for request in requests)
    left = len(requests) - len(served) - refused
    if left and not unfinished:
        raise CheckError(f"{len(requests)} submitted, but {len(served)} served + {refused} refused")
    for request in served:
        if request.times_served != 1 or len(request.generated) != request.max_new_tokens:
            raise CheckError(
                f"request {request.index} was served {request.times_served} times with {len(request.generated)} "
                f"tokens, expected once with {request.max_new_tokens}"
            )
    generated = sum(len(request.generated) for request in requests)
    _expect_equal("generated tokens", scheduler.generated_tokens, "of all requests", generated)
    in_cache = sum(request.num_cached for request in requests if request.state is not RequestState.SERVED)
    needed = sum(request.tokens_to_compute for request in served)
    total = needed + in_cache + scheduler.dropped_tokens
    _expect_equal("computed tokens", scheduler.computed_tokens, "needed + computed again", total)
    held = [page for request in requests for page in request.pages]
    _expect_equal("pages in use", scheduler.pool.num_used, "held by requests", len(held))
    _expect_equal("pages held", len(held), "different pages", len(set(held)))
    if not unfinished:
        _expect_equal("pages in use at the end", scheduler.pool.num_used, "expected", 0)
    rest = f" + {left} unfinished" if left else ""
    return Check(
        "books",
        f"{len(requests)} submitted = {len(served)} served + {refused} refused{rest}; {generated} tokens generated, "
        f"each counted once; {scheduler.computed_tokens} tokens computed = {needed + in_cache} needed + "
        f"{scheduler.dropped_tokens} again after preemption; {scheduler.pool.num_used} pages left in use",
        True,
    )


def _expect_equal(what: str, got: int, other: str, expected: int) -> None:
    if got != expected:
        raise CheckError(f"{what}: {got}, but {other}: {expected}")


def check_served_tokens(engine: Engine, requests: Sequence[Request], count: int, budget: Budget) -> Check:
    """Compare all tokens and logits of `count` served requests, preempted ones first, with a decoder without cache."""
    candidates = [request for request in requests if request.state is RequestState.SERVED and request.generated]
    sample = sorted(candidates, key=lambda request: (-request.preemptions, request.index))[:count]
    worst = Deviation()
    tokens = preempted = 0
    for request in budget.parts(sample):
        sequence = request.tokens(0, request.num_tokens - 1)
        first = len(request.prompt) - 1
        exact = dense_logits(engine.weights, engine.config, sequence, first, "float32")
        rounded = dense_logits(engine.weights, engine.config, sequence, first, engine.config.dtype)
        # What the model's dtype alone costs, or, in float32, what another order of the same sums may.
        tolerance = 4 * float(np.abs(rounded - exact).max()) + 1e-4 * float(np.abs(exact).max())
        dense = exact[np.arange(len(exact)), request.generated]
        worst = max(worst, Deviation.of(np.asarray(request.logits), dense, tolerance))
        # A token other than the dense decoder's is right only where the two are a near tie.
        worst = max(worst, Deviation.of(exact.max(axis=1), dense, 2 * tolerance))
        tokens += len(request.generated)
        preempted += request.preemptions > 0
    return worst.check(
        "served tokens",
        f"{tokens} tokens of {budget.done} requests ({preempted} of them preempted) against a dense decoder without "
        f"cache, pages or chunks ({budget})",
    )


def check_step_attention(engine: Engine, seconds: float) -> Check:
    """Run two recorded steps again, one with and one without chunks, and compare attention with float64 arithmetic."""
    worst = Deviation()
    num_rows = 0
    spent = []
    layers = _spread(np.arange(engine.config.layers), CHECKED_LAYERS)
    steps = probed_steps(engine)
    for inputs in steps:
        probe = engine.probe(inputs)
        budget = Budget(seconds / len(steps))
        sequences = step_sequences(inputs)
        # Those that read prompts stand last in a step and come first here, as they are the fewest.
        places = _spread(np.arange(len(sequences)), CHECKED_SEQUENCES)[::-1]
        for sequence, layer in budget.parts([(sequences[place], layer) for place in places for layer in layers]):
            rows = _spread(sequence.rows, CHECKED_ROWS)
            context_lens = inputs.positions[rows] + 1
            queries, outputs = (np.asarray(array[layer], np.float64)[rows] for array in probe)
            keys, values = engine.read_pages(layer, sequence.pages, context_lens[-1])
            place = f"step of {len(sequences)} sequences and {sequences[-1].rows[-1] + 1} rows, layer {layer}, "
            worst = max(worst, rows_deviation(engine.config, queries, outputs, keys, values, context_lens, place))
            num_rows += len(rows)
        spent.append(str(budget))
    return worst.check(
        "attention",
        f"{num_rows} rows of {len(steps)} recorded steps and up to {len(layers)} layers against float64 arithmetic "
        f"({', '.join(spent)})",
    )


def probed_steps(engine: Engine) -> list[HostStep]:
    """Steps to look into, each of them a program to compile: of the shape that ran most, without and with chunks."""
    shapes = sorted(engine.records, key=lambda shape: -engine.records[shape].count)
    chosen = (next((shape for shape in shapes if shape.has_chunks == mixed), None) for mixed in (False, True))
    return [engine.records[shape].sample[0] for shape in chosen if shape is not None]


def check_interpreted_kernel(engine: Engine) -> Check:
    """Give a little of a recorded step to the Triton kernel, under Triton's interpreter in another process.

    Of the sequences with the fewest and the most rows it gets the last rows and the first keys.
    """
    name = "Triton kernel, interpreted"
    steps = probed_steps(engine)
    if not steps:
        return Check(name, "no step was recorded", None)
    inputs, layer, page_size = steps[-1], engine.config.layers - 1, engine.page_size
    by_rows = sorted(step_sequences(inputs), key=lambda sequence: len(sequence.rows))
    sequences = by_rows if len(by_rows) == 1 else [by_rows[0], by_rows[-1]]
    rows = [sequence.rows[-INTERPRETED_ROWS:] for sequence in sequences]
    lens = [min(int(inputs.positions[own[-1]]) + 1, INTERPRETED_TOKENS) for own in rows]
    queries = np.asarray(engine.probe(inputs).queries[layer], np.float32)
    # The pages of these sequences, one after the other, are cache enough: no need to carry the pool over.
    width = -(-max(lens) // page_size)
    contents = [engine.read_pages(layer, sequence.pages, width * page_size) for sequence in sequences]
    shape = (len(sequences) * width, page_size, engine.config.kv_heads, engine.config.head_dim)
    key_cache, value_cache = (np.concatenate([pair[side] for pair in contents]).reshape(shape) for side in (0, 1))
    arrays = {
        "queries": queries[np.concatenate(rows)],
        "key_cache": key_cache,
        "value_cache": value_cache,
        "kv_lens": np.asarray(lens, np.int32),
        "block_tables": np.arange(len(sequences) * width, dtype=np.int32).reshape(-1, width),
        "query_start_loc": np.cumsum([0, *map(len, rows)], dtype=np.int32),
    }
    outputs = np.split(interpret_unified_attention(arrays, engine.config.dtype), arrays["query_start_loc"][1:-1])
    worst = max(
        rows_deviation(engine.config, queries[own], output, *pair, length - np.arange(len(own))[::-1])
        for own, output, pair, length in zip(rows, outputs, contents, lens, strict=True)
    )
    words = " and ".join(f"{len(own)} over {length} tokens" for own, length in zip(rows, lens, strict=True))
    return worst.check(name, f"rows of a recorded step, {words}, against float64 arithmetic")


@dataclass(frozen=True, order=True)
class Deviation:
    """The largest error seen, as a share of what is allowed; NaN counts as infinite."""

    ratio: float = 0.0
    error: float = 0.0
    tolerance: float = 0.0
    place: str = ""

    @classmethod
    def of(cls, got: Floats, expected: Floats, tolerance: float, place: str = "") -> Deviation:
        error = float(np.nan_to_num(np.abs(got - expected), nan=np.inf).max(initial=0.0))
        return cls(error / tolerance if tolerance else float("inf") * bool(error), error, tolerance, place)

    def check(self, name: str, detail: str) -> Check:
        where = f" ({self.place})" if self.place else ""
        words = f"{detail}: worst error {self.error:.1e}{where}, allowed {self.tolerance:.1e}"
        return Check(name, words, self.ratio <= 1.0)


def attention_tolerance(config: ModelConfig, values: Floats) -> float:
    """float32: rounding of the longest sums. Half types: of weights and outputs, whatever the length."""
    epsilon = float(jnp.finfo(config.dtype).eps)
    terms = (len(values) + values.shape[-1]) ** 0.5 if config.dtype == "float32" else 0.25
    return 16 * epsilon * terms * float(np.abs(values).max())


def attend_rows(queries: Floats, keys: Floats, values: Floats, context_lens: npt.NDArray[np.integer[Any]]) -> Floats:
    """Attention of each of the rows `[R, Hq, D]` to its first `context_lens` of the keys `[K, Hkv, D]`, in float64."""
    num_rows, num_heads, head_dim = queries.shape
    num_keys, kv_heads, _ = keys.shape
    grouped = queries.astype(np.float64).reshape(num_rows, kv_heads, -1, head_dim).swapaxes(0, 1)
    scores = grouped.reshape(kv_heads, -1, head_dim) @ keys.transpose(1, 2, 0) / head_dim**0.5
    visible = np.arange(num_keys) < context_lens[:, None, None]
    scores = np.where(visible, scores.reshape(kv_heads, num_rows, -1, num_keys), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended = weights.reshape(kv_heads, -1, num_keys) @ values.swapaxes(0, 1)
    return attended.reshape(kv_heads, num_rows, -1, head_dim).swapaxes(0, 1).reshape(num_rows, num_heads, head_dim)


def rows_deviation(
    config: ModelConfig,
    queries: Floats,
    outputs: Floats,
    keys: Floats,
    values: Floats,
    context_lens: npt.NDArray[np.integer[Any]],
    place: str = "",
) -> Deviation:
    """How far attention outputs of one sequence lie from float64 arithmetic over its K and V; `place` leads to it."""
    expected = attend_rows(queries, keys, values, context_lens)
    return max(
        Deviation.of(
            outputs[row],
            expected[row],
            attention_tolerance(config, values[:context_len]),
            f"{place}row {row} of {len(context_lens)} over {context_len} keys",
        )
        for row, context_len in enumerate(context_lens)
    )


class StepSequence(NamedTuple):
    """The rows of a step that belong to one sequence, and the sequence's page table."""

    rows: npt.NDArray[np.int64]
    pages: npt.NDArray[np.int32]


def step_sequences(inputs: HostStep) -> list[StepSequence]:
    """The sequences of a step that are not padding."""
    starts = inputs.query_start_loc
    return [
        StepSequence(np.arange(starts[place], starts[place + 1]), inputs.block_tables[place])
        for place in np.flatnonzero(np.diff(starts))
    ]


def _spread(values: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` of `values`, evenly spread, the first and the last among them."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))]


def interpret_unified_attention(arrays: Mapping[str, Any], dtype: str) -> Floats:
    """`unified_attention(platform="triton")` in its own process: Triton reads TRITON_INTERPRET when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "step.npz"), Path(folder, "output.npy")
        np.savez(source, dtype=np.asarray(dtype), **arrays)
        command = [sys.executable, "-m", "bench.serving_interpreter", str(source), str(target)]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=INTERPRETER_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise CheckError(f"the interpreted kernel took longer than {INTERPRETER_SECONDS} s") from error
        if done.returncode:
            raise CheckError(f"the interpreted kernel failed:\n{done.stderr.strip()[-2000:]}")
        return np.asarray(np.load(target), np.float64)


def dense_logits(
    weights: Weights, config: ModelConfig, tokens: npt.NDArray[np.int32], first: int, dtype: str
) -> Floats:
    """Logits `[len(tokens) - first, vocabulary]` after tokens `first ...` of one sequence, computed at once in `dtype`.

    Shares no code with the paged decoder.
    """
    padding = -len(tokens) % DENSE_ROWS
    hidden = _dense_hidden(weights, jnp.asarray(np.pad(tokens, (0, padding))), config=config, dtype=dtype)
    unembedding = weights.unembedding.astype(dtype)
    logits = jnp.dot(hidden[first : len(tokens)], unembedding, precision="highest")
    return np.asarray(logits, np.float64)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _dense_hidden(weights: Weights, tokens: Array, *, config: ModelConfig, dtype: str) -> Array:
    length = tokens.shape[0]
    exponents = jnp.arange(config.head_dim // 2) * (2.0 / config.head_dim)
    turns = jnp.exp(1j * jnp.arange(length)[:, None, None] / config.rope_base**exponents)
    visible = jnp.tri(length, dtype=bool)
    dot = functools.partial(jnp.einsum, precision="highest")

    def normalise(rows: Array, gain: Array) -> Array:
        wide = rows.astype(jnp.float32)
        return (wide / jnp.sqrt(jnp.square(wide).mean(-1, keepdims=True) + config.norm_epsilon)).astype(dtype) * gain

    def turn(heads: Array) -> Array:
        real, imaginary = jnp.split(heads.astype(jnp.float32), 2, -1)
        turned = lax.complex(real, imaginary) * turns
        return jnp.concatenate([turned.real, turned.imag], -1).astype(dtype)

    def attend_head(head: tuple[Array, Array, Array]) -> Array:
        query, key, value = (rows.astype(jnp.float32) for rows in head)
        scores = jnp.where(visible, dot("qd,kd->qk", query, key) / config.head_dim**0.5, -jnp.inf)
        return dot("qk,kd->qd", jax.nn.softmax(scores), value).astype(dtype)

    def run_layer(hidden: Array, layer: LayerWeights) -> Array:
        (attention_gain, to_query, to_key, to_value, to_hidden, mlp_gain, to_gate, to_up, to_down) = (
            array.astype(dtype) for array in layer
        )
        rows = normalise(hidden, attention_gain)
        query = turn(dot("th,hx->tx", rows, to_query).reshape(length, config.heads, -1))
        key = turn(dot("th,hx->tx", rows, to_key).reshape(length, config.kv_heads, -1))
        value = dot("th,hx->tx", rows, to_value).reshape(length, config.kv_heads, -1)
        group = config.heads // config.kv_heads
        heads = (query.swapaxes(0, 1), key.repeat(group, 1).swapaxes(0, 1), value.repeat(group, 1).swapaxes(0, 1))
        attended = lax.map(attend_head, heads).swapaxes(0, 1).reshape(length, -1)
        hidden = hidden + dot("tx,xh->th", attended, to_hidden)
        rows = normalise(hidden, mlp_gain)
        gate = dot("th,hi->ti", rows, to_gate)
        return hidden + dot("ti,ih->th", gate * jax.nn.sigmoid(gate) * dot("th,hi->ti", rows, to_up), to_down)

    hidden = functools.reduce(run_layer, weights.layers, weights.embedding[tokens].astype(dtype))
    return normalise(hidden, weights.final_norm.astype(dtype))
