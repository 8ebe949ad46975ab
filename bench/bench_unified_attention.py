"""`unified_attention` under pytest-benchmark; see `bench.suite`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.operations import OPERATIONS
from bench.suite import ON_GPU, Pools, Rates, model_case, time_case

MIXED = "60x4096+4x512of4096"
CASES = (
    [
        *(("llama3_8b", name) for name in ("64x4096", "1x131072+63x512", "32x4of4096", MIXED, "8x2048of2048")),
        *((model, MIXED) for model in ("llama3_70b_tp8", "gemma2_9b", "gpt_oss_20b", "qwen2_7b")),
    ]
    if ON_GPU
    else [("llama3_8b", "4x256"), ("llama3_8b", "4x128+1x32of128"), ("gpt_oss_20b", "2x48+1x5of9")]
)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_unified_attention(model: str, name: str, benchmark: Any, pools: Pools, rates: Rates) -> None:
    time_case(benchmark, OPERATIONS["unified_attention"], model_case(model, name), pools, rates)
