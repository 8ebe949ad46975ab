"""`merge_attention_states` under pytest-benchmark; see `bench.suite`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.kv_pages import checked_merges, merged_bytes
from bench.suite import ON_GPU, PLATFORM, ROTATION_BYTES, Rates, Work, time_calls


@pytest.mark.parametrize("num_tokens", [8192, 64] if ON_GPU else [64])
def test_merge_attention_states(num_tokens: int, benchmark: Any, rates: Rates) -> None:
    program = checked_merges(num_tokens, 128, PLATFORM, ROTATION_BYTES)
    time_calls(benchmark, program.run, program.calls, Work(merged_bytes(num_tokens, 128)), rates)
