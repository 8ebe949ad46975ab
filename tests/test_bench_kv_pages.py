"""The benchmark of cache writes and merging runs what it says, and notices wrong results."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from bench import kv_pages

OPTIONS = argparse.Namespace(platform="xla", rotation_mb=0.01, repeats=2, sample_ms=1.0)


def test_wrong_writes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = kv_pages.WriteCase(16, "PHTD", "int8", head_dim=16)
    assert case.call_bytes == 2 * 16 * 8 * 16 * (2 + 1)
    kv_pages.time_write(case, OPTIONS)
    write = kv_pages.write_kv_pages

    def forgets_a_scale(*arrays: Any, platform: str, **options: Any) -> Any:
        changes = {} if platform == "xla" else {"v_scale": None}
        return write(*arrays, **{**options, **changes}, platform="xla")

    monkeypatch.setattr(kv_pages, "write_kv_pages", forgets_a_scale)
    with pytest.raises(ArithmeticError, match="values of the cache differ"):
        kv_pages.time_write(case, argparse.Namespace(**{**vars(OPTIONS), "platform": "wrong"}))


def test_wrong_merges_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call_bytes = kv_pages.time_merge(4, 16, OPTIONS)
    assert call_bytes == 3 * 4 * 32 * (16 * 2 + 4)
    merge = kv_pages.merge_attention_states

    def takes_one_side(*arrays: Any, platform: str) -> Any:
        return merge(*arrays, platform="xla") if platform == "xla" else arrays[:2]

    monkeypatch.setattr(kv_pages, "merge_attention_states", takes_one_side)
    with pytest.raises(ArithmeticError, match="merge of 4 tokens"):
        kv_pages.time_merge(4, 16, argparse.Namespace(**{**vars(OPTIONS), "platform": "wrong"}))
