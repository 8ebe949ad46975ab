"""Is what the replay served right? The books, the served tokens against a dense decoder, and recorded steps' attention
against float64 arithmetic, in this process and by the Triton kernel under Triton's interpreter."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array, lax

from bench.serving_engine import Engine, HostStep
from bench.serving_model import ModelConfig, Weights
from bench.serving_scheduler import Request, RequestState, Scheduler

REPOSITORY = Path(__file__).resolve().parents[1]
DENSE_ROWS = 128  # dense lengths are padded to a multiple: few compilations
CHECKED_ROWS = 16
CHECKED_LAYERS = 4
INTERPRETED_ROWS = 2
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


def check_books(requests: Sequence[Request], scheduler: Scheduler, *, interrupted: bool) -> Check:
    """Nothing lost, nothing served twice, every token computed and generated counted once.

    Raises:
        CheckError: the books do not balance.
    """
    served = [request for request in requests if request.state is RequestState.SERVED]
    refused = sum(request.state is RequestState.REFUSED for request in requests)
    unfinished = len(requests) - len(served) - refused
    if unfinished and not interrupted:
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
    if not interrupted:
        _expect_equal("pages in use at the end", scheduler.pool.num_used, "expected", 0)
    rest = f" + {unfinished} unfinished (interrupted)" if unfinished else ""
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


def check_served_tokens(engine: Engine, requests: Sequence[Request], count: int) -> Check:
    """Compare all tokens and logits of `count` served requests, preempted ones first, with a decoder without cache."""
    candidates = [request for request in requests if request.state is RequestState.SERVED and request.generated]
    sample = sorted(candidates, key=lambda request: (-request.preemptions, request.index))[:count]
    worst = Deviation()
    tokens = 0
    for request in sample:
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
    return worst.check(
        "served tokens",
        f"{tokens} tokens of {len(sample)} requests ({sum(r.preemptions > 0 for r in sample)} of them preempted) "
        "against a dense decoder without cache, pages or chunks",
    )


def check_step_attention(engine: Engine) -> Check:
    """Run two recorded steps again, one with and one without a chunk, and compare attention with float64 arithmetic."""
    worst = Deviation()
    rows = 0
    layers = _spread(np.arange(engine.config.layers), CHECKED_LAYERS)
    steps = probed_steps(engine)
    for inputs in steps:
        probe = engine.probe(inputs)
        for layer in layers:
            queries, outputs = (np.asarray(array[layer], np.float64) for array in probe)
            for sequence in step_sequences(inputs):
                keys, values = engine.read_pages(layer, sequence.pages)
                for row, context_len in zip(sequence.rows, sequence.context_lens, strict=True):
                    worst = max(
                        worst, _row_deviation(engine.config, queries[row], outputs[row], keys, values, context_len)
                    )
                    rows += 1
    return worst.check(
        "attention",
        f"{rows} rows of {len(steps)} recorded steps and {len(layers)} layers against float64 arithmetic",
    )


def probed_steps(engine: Engine) -> list[HostStep]:
    """Steps to look into, each of them a program to compile: of the shape that ran most, without and with a chunk."""
    shapes = sorted(engine.records, key=lambda shape: -engine.records[shape].count)
    chosen = (next((shape for shape in shapes if bool(shape.chunk) == mixed), None) for mixed in (False, True))
    return [engine.records[shape].sample[0] for shape in chosen if shape is not None]


def check_interpreted_kernel(engine: Engine) -> Check:
    """Give the shortest rows of a recorded step to the Triton kernel, under Triton's interpreter in another process."""
    name = "Triton kernel, interpreted"
    inputs = next((step for step in probed_steps(engine) if np.any(step.context_lens)), None)
    if inputs is None:
        return Check(name, "no recorded step decodes anything", None)
    layer = engine.config.layers - 1
    decoding = np.flatnonzero(inputs.context_lens)
    rows = decoding[np.argsort(inputs.context_lens[decoding], kind="stable")][:INTERPRETED_ROWS]
    lens, tables = inputs.context_lens[rows], inputs.block_tables[rows]
    queries = np.asarray(engine.probe(inputs).queries[layer], np.float32)[rows]
    contents = [engine.read_pages(layer, table) for table in tables]
    # Each row's pages, one row after the other, are cache enough: no need to carry the pool to the other process.
    width = -(-int(lens.max()) // engine.page_size)
    shape = (len(rows) * width, engine.page_size, engine.config.kv_heads, engine.config.head_dim)
    key_cache, value_cache = (
        np.concatenate([pair[side][: width * engine.page_size] for pair in contents]).reshape(shape) for side in (0, 1)
    )
    compact = np.arange(len(rows) * width, dtype=np.int32).reshape(len(rows), width)
    arrays = {"query": queries, "key": key_cache, "value": value_cache, "lens": lens, "tables": compact}
    outputs = interpret_page_attention(arrays, engine.config.dtype)
    worst = max(
        _row_deviation(engine.config, queries[row], outputs[row], *contents[row], int(lens[row]))
        for row in range(len(rows))
    )
    lengths = " and ".join(str(length) for length in lens)
    return worst.check(name, f"a recorded decoding step's sequences of {lengths} tokens against float64 arithmetic")


@dataclass(frozen=True, order=True)
class Deviation:
    """The largest error seen, as a share of what is allowed; NaN counts as infinite."""

    ratio: float = 0.0
    error: float = 0.0
    tolerance: float = 0.0

    @classmethod
    def of(cls, got: Floats, expected: Floats, tolerance: float) -> Deviation:
        error = float(np.nan_to_num(np.abs(got - expected), nan=np.inf).max(initial=0.0))
        return cls(error / tolerance if tolerance else float("inf") * bool(error), error, tolerance)

    def check(self, name: str, detail: str) -> Check:
        return Check(name, f"{detail}: worst error {self.error:.1e}, allowed {self.tolerance:.1e}", self.ratio <= 1.0)


def attention_tolerance(config: ModelConfig, keys: Floats, values: Floats) -> float:
    """float32: rounding of the longest sums. Half types: of weights and outputs, whatever the length."""
    epsilon = float(jnp.finfo(config.dtype).eps)
    terms = (len(keys) + keys.shape[-1]) ** 0.5 if config.dtype == "float32" else 0.25
    return 16 * epsilon * terms * float(np.abs(values).max())


def attend_row(query: Floats, keys: Floats, values: Floats) -> Floats:
    """Attention of one token to all `keys`: `[Hq, D]` over `[K, Hkv, D]`, in float64."""
    heads, head_dim = query.shape
    grouped = query.reshape(keys.shape[1], -1, head_dim)
    scores = np.einsum("hgd,khd->hgk", grouped, keys) / head_dim**0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hgk,khd->hgd", weights, values).reshape(heads, -1)


def _row_deviation(
    config: ModelConfig, query: Floats, output: Floats, keys: Floats, values: Floats, context_len: int
) -> Deviation:
    """How far an attention output lies from float64 arithmetic over the first `context_len` of a sequence's K and V."""
    keys, values = keys[:context_len], values[:context_len]
    expected = attend_row(query.astype(np.float64), keys, values)
    return Deviation.of(output, expected, attention_tolerance(config, keys, values))


@dataclass(frozen=True)
class StepSequence:
    """Rows of a step that belong to one sequence: how many tokens each may see, and the sequence's page table."""

    rows: npt.NDArray[np.int64]
    context_lens: npt.NDArray[np.int32]
    pages: npt.NDArray[np.int32]


def step_sequences(inputs: HostStep) -> list[StepSequence]:
    """A sample of the rows of a step that are not padding: some sequences that decode, some rows of the chunk."""
    num_decodes = len(inputs.context_lens)
    decodes = _spread(np.flatnonzero(inputs.context_lens), CHECKED_ROWS)
    chunk = _spread(num_decodes + np.flatnonzero(inputs.slots[num_decodes:] >= 0), CHECKED_ROWS)
    sequences = [StepSequence(row[None], inputs.context_lens[row, None], inputs.block_tables[row]) for row in decodes]
    return [*sequences, StepSequence(chunk, inputs.positions[chunk] + 1, inputs.chunk_pages)]


def _spread(values: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` of `values`, evenly spread, the first and the last among them."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))]


def interpret_page_attention(arrays: Mapping[str, Any], dtype: str) -> Floats:
    """`page_attention(platform="triton")` in its own process: Triton reads TRITON_INTERPRET when it is imported."""
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

    def run_layer(hidden: Array, layer: tuple[Array, ...]) -> tuple[Array, None]:
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
        return hidden + dot("ti,ih->th", gate * jax.nn.sigmoid(gate) * dot("th,hi->ti", rows, to_up), to_down), None

    hidden, _ = lax.scan(run_layer, weights.embedding[tokens].astype(dtype), tuple(weights.layers))
    return normalise(hidden, weights.final_norm.astype(dtype))
