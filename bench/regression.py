"""Benchmark results beside stored ratios: `python -m bench.regression RESULTS.json ...`; 1 where something got worse.

Results come from `bench.unified` or `bench.decode` (`--json`), or from pytest-benchmark (`--benchmark-json`). Of every
case the baseline keeps its speed in units of something that the same run measured: FlashAttention-3, the copy bandwidth
and the matrix rate on a GPU, a little dense attention by XLA on one core of a CPU. So another machine of the kind, and
a busy one, give ratios that can be compared. Compared is the first of these that both sides have; of copy bandwidth and
matrix rate, that which bounds the case. Examples:

    python -m bench.regression --run                       # measure here first, as `make bench-gpu` and `bench-cpu` do
    python -m bench.regression unified.json suite.json --write
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import DEFAULT_GROUPS
from bench.results import OURS, Results, read_json

BASELINES = Path(__file__).parent / "baselines"
PEER = "fa3"
BOUNDS = ("copy", "product")
YARDSTICK = "yardstick"
GROUPS = (*DEFAULT_GROUPS, "features")  # of cases beside FlashAttention-3

TOLERANCES = {PEER: 0.05, "copy": 0.05, "product": 0.05, YARDSTICK: 0.5}
"""Share by which a ratio may fall. On a CPU it is between programs of different kinds, in caches that others share."""

CPU_RUNS = 2  # the better of which counts: what disturbs one of them is over in the other

Ratios = dict[str, float]
"""Speed of one case by what it is measured against; more is better."""


def read_ratios(path: Path) -> tuple[str, dict[str, Ratios]]:
    """The device that results are of, and the ratios of every case that was timed.

    Raises:
        ValueError: the file holds no results of a benchmark.
    """
    content = json.loads(path.read_text())
    if "benchmarks" in content:
        return _suite_ratios(path, content["benchmarks"])
    if "cases" in content and "facts" in content:
        results = read_json(path)
        return results.facts["device"], _comparison_ratios(results)
    raise ValueError(f"{path} holds no results of bench.unified, bench.decode or pytest-benchmark")


def _suite_ratios(path: Path, benchmarks: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Ratios]]:
    timed = {benchmark["name"].removeprefix("test_"): benchmark["extra_info"] for benchmark in benchmarks}
    if not timed:
        raise ValueError(f"{path} holds no benchmark")
    ratios = {}
    for name, info in timed.items():
        if "over_yardstick" in info:
            ratios[name] = {YARDSTICK: 1 / info["over_yardstick"]}
        elif "of_copy_bandwidth" in info:
            ratios[name] = {"copy": info["of_copy_bandwidth"], "product": info["of_matrix_rate"]}
    return next(iter(timed.values()))["device"], ratios


def _comparison_ratios(results: Results) -> dict[str, Ratios]:
    operation = results.facts.get("operation", "page_attention").partition(" ")[0]  # older files name none
    rates = {"copy": results.copy_bandwidth, "product": results.matrix_rate}
    ratios = {}
    for report in results.reports:
        seconds = report.seconds(OURS)
        if math.isnan(seconds):
            continue
        work = {"copy": report.case.kv_bytes, "product": report.case.flops}
        found = {name: work[name] / seconds / rates[name] for name in BOUNDS}
        found[PEER] = report.seconds(PEER) / seconds
        ratios[f"{operation}[{report.case.name}]"] = {k: ratio for k, ratio in found.items() if not math.isnan(ratio)}
    return ratios


def yardstick_of(found: Ratios, stored: Ratios) -> str | None:
    """What the two are compared in, or None where they share nothing."""
    shared = found.keys() & stored.keys()
    if not shared:
        return None
    bound = max(BOUNDS, key=lambda name: stored.get(name, 0.0))
    return next((name for name in (PEER, YARDSTICK, bound) if name in shared), next(iter(sorted(shared))))


def compare(
    found: Mapping[str, Ratios], stored: Mapping[str, Ratios], *, whole: bool = False
) -> tuple[list[str], list[str]]:
    """Lines for all cases that both have, and those for the ones that got worse or that only the baseline has.

    Unless everything was measured (`whole`), cases of an operation that was not asked for are not missed.
    """
    lines, worse = [], []
    for name, ratios in found.items():
        yardstick = yardstick_of(ratios, stored.get(name, {}))
        if yardstick is None:
            lines.append(f"{name}: not in the baseline")
            continue
        before, now = stored[name][yardstick], ratios[yardstick]
        line = f"{name}: {before:.3f} -> {now:.3f} of {yardstick} ({now / before - 1:+.1%})"
        lines.append(line)
        if not now >= before * (1 - TOLERANCES[yardstick]):
            worse.append(line)
    missing = (name for name in stored if name not in found)
    worse += [f"{name}: not measured" for name in missing if whole or _operation(name) in _measured(found)]
    return lines, worse


def _operation(name: str) -> str:
    return name.partition("[")[0]


def _measured(names: Iterable[str]) -> set[str]:
    return {_operation(name) for name in names}


def baseline_path(device: str) -> Path:
    """Where the ratios of a kind of device are stored."""
    return BASELINES / f"{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def _stored(device: str) -> dict[str, Any]:
    path = baseline_path(device)
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"sources": [], "ratios": {}}
    return stored


def read_baseline(device: str) -> dict[str, Ratios]:
    """The stored ratios of a kind of device; none where nothing was stored."""
    ratios: dict[str, Ratios] = _stored(device)["ratios"]
    return ratios


def write_baseline(device: str, ratios: Mapping[str, Ratios], sources: Sequence[str]) -> Path:
    """Store ratios over those of the same cases, and beside the others, whose sources stay."""
    before = _stored(device)
    kept = {name: {k: round(ratio, 4) for k, ratio in found.items()} for name, found in ratios.items()}
    content = {
        "device": device,
        "sources": list(dict.fromkeys([*before["sources"], *sources])),
        "ratios": dict(sorted((before["ratios"] | kept).items())),
    }
    path = baseline_path(device)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def measure_here(folder: Path) -> list[Path]:
    """Run the suites, on a GPU also the comparison with FlashAttention-3 where it is; the files that hold the results.

    Raises:
        subprocess.CalledProcessError: a result was wrong, or could not be timed.
    """
    # Asked in a process of its own: one that has asked holds memory of the GPU.
    question = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(question, check=True, capture_output=True, text=True).stdout.strip()
    suite = ["-m", "pytest", "-q", "-o", "python_files=bench_*.py", "-p", "no:xdist", "--benchmark-columns=median"]
    suite.append(str(Path(__file__).parent))
    if backend == "gpu":
        peers = [f"--peers={PEER}"] if os.environ.get("FA3_LIBRARY") else []
        runs = {
            folder / "suite.json": [*suite, "--benchmark-json"],
            folder / "unified.json": [
                "-m",
                "bench.unified",
                f"--groups={','.join(GROUPS)}",
                "--repeats=10",
                *peers,
                "--json",
            ],
        }
    else:
        runs = {folder / f"suite{run}.json": [*suite, "--benchmark-json"] for run in range(CPU_RUNS)}
    with contextlib.nullcontext() if backend == "gpu" else on_one_core():
        for file, command in runs.items():
            subprocess.run([sys.executable, *command, str(file)], check=True)
    return list(runs)


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Processes that start now have one thread to compute with: several take times that depend on who waits for whom.

    Only where the system can do that, as Linux can.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def best_of(runs: Iterable[Mapping[str, Ratios]]) -> dict[str, Ratios]:
    """Every case of some runs with its best ratios."""
    best: dict[str, Ratios] = {}
    for ratios in runs:
        for name, found in ratios.items():
            known = best.get(name, {})
            best[name] = {key: max(found.get(key, 0.0), known.get(key, 0.0)) for key in {**known, **found}}
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.regression", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="files of results, of one kind of device")
    parser.add_argument("--run", action="store_true", help="measure on this machine first")
    parser.add_argument("--write", action="store_true", help="store what was found as the baseline of this device")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        files = [*options.results, *(measure_here(Path(folder)) if options.run else [])]
        if not files:
            parser.error("no results: name files, or --run")
        try:
            read = [read_ratios(file) for file in files]
        except (OSError, ValueError) as error:
            parser.error(str(error))
    devices = {device for device, _ in read}
    if len(devices) != 1:
        parser.error(f"the results are of {sorted(devices)}, expected one kind of device")
    device, ratios = devices.pop(), best_of(ratios for _, ratios in read)
    lines, worse = compare(ratios, read_baseline(device), whole=options.run)
    print(*lines, sep="\n")
    if options.write:
        print(f"stored in {write_baseline(device, ratios, [file.name for file in files])}")
        return 0
    print(f"\n{len(ratios)} cases on {device}, {len(worse)} worse than in {baseline_path(device)}")
    print(*worse, sep="\n")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
