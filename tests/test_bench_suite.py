"""The pytest-benchmark suite runs, stores rates, and times nothing that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_suite(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "python_files=bench_*.py", "-p", "no:xdist", "bench"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env=outside | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_suite_stores_rates(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    finished = run_suite("-k", "unified", f"--benchmark-json={file}")
    assert finished.returncode == 0, finished.stdout
    (result,) = json.loads(file.read_text())["benchmarks"]
    info = result["extra_info"]
    assert info["seconds_per_call"] == pytest.approx(result["stats"]["median"] / info["calls"])
    assert 0 < info["of_copy_bandwidth"] < 1
    assert 0 < info["of_matrix_rate"] < 1


def test_wrong_results_are_not_timed(tmp_path: Path) -> None:
    """A plugin of the run makes the operation forget the last key."""
    (tmp_path / "forgetful.py").write_text(
        "import jax_bridge\n"
        "right = jax_bridge.page_attention\n"
        "jax_bridge.page_attention = lambda q, k, v, lens, *rest, **named: right(q, k, v, lens - 1, *rest, **named)\n"
    )
    finished = run_suite("-k", "page_attention-2x48", "-p", "forgetful", PYTHONPATH=str(tmp_path))
    assert finished.returncode == 1
    assert "nothing is timed" in finished.stdout
