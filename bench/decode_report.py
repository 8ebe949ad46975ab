"""What `bench.decode` prints and stores."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.decode_cases import DecodeCase
from bench.peers import PeerReport
from bench.timing import Timing


@dataclass(frozen=True)
class Measurement:
    """One configuration on one case; without a timing it failed, and `failure` says how."""

    config: str
    timing: Timing | None
    error: float | None = None
    """Largest relative error of an output row against the reference; None where unchecked."""
    failure: str | None = None


@dataclass(frozen=True)
class CaseReport:
    """All configurations of one case, and the peers' times."""

    case: DecodeCase
    measurements: tuple[Measurement, ...]
    peers: dict[str, Timing]
    peer_errors: dict[str, float]

    @property
    def timed(self) -> list[tuple[float, Measurement]]:
        """Median seconds and measurement of what was timed and right, fastest first."""
        timed = [(m.timing.median, m) for m in self.measurements if m.timing is not None and m.failure is None]
        return sorted(timed, key=lambda pair: pair[0])


def print_report(
    reports: Sequence[CaseReport], copy_rates: dict[str, float], peers: Sequence[PeerReport], facts: dict[str, str]
) -> None:
    """Print failures and circumstances, then the best configuration of each case as a Markdown table, and means."""
    bandwidth = max(copy_rates.values(), default=math.nan)
    for peer in peers:
        for case, error in peer.errors.items():
            print(f"{peer.name} failed on {case}: {error}")
    _print_failures(reports)
    for key, value in [*facts.items(), *(item for peer in peers for item in peer.facts.items())]:
        print(f"{key}: {value}")
    print("copy: " + ", ".join(f"{name} {rate / 1e12:.3f} TB/s" for name, rate in copy_rates.items()))
    print("TB/s counts K and V once; `*`: the host could not enqueue calls as fast as the device ran them.\n")

    columns = ["case", "KV MB", "ours us", "10-90 %", "TB/s", "of copy"]
    for peer in peers:
        columns += [f"{peer.name} us", "10-90 %", f"{peer.name} / ours"]
    rows = [[*columns, "row error", "config"]]
    ratios: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for report in reports:
        rows.append(_row(report, bandwidth, [peer.name for peer in peers], ratios))
    _print_table(rows)
    print()
    for name, values in ratios.items():
        if values:
            mean, least = statistics.geometric_mean(values), min(values)
            print(f"{name} / ours: geometric mean {mean:.3f}, least {least:.3f}, over {len(values)} cases")


def _print_failures(reports: Sequence[CaseReport]) -> None:
    """Print each way to fail once, with how often and where first: a sweep meets the same one many times."""
    places: dict[str, list[str]] = {}
    for report in reports:
        for measurement in report.measurements:
            if measurement.failure:
                places.setdefault(measurement.failure, []).append(f"{report.case.name} [{measurement.config}]")
    for failure, where in places.items():
        others = f" and {len(where) - 1} more" if len(where) > 1 else ""
        print(f"{where[0]}{others}: {failure}")


def _row(report: CaseReport, bandwidth: float, peers: Sequence[str], ratios: dict[str, list[float]]) -> list[str]:
    best_seconds, best = report.timed[0] if report.timed else (math.nan, Measurement("none", None))
    rate = report.case.kv_bytes / best_seconds
    row = [report.case.name, f"{report.case.kv_bytes / 1e6:.0f}", *_times(best.timing)]
    row += [f"{rate / 1e12:.2f}", f"{rate / bandwidth:.1%}"]
    for name in peers:
        timing = report.peers.get(name)
        row += _times(timing)
        row.append(f"{timing.median / best_seconds:.3f}" if timing else "-")
        if timing and report.timed:
            ratios[name].append(timing.median / best_seconds)
    return [*row, "-" if best.error is None else f"{best.error:.1e}", best.config]


def _times(timing: Timing | None) -> list[str]:
    if timing is None:
        return ["-", "-"]
    mark = "*" if timing.host_bound else ""
    return [f"{timing.median * 1e6:.1f}{mark}", f"{timing.low * 1e6:.1f}-{timing.high * 1e6:.1f}"]


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def print_ranking(report: CaseReport, count: int = 5) -> None:
    """Print the fastest configurations of one case in one line."""
    ranking = "; ".join(f"{seconds * 1e6:.1f} us {m.config}" for seconds, m in report.timed[:count])
    failed = sum(m.failure is not None for m in report.measurements)
    print(f"{report.case.name}: {ranking or 'nothing ran'}" + (f" ({failed} failed)" if failed else ""), flush=True)


def print_robust_configs(reports: Sequence[CaseReport], count: int = 10) -> None:
    """Print the configurations that lose least against the best of each case, over the cases where all of them ran."""
    losses: dict[str, list[float]] = {}
    for report in reports:
        for seconds, measurement in report.timed:
            losses.setdefault(measurement.config, []).append(seconds / report.timed[0][0])
    complete = [(statistics.geometric_mean(x), max(x), name) for name, x in losses.items() if len(x) == len(reports)]
    print("one configuration for all cases: time over the best of each case, geometric mean and worst")
    for mean, worst, name in sorted(complete)[:count]:
        print(f"  {mean:.3f} {worst:.3f} {name}")


def write_json(
    path: Path,
    reports: Sequence[CaseReport],
    copy_rates: dict[str, float],
    peers: Sequence[PeerReport],
    facts: dict[str, str],
) -> None:
    """Store everything measured; times are in seconds, rates in bytes per second."""
    content: dict[str, Any] = {
        "facts": facts,
        "copy_bytes_per_second": copy_rates,
        "peers": {peer.name: {"facts": peer.facts, "errors": peer.errors} for peer in peers},
        "cases": [
            {
                **report.case.to_json(),
                "kv_bytes": report.case.kv_bytes,
                "measurements": [dataclasses.asdict(measurement) for measurement in report.measurements],
                "peers": {name: dataclasses.asdict(timing) for name, timing in report.peers.items()},
                "peer_row_errors": report.peer_errors,
            }
            for report in reports
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
