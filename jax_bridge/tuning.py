"""Timing an operation's candidate configurations on the device at hand."""

import dataclasses
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bridge import launch
from jax_bridge.configs import Config
from jax_bridge.operation import INDEX_ARGUMENTS, Invocation, Operation, remember_tuned
from jax_bridge.registry import find_operation

WARM_UP = 5
ITERATIONS = 100
_CALLS_PER_ITERATION = 5  # enqueued back to back, so that the host's share hides behind the device's


def tune(op: Any, *args: Any, **kwargs: Any) -> Config:
    """Times the candidate configurations of a call on this device and keeps the fastest right one for this process.

    Every candidate is first checked against `platform="xla"`; one that fails to compile or answers wrongly is left out
    with a warning. Later calls with the same shapes, dtypes and options take the winner where no `cfg` is given.

    Args:
        op: An operation's name, public function or object.
        *args: Positional arguments of the operation: arrays, or `jax.ShapeDtypeStruct`s for which contents are made up
            (full lengths, shuffled pages).
        **kwargs: Keyword arguments of the operation; not `platform` and `cfg`.

    Returns:
        The fastest configuration, or what the heuristics choose where no kernel runs on this device.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes or values that do not fit, an unknown operation, or no candidate that is right.
    """
    operation = find_operation(op)
    invocation = operation.invocation(*args, **kwargs)
    candidates = operation.candidate_cfgs(invocation)
    if not candidates or not (jax.default_backend() == "gpu" or launch.interpreting()):
        return operation.heuristic_cfg(invocation)
    arrays = made_up(invocation)
    reference = _program(operation, invocation, "xla", None)(arrays)
    timings: dict[Config, float] = {}
    for candidate in candidates:
        program = _program(operation, invocation, "triton", candidate)
        try:
            if not _agree(program(arrays), reference):
                raise ArithmeticError("its result differs from that of the reference")
            timings[candidate] = _median_seconds(functools.partial(program, arrays))
        except Exception as error:
            warnings.warn(f"tune: {operation.name} leaves out {candidate}: {error}", RuntimeWarning, stacklevel=2)
    if not timings:
        raise ValueError(f"tune: none of the {len(candidates)} candidates of {operation.name} runs right here")
    best = min(timings, key=lambda candidate: timings[candidate])
    remember_tuned(invocation, best)
    return best


def made_up(invocation: Invocation) -> dict[str, Any]:
    """The arrays of a call; contents where only shapes were given: normal values, full lengths, shuffled pages."""
    rng = np.random.default_rng(0)
    sizes = invocation.sizes
    made: dict[str, Any] = {}
    for name, array in invocation.arrays.items():
        if not isinstance(array, jax.ShapeDtypeStruct):
            made[name] = array
        elif name in ("block_tables", "page_indices"):
            made[name] = jnp.asarray(rng.integers(0, max(1, sizes.num_pages), array.shape), array.dtype)
        elif name in INDEX_ARGUMENTS:
            made[name] = jnp.full(array.shape, sizes.table_width * sizes.page_size, array.dtype)
        else:
            values = jax.random.normal(jax.random.key(len(made)), array.shape)
            integers = jnp.issubdtype(array.dtype, jnp.integer)
            made[name] = (jnp.round(30 * values) if integers else values).astype(array.dtype)
    return made


def _program(
    operation: Operation, invocation: Invocation, platform: str, cfg: Config | None
) -> Callable[[dict[str, Any]], Any]:
    return lambda arrays: operation.execute(dataclasses.replace(invocation, arrays=arrays), platform, cfg)


def _agree(results: Any, expected: Any) -> bool:
    """Whether results agree to a few roundings of the weights and the output to the result's dtype."""
    for result, reference in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        tolerance = 8 * float(jnp.finfo(result.dtype).eps) if result.dtype.itemsize < 4 else 1e-4
        got, wanted = (np.asarray(array, np.float32) for array in (result, reference))
        if not np.allclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True):
            return False
    return True


def _median_seconds(call: Callable[[], Any]) -> float:
    for _ in range(WARM_UP):
        jax.block_until_ready(call())
    samples = []
    for _ in range(ITERATIONS // _CALLS_PER_ITERATION):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(_CALLS_PER_ITERATION)])
        samples.append((time.perf_counter() - start) / _CALLS_PER_ITERATION)
    return statistics.median(samples)
