"""What the pytest-benchmark suites share: what a call must move and compute, how it is timed, and what is stored of it.

A round is a program of many calls over rotating arguments, so that nothing is served from L2. Every case is held to the
float32 reference before it is timed: a wrong result has no time. On a GPU the kernels are timed at the size of the
models of `tests/cases.py`, on a CPU `xla` at a small one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import AttentionCase, Geometry, argument_sets, num_pool_pages, parse_case
from bench.check import ROW_TOLERANCE, build_check
from bench.operations import Operation
from bench.runner import Pool, attend_case, call_arrays
from bench.timing import Program, compile_program, copy_bandwidth, matrix_rate, measure
from tests.cases import MODELS

ON_GPU = jax.default_backend() == "gpu"
PLATFORM = "triton" if ON_GPU else "xla"
MAX_CALLS = 64 if ON_GPU else 4
ROTATION_BYTES = 1e9 if ON_GPU else 1e6
ROUNDS = 20 if ON_GPU else 100
TIMER = time.perf_counter if ON_GPU else time.process_time
"""The clock of rounds; on a CPU the processor's own, which stands still while something else runs there."""

LAYOUT = "PTHD"
POOL_BYTES = 8e9 if ON_GPU else 0.02e9


class Work(NamedTuple):
    """Bytes that a call has to read and write, and floating-point operations that it has to do."""

    num_bytes: int
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device does in a second, measured in the run that uses it."""

    copy: float
    """Bytes, read plus written, of a large copy."""
    product: float
    """FLOPs of a large bfloat16 matrix product."""

    @classmethod
    def of_this_device(cls) -> Rates:
        copied, size = (1 << 30, 8192) if ON_GPU else (1 << 24, 256)
        return cls(max(copy_bandwidth(copied, repeats=5).values()), matrix_rate(size, repeats=5))


def model_case(model: str, name: str) -> AttentionCase:
    """The case `name` with the heads, pages, window, soft cap and sinks of a model of `tests/cases.py`.

    Raises:
        ValueError: the model has ALiBi or values of another width, which cases do not have.
    """
    sizes = MODELS[model] if ON_GPU else MODELS[model].small()
    if sizes.alibi or sizes.value_head_dim not in (None, sizes.head_dim):
        raise ValueError(f"model {model!r} has ALiBi or values of another width than keys: no case describes that")
    case = parse_case(
        name,
        num_q_heads=sizes.num_q_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        page_size=sizes.page_size,
    )
    return dataclasses.replace(case, window=sizes.window, soft_cap=sizes.soft_cap, sinks=sizes.sinks)


class Pools:
    """The caches of one page geometry after another: there is memory for one pool at a time."""

    def __init__(self) -> None:
        self._pools: dict[Geometry, Pool] = {}

    def of(self, case: AttentionCase) -> Pool:
        """A pool that holds the pages of a case."""
        if case.geometry not in self._pools:
            self._pools.clear()
            pages = num_pool_pages([case], max(POOL_BYTES, 2 * sum(case.pages) * case.geometry.page_bytes))
            self._pools[case.geometry] = Pool.build(case.geometry, pages, LAYOUT)
        return self._pools[case.geometry]


def time_case(benchmark: Any, operation: Operation, case: AttentionCase, pools: Pools, rates: Rates) -> None:
    """Time an operation over pages on a case."""
    pool = pools.of(case)
    calls, chunks = case.rotation(MAX_CALLS)
    sets = argument_sets(case, pool.pages, calls * chunks)
    program = compile_program(
        functools.partial(attend_case, operation, case, LAYOUT, PLATFORM, None),
        [call_arrays(case, arguments) for arguments in sets],
        shared=pool.caches,
        calls_per_program=calls,
    )
    error = build_check(case, pool.caches, LAYOUT, sets[0]).error(program.run(0)[0])
    time_program(benchmark, program, Work(case.kv_bytes, case.flops), rates, error)


def time_program(benchmark: Any, program: Program, work: Work, rates: Rates, error: float) -> None:
    """Time a program whose answers are off by `error`, the largest relative error of a row.

    `extra_info` gets seconds a call, which on a GPU leave out the start of a program; GB/s and TFLOP/s, and their
    fractions of `rates`; on a CPU the time over that of the yardstick.

    Raises:
        AssertionError: the error is too large.
    """
    if not error <= ROW_TOLERANCE:
        raise AssertionError(f"row error {error:.2e}, allowed {ROW_TOLERANCE:.2e}: nothing is timed")
    time_calls(benchmark, program.run, program.calls, work, rates, warm_up=max(2, len(program.chunks)))
    benchmark.extra_info["row_error"] = error


def time_calls(
    benchmark: Any, enqueue: Callable[[int], Any], calls: int, work: Work, rates: Rates, *, warm_up: int = 2
) -> None:
    """As `time_program`, for a function of 0, 1, 2, ... that starts `calls` checked calls."""
    indices = itertools.count()

    def run() -> None:
        jax.block_until_ready(enqueue(next(indices)))

    yardstick_seconds: list[float] = []

    def time_yardstick() -> None:
        yardstick_seconds.append(_yardstick())

    beside = {} if ON_GPU else {"setup": time_yardstick}
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=warm_up, **beside)
    if benchmark.stats is None:  # --benchmark-disable
        return
    if ON_GPU:
        seconds = measure(lambda _: enqueue(next(indices)), calls=calls).median
    else:
        seconds = benchmark.stats.stats.median / calls
        # Both take turns, so that what a busy machine does to one it does to the other.
        benchmark.extra_info["over_yardstick"] = seconds / statistics.median(yardstick_seconds)
    benchmark.extra_info |= {
        "calls": calls,
        "seconds_per_call": seconds,
        "GB/s": work.num_bytes / seconds / 1e9,
        "TFLOP/s": work.flops / seconds / 1e12,
        "of_copy_bandwidth": work.num_bytes / seconds / rates.copy,
        "of_matrix_rate": work.flops / seconds / rates.product,
        "device": jax.devices()[0].device_kind,
    }


def _yardstick() -> float:
    """Seconds of a little dense attention by XLA, the same in every run."""
    attend = _yardstick_call()
    start = TIMER()
    jax.block_until_ready(attend())
    return TIMER() - start


@functools.cache
def _yardstick_call() -> Callable[[], jax.Array]:
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((1, 96, 4, 32)), jnp.float32)
    attend = jax.jit(jax.nn.dot_product_attention)
    jax.block_until_ready(attend(rows, rows, rows))
    return functools.partial(attend, rows, rows, rows)
