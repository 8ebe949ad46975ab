"""The pytest-benchmark suites run, store rates, time nothing that is wrong, and notice what became slower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import regression

ROOT = Path(__file__).parent.parent
SUITE = [sys.executable, "-m", "pytest", "-q", "-o", "python_files=bench_*.py", "-p", "no:xdist", "bench"]


def run_suite(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [*SUITE, *options],
        cwd=ROOT,
        env=outside | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def planted(folder: Path, change: str) -> dict[str, str]:
    """The environment of a run in which a plugin, `planted`, changes `jax_bridge.page_attention`."""
    (folder / "planted.py").write_text(
        "import jax_bridge\nfrom jax import lax\nright = jax_bridge.page_attention\n"
        f"jax_bridge.page_attention = {change}\n"
    )
    return {"PYTHONPATH": str(folder)}


def test_rates_are_stored_and_a_slowdown_is_noticed(tmp_path: Path) -> None:
    """The slower operation does everything eight times."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    chosen = ("-k", "page_attention and gpt_oss_20b or write and int8")
    finished = run_suite(*chosen, f"--benchmark-json={before}")
    assert finished.returncode == 0, finished.stdout
    results = {result["name"]: result for result in json.loads(before.read_text())["benchmarks"]}
    assert len(results) == 2
    for result in results.values():
        info = result["extra_info"]
        assert info["seconds_per_call"] == pytest.approx(result["stats"]["median"] / info["calls"])
        assert 0 < info["of_copy_bandwidth"] < 1
        assert 0 <= info["of_matrix_rate"] < 1
        assert info["over_yardstick"] > 0

    again = "lambda q, *rest, **named: lax.fori_loop(0, 8, lambda i, out: right(q + 0 * out, *rest, **named), q)"
    finished = run_suite(*chosen, f"--benchmark-json={after}", "-p", "planted", **planted(tmp_path, again))
    assert finished.returncode == 0, finished.stdout
    (_, stored), (_, found) = (regression.read_ratios(file) for file in (before, after))
    _, worse = regression.compare(found, stored)
    assert [line.partition(":")[0] for line in worse] == ["page_attention[gpt_oss_20b-2x48]"]


def test_wrong_results_are_not_timed(tmp_path: Path) -> None:
    """The operation forgets the last key."""
    forgetful = "lambda q, k, v, lens, *rest, **named: right(q, k, v, lens - 1, *rest, **named)"
    options = ("-k", "page_attention and gpt_oss_20b and not prefill", "-p", "planted")
    finished = run_suite(*options, **planted(tmp_path, forgetful))
    assert finished.returncode == 1
    assert "nothing is timed" in finished.stdout
