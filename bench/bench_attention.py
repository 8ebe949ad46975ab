"""pytest-benchmark suite of the paged operations: `make bench-suite`, with ARGS for pytest.

    make bench-suite ARGS="--benchmark-json=now.json"
    make bench-suite ARGS="--benchmark-compare=0001 --benchmark-compare-fail=median:5%"

A round is a program of many calls over rotating arguments, so that nothing is served from L2. Every case is held to the
float32 reference before it is timed: a wrong result has no time. `extra_info` holds seconds a call, GB/s and TFLOP/s,
and the fraction of the copy bandwidth and of the matrix rate that the same run measured. On a GPU the kernels are timed
on the cases of `bench.unified`, on a CPU `xla` on small ones.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench.cases import AttentionCase, argument_sets, num_pool_pages, parse_case
from bench.check import ROW_TOLERANCE, build_check
from bench.operations import OPERATIONS, Operation
from bench.runner import Pool, call_arrays
from bench.timing import compile_program, copy_bandwidth, measure

ON_GPU = jax.default_backend() == "gpu"
PLATFORM = "triton" if ON_GPU else "xla"
LAYOUT = "PTHD"
POOL_BYTES = 24e9 if ON_GPU else 0.02e9
MATRIX_SIZE = 8192 if ON_GPU else 256
COPIED_BYTES = 1 << 30 if ON_GPU else 1 << 24
MAX_CALLS = 64 if ON_GPU else 4
ROUNDS = 20 if ON_GPU else 5

CASES: dict[str, tuple[str, ...]] = {
    "page_attention": ("1x4096", "8x4096", "64x4096", "ragged64") if ON_GPU else ("2x48",),
    "prefill_page_attention": ("1x4096of4096", "1x256of16384") if ON_GPU else ("1x16of48",),
    "unified_attention": (
        ("64x4096", "1x131072+63x512", "32x4of4096", "60x4096+4x512of4096", "1x4096of4096", "8x2048of2048")
        if ON_GPU
        else ("2x48+1x5of9",)
    ),
}


@pytest.fixture(scope="session")
def rates() -> dict[str, float]:
    """Bytes copied and FLOPs of a bfloat16 matrix product, a second, on this device."""
    matrix = jnp.ones((MATRIX_SIZE, MATRIX_SIZE), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    seconds = measure(lambda _: product(matrix, matrix), repeats=5).median
    return {"copy": max(copy_bandwidth(COPIED_BYTES, repeats=5).values()), "product": 2 * MATRIX_SIZE**3 / seconds}


@pytest.fixture(scope="session")
def pool() -> Pool:
    cases = [parse_case(name) for names in CASES.values() for name in names]
    return Pool.build(cases[0].geometry, num_pool_pages(cases, POOL_BYTES), LAYOUT)


def attend(operation: Operation, case: AttentionCase, *arrays: Any) -> Any:
    key_cache, value_cache, query, kv_lens, starts, tables, sinks = arrays
    return operation.call(
        query,
        key_cache,
        value_cache,
        kv_lens,
        starts,
        tables,
        case.soft_cap,
        sliding_window=case.window,
        attention_sink=sinks,
        kv_layout=LAYOUT,
        platform=PLATFORM,
    )


@pytest.mark.parametrize(("operation", "name"), [(op, name) for op, names in CASES.items() for name in names])
def test_attention(operation: str, name: str, benchmark: Any, pool: Pool, rates: dict[str, float]) -> None:
    case = parse_case(name)
    calls, chunks = case.rotation(MAX_CALLS)
    sets = argument_sets(case, pool.pages, calls * chunks)
    fn = functools.partial(attend, OPERATIONS[operation], case)
    program = compile_program(fn, [call_arrays(case, s) for s in sets], shared=pool.caches, calls_per_program=calls)
    error = build_check(case, pool.caches, LAYOUT, sets[0]).error(program.run(0)[0])
    assert error <= ROW_TOLERANCE, f"row error {error:.2e}, allowed {ROW_TOLERANCE:.2e}: nothing is timed"
    indices = itertools.count()
    benchmark.pedantic(
        lambda: jax.block_until_ready(program.run(next(indices))), rounds=ROUNDS, warmup_rounds=max(2, chunks)
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median / calls
    benchmark.extra_info |= {
        "calls": calls,
        "seconds_per_call": seconds,
        "GB/s": case.kv_bytes / seconds / 1e9,
        "TFLOP/s": case.flops / seconds / 1e12,
        "of_copy_bandwidth": case.kv_bytes / seconds / rates["copy"],
        "of_matrix_rate": case.flops / seconds / rates["product"],
        "row_error": error,
        "device": jax.devices()[0].device_kind,
    }
