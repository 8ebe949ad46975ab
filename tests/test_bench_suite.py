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
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "XLA_FLAGS"))}
    with regression.on_one_core():
        return subprocess.run(
            [*SUITE, *options],
            cwd=ROOT,
            env=outside | {"JAX_PLATFORMS": "cpu"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )


def planted(folder: Path, *lines: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Options and environment of a run with a plugin of these lines."""
    (folder / "planted.py").write_text("\n".join(lines) + "\n")
    return ("-p", "planted"), {"PYTHONPATH": str(folder)}


def page_attention_is(change: str) -> tuple[str, ...]:
    """Lines that put `change` in the place of `jax_bridge.page_attention`; it may call `right`."""
    right = "right = jax_bridge.page_attention"
    return "import jax_bridge", "from jax import lax", right, f"jax_bridge.page_attention = {change}"


def rates_are(copy: float, product: float) -> tuple[str, ...]:
    """Lines that state the device's rates: a busy machine may measure anything, in so short a time."""
    return "from bench.suite import Rates", f"Rates.of_this_device = classmethod(lambda cls: cls({copy}, {product}))"


def test_rates_are_stored_and_a_slowdown_is_noticed(tmp_path: Path) -> None:
    """The slower operation does everything eight times."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    chosen = ("-k", "page_attention and gpt_oss_20b or write and int8")
    plugin, environment = planted(tmp_path, *rates_are(copy=1e11, product=1e13))
    finished = run_suite(*chosen, f"--benchmark-json={before}", *plugin, **environment)
    assert finished.returncode == 0, finished.stdout
    results = {result["name"]: result for result in json.loads(before.read_text())["benchmarks"]}
    assert len(results) == 2
    for result in results.values():
        info = result["extra_info"]
        assert info["seconds_per_call"] == pytest.approx(result["stats"]["median"] / info["calls"])
        assert 0 < info["of_copy_bandwidth"] == pytest.approx(info["GB/s"] / 100)
        assert 0 <= info["of_matrix_rate"] == pytest.approx(info["TFLOP/s"] / 10)
        assert info["over_yardstick"] > 0
    assert max(result["extra_info"]["TFLOP/s"] for result in results.values()) > 0

    again = "lambda q, *rest, **named: lax.fori_loop(0, 8, lambda i, out: right(q + 0 * out, *rest, **named), q)"
    plugin, environment = planted(tmp_path, *page_attention_is(again))
    finished = run_suite(*chosen, f"--benchmark-json={after}", *plugin, **environment)
    assert finished.returncode == 0, finished.stdout
    (_, stored), (_, found) = (regression.read_ratios(file) for file in (before, after))
    _, worse = regression.compare(found, stored)
    assert [line.partition(":")[0] for line in worse] == ["page_attention[gpt_oss_20b-2x48]"]


def test_wrong_results_are_not_timed(tmp_path: Path) -> None:
    """The operation forgets the last key."""
    forgetful = "lambda q, k, v, lens, *rest, **named: right(q, k, v, lens - 1, *rest, **named)"
    plugin, environment = planted(tmp_path, *page_attention_is(forgetful))
    finished = run_suite("-k", "page_attention and gpt_oss_20b and not prefill", *plugin, **environment)
    assert finished.returncode == 1
    assert "nothing is timed" in finished.stdout
