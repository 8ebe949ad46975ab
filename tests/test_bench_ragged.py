"""The benchmark of ragged decode runs what it says, and notices wrong results."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest

from bench import ragged

OPTIONS = argparse.Namespace(platform="xla", rotation_mb=0.01, repeats=2, sample_ms=1.0)


def test_cases_by_name() -> None:
    full, drawn = ragged.parse_case("8x8192"), ragged.parse_case("64x4096of8192")
    assert full.kv_bytes == 8 * 8192 * 2 * 8 * 128 * 2
    starts, ends = drawn.bounds
    assert (starts > 0).all()
    assert (ends <= 8192).all()
    assert 1 <= (ends - starts).min() <= (ends - starts).max() <= 4096
    assert drawn.kv_bytes == int(np.sum(ends - starts)) * ragged.TOKEN_BYTES


@pytest.mark.parametrize("name", ["8192", "0x16", "2x17", "2x32of16"])
def test_unknown_cases_are_refused(name: str) -> None:
    with pytest.raises(SystemExit):
        ragged.parse_arguments(["--cases", name])


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ragged.parse_case("3x40of96")
    assert set(ragged.time_case(case, None, OPTIONS)) == {"ragged", "pages"}
    right = ragged.ragged_decode_attention

    def begins_late(*arrays: Any, **options: Any) -> Any:
        query, key, value, starts, ends = arrays
        return right(query, key, value, starts + 1, ends, **options)

    monkeypatch.setattr(ragged, "ragged_decode_attention", begins_late)
    with pytest.raises(ArithmeticError, match="3x40of96, ragged"):
        ragged.time_case(case, None, OPTIONS)
