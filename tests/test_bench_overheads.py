"""The benchmark of overheads measures what it says, a part at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import timing
from bench.overheads import main


def test_a_step_is_checked_and_its_time_divided_among_layers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(program: timing.Program, **sampling: Any) -> timing.Timing:
        assert (program.calls, sampling) == (1, {"repeats": 2})
        return timing.Timing(median=6e-3, low=5e-3, high=7e-3, host=2e-3)

    monkeypatch.setattr(timing, "measure_program", measure)
    assert main(["--platform=xla", "--layers=2", "--repeats=2", "--only=step"]) == 0
    step = json.loads(capsys.readouterr().out)
    assert (step["seconds"], step["host_seconds"], step["error"]) == (3e-3, 1e-3, 0)


def test_first_calls_are_timed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--platform=xla", "--only=merge_attention_states"]) == 0
    seconds = json.loads(capsys.readouterr().out)
    assert list(seconds) == ["import", "first call", "second call"]
    assert min(seconds.values()) > 0
