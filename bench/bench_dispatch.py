"""What an eager call costs over the bare jitted function, under pytest-benchmark; see `bench.suite`.

Both run the same small program, in turns: the bare one is the yardstick here.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from bench.suite import PLATFORM, TIMER
from tests.small_calls import OPERATIONS, arguments, run

ROUNDS, CALLS = 50, 20


def seconds_a_call(call: Callable[[], Any]) -> float:
    start = TIMER()
    jax.block_until_ready([call() for _ in range(CALLS)])
    return (TIMER() - start) / CALLS


@pytest.mark.parametrize("operation", OPERATIONS)
def test_dispatch(operation: str, benchmark: Any) -> None:
    named = jax.device_put(arguments(operation))
    bare = functools.partial(jax.jit(functools.partial(run, operation, platform=PLATFORM)), named)
    eager = functools.partial(run, operation, named, platform=PLATFORM)
    for left, right in zip(jax.tree.leaves(eager()), jax.tree.leaves(bare()), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    bare_seconds: list[float] = []
    benchmark.pedantic(
        lambda: seconds_a_call(eager),
        setup=lambda: bare_seconds.append(seconds_a_call(bare)),
        rounds=ROUNDS,
        warmup_rounds=2,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    eager_median, bare_median = benchmark.stats.stats.median / CALLS, statistics.median(bare_seconds)
    benchmark.extra_info |= {
        "overhead_us": 1e6 * (eager_median - bare_median),
        "bare_us": 1e6 * bare_median,
        "over_yardstick": eager_median / bare_median,
        "device": jax.devices()[0].device_kind,
    }
