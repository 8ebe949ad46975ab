"""`attention` under pytest-benchmark; see `bench.suite`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.dense import parse_case
from bench.suite import ON_GPU, PLATFORM, ROTATION_BYTES, Rates, Work, time_program

NAMES = ("1x1024", "1x4096", "1x16384", "8x2048", "1x16384-window1024", "1x4096-cap30") if ON_GPU else ("1x128", "2x48")


@pytest.mark.parametrize("name", NAMES)
def test_attention(name: str, benchmark: Any, rates: Rates) -> None:
    case = parse_case(name)
    sets = case.sets(ROTATION_BYTES)
    program = case.program(PLATFORM, sets)
    time_program(benchmark, program, Work(case.num_bytes, case.flops), rates, case.error(sets[0], program.run(0)[0]))
