"""`prefill_page_attention` under pytest-benchmark; see `bench.suite`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.operations import OPERATIONS
from bench.suite import ON_GPU, Pools, Rates, model_case, time_case

CASES = (
    [
        *(("llama3_8b", name) for name in ("1x1024of1024", "1x4096of4096", "1x256of16384")),
        *((model, "1x4096of4096") for model in ("gemma2_9b", "gpt_oss_20b", "mistral_7b")),
    ]
    if ON_GPU
    else [("llama3_8b", "1x64of192")]
)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_prefill_page_attention(model: str, name: str, benchmark: Any, pools: Pools, rates: Rates) -> None:
    time_case(benchmark, OPERATIONS["prefill_page_attention"], model_case(model, name), pools, rates)
