"""`page_attention` under pytest-benchmark; see `bench.suite`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.operations import OPERATIONS
from bench.suite import ON_GPU, Pools, Rates, model_case, time_case

CASES = (
    [
        *(("llama3_8b", name) for name in ("1x4096", "1x32768", "8x4096", "64x4096", "ragged64")),
        *((model, "64x4096") for model in ("llama3_70b_tp8", "gemma2_9b", "gpt_oss_20b", "qwen2_7b", "phi3_mini")),
    ]
    if ON_GPU
    else [("llama3_8b", "4x256"), ("gemma2_9b", "4x256"), ("gpt_oss_20b", "2x48")]
)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_page_attention(model: str, name: str, benchmark: Any, pools: Pools, rates: Rates) -> None:
    time_case(benchmark, OPERATIONS["page_attention"], model_case(model, name), pools, rates)
