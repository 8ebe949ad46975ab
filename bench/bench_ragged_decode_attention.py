"""`ragged_decode_attention` under pytest-benchmark; see `bench.suite`."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

from bench.check import row_error
from bench.ragged import NAMES, attend_ranges, expected_rows, parse_case
from bench.suite import ON_GPU, PLATFORM, ROTATION_BYTES, Rates, Work, time_program
from bench.timing import compile_program


@pytest.mark.parametrize("name", NAMES if ON_GPU else ["2x128", "4x64of96"])
def test_ragged_decode_attention(name: str, benchmark: Any, rates: Rates) -> None:
    case = parse_case(name)
    sets = case.sets(max(2, math.ceil(ROTATION_BYTES / case.kv_bytes)))
    program = compile_program(functools.partial(attend_ranges, PLATFORM, None), sets)
    rows = case.checked_rows
    error = row_error(program.run(0)[0][rows], expected_rows(sets[0], rows)[0])
    time_program(benchmark, program, Work(case.kv_bytes, case.flops), rates, error)
