"""`write_kv_pages` under pytest-benchmark; see `bench.suite`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.kv_pages import WriteCase, checked_writes
from bench.suite import ON_GPU, PLATFORM, ROTATION_BYTES, Rates, Work, time_calls

CASES = (
    [WriteCase(8192), WriteCase(8192, "HPTD"), WriteCase(8192, cache_dtype="float8_e4m3fn"), WriteCase(64)]
    if ON_GPU
    else [WriteCase(64), WriteCase(64, cache_dtype="int8")]
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(", ", "-").replace(" ", "_"))
def test_write_kv_pages(case: WriteCase, benchmark: Any, rates: Rates) -> None:
    enqueue, calls = checked_writes(case, PLATFORM, ROTATION_BYTES)
    time_calls(benchmark, enqueue, calls, Work(case.call_bytes), rates)
