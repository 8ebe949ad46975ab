"""The benchmark of cache writes and merging runs what it says, and notices wrong results."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench import kv_pages

ROTATION_BYTES = 1e4


def test_the_command_of_its_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"python -m bench.kv_pages (--.+)", str(kv_pages.__doc__))
    assert kv_pages.main(command.split()) == 0
    assert "| write 1 tokens" in capsys.readouterr().out


def test_wrong_writes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = kv_pages.WriteCase(16, "PHTD", "int8", head_dim=16)
    assert case.call_bytes == 2 * 16 * 8 * 16 * (2 + 1)
    enqueue, calls = kv_pages.checked_writes(case, "xla", ROTATION_BYTES)
    assert calls == 4
    assert enqueue(0)[0].dtype == "int8"
    write = kv_pages.write_kv_pages

    def forgets_a_scale(*arrays: Any, platform: str, **options: Any) -> Any:
        changes = {} if platform == "xla" else {"v_scale": None}
        return write(*arrays, **{**options, **changes}, platform="xla")

    monkeypatch.setattr(kv_pages, "write_kv_pages", forgets_a_scale)
    with pytest.raises(ArithmeticError, match="values of the cache differ"):
        kv_pages.checked_writes(case, "wrong", ROTATION_BYTES)


def test_wrong_merges_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kv_pages.merged_bytes(4, 16) == 3 * 4 * 32 * (16 * 2 + 4)
    assert kv_pages.checked_merges(4, 16, "xla", ROTATION_BYTES).calls == 4
    merge = kv_pages.merge_attention_states

    def takes_one_side(*arrays: Any, platform: str) -> Any:
        return merge(*arrays, platform="xla") if platform == "xla" else arrays[:2]

    monkeypatch.setattr(kv_pages, "merge_attention_states", takes_one_side)
    with pytest.raises(ArithmeticError, match="merge of 4 tokens"):
        kv_pages.checked_merges(4, 16, "wrong", ROTATION_BYTES)
