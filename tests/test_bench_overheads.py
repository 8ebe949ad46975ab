"""The benchmark of overheads measures what it says, a part at a time."""

from __future__ import annotations

import json

import pytest

from bench.overheads import main


def test_parts_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--platform=xla", "--layers=1", "--repeats=2", "--only=step"]) == 0
    step = json.loads(capsys.readouterr().out)
    assert step["seconds"] > 0
    assert step["error"] == 0
    assert main(["--platform=xla", "--only=merge_attention_states"]) == 0
    seconds = json.loads(capsys.readouterr().out)
    assert list(seconds) == ["import", "first call", "second call"]
    assert seconds["second call"] > 0
