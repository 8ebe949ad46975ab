"""What the comparisons with peers print, store and read back."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import AttentionCase
from bench.peers import PeerReport
from bench.timing import Timing, print_machine

OURS = "ours"


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

    case: AttentionCase
    measurements: tuple[Measurement, ...]
    peers: dict[str, Timing]
    peer_errors: dict[str, float]

    @property
    def timed(self) -> list[tuple[float, Measurement]]:
        """Median seconds and measurement of what was timed and right, fastest first."""
        timed = [(m.timing.median, m) for m in self.measurements if m.timing is not None and m.failure is None]
        return sorted(timed, key=lambda pair: pair[0])

    def timing(self, name: str) -> Timing | None:
        """That of a peer, or of our best configuration where `name` is `OURS`; None if not timed."""
        if name == OURS:
            return self.timed[0][1].timing if self.timed else None
        return self.peers.get(name)

    def seconds(self, name: str) -> float:
        """Median seconds a call of a peer or of ours; NaN if not timed."""
        timing = self.timing(name)
        return math.nan if timing is None else timing.median


@dataclass(frozen=True)
class Results:
    """Everything measured in one run; times are in seconds, rates in bytes per second."""

    reports: Sequence[CaseReport]
    copy_rates: Mapping[str, float]
    facts: Mapping[str, str]
    peers: Sequence[PeerReport] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the cases that are reported together; a case may be in several groups."""
    matrix_rate: float = math.nan
    """FLOPs per second of a large bfloat16 matrix product; NaN if not measured."""

    @property
    def copy_bandwidth(self) -> float:
        """The faster way to copy; NaN if none was measured."""
        return max(self.copy_rates.values(), default=math.nan)

    @property
    def peer_names(self) -> list[str]:
        return [peer.name for peer in self.peers]

    def group(self, name: str) -> list[CaseReport]:
        """The cases of one group that were measured.

        Raises:
            ValueError: there are none.
        """
        by_name = {report.case.name: report for report in self.reports}
        reports = [by_name[case] for case in self.groups.get(name, ()) if case in by_name]
        if not reports:
            raise ValueError(f"no case of the group {name!r} was measured, only of {list(self.groups)}")
        return reports


def print_report(results: Results) -> None:
    """Print failures and circumstances, then the best configuration of each case as a Markdown table, and means."""
    for peer in results.peers:
        _print_failures((message, f"{peer.name} on {case}") for case, message in peer.errors.items())
    _print_failures(
        (measurement.failure, f"{report.case.name} [{measurement.config}]")
        for report in results.reports
        for measurement in report.measurements
        if measurement.failure
    )
    facts = dict(results.facts) | {name: fact for peer in results.peers for name, fact in peer.facts.items()}
    print_machine(facts, results.copy_rates)
    print(f"matrix product: {results.matrix_rate / 1e12:.1f} TFLOP/s")
    print("TB/s counts K and V once, FLOPs only what the masks leave; `*`: the host could not enqueue calls as fast as")
    print("the device ran them.")

    groups = {name: results.group(name) for name in results.groups} or {"": list(results.reports)}
    for name, reports in groups.items():
        print(f"\n{name}" if len(groups) > 1 else "")
        _print_table(comparison_table(results, reports))
    print()
    for name, reports in groups.items():
        _print_means(f", {name}" if len(groups) > 1 else "", reports, results.peer_names)
    _print_variants(results)


def _print_failures(failures: Iterable[tuple[str, str]]) -> None:
    """Print each message once, with how often it came and where first: a sweep meets the same one many times."""
    places: dict[str, list[str]] = {}
    for message, place in failures:
        places.setdefault(message, []).append(place)
    for message, where in places.items():
        others = f" and {len(where) - 1} more" if len(where) > 1 else ""
        print(f"{where[0]}{others}: {message}")


def comparison_table(results: Results, reports: Sequence[CaseReport]) -> list[list[str]]:
    """Cases with our best configuration beside every peer; the first row names the columns."""
    return [_columns(results), *(_row(report, results) for report in reports)]


def means(reports: Sequence[CaseReport], peer: str) -> tuple[float, float, int] | None:
    """Geometric mean and least of the peer's times over ours, and of how many cases; None where it was not timed."""
    ratios = [report.seconds(peer) / report.seconds(OURS) for report in reports]
    values = [ratio for ratio in ratios if not math.isnan(ratio)]
    return (statistics.geometric_mean(values), min(values), len(values)) if values else None


def _columns(results: Results) -> list[str]:
    columns = ["case", "KV MB", "GFLOP", "ours us", "10-90 %", "TB/s", "of copy", "TFLOP/s"]
    for name in results.peer_names:
        columns += [f"{name} us", "10-90 %", f"{name} / ours"]
    return [*columns, "row error", "config"]


def _row(report: CaseReport, results: Results) -> list[str]:
    case, seconds = report.case, report.seconds(OURS)
    best = report.timed[0][1] if report.timed else Measurement("none", None)
    rate = case.kv_bytes / seconds
    row = [case.name, f"{case.kv_bytes / 1e6:.0f}", f"{case.flops / 1e9:.1f}", *_times(best.timing)]
    row += [f"{rate / 1e12:.2f}", f"{rate / results.copy_bandwidth:.1%}", f"{case.flops / seconds / 1e12:.0f}"]
    for name in results.peer_names:
        row += _times(report.peers.get(name))
        row.append(f"{report.seconds(name) / seconds:.3f}" if name in report.peers else "-")
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


def _print_means(label: str, reports: Sequence[CaseReport], peers: Sequence[str]) -> None:
    for peer in peers:
        if found := means(reports, peer):
            mean, least, count = found
            print(f"{peer} / ours{label}: geometric mean {mean:.3f}, least {least:.3f}, over {count} cases")


def _print_variants(results: Results) -> None:
    """Print what variants such as `64x4096-d64` cost, per unit of work, over the case that they are variants of."""
    by_name = {report.case.name: report for report in results.reports}
    for report in results.reports:
        base = by_name.get(report.case.base, report)
        if base is report:
            continue
        unit = "KV byte" if report.case.is_decode else "FLOP"
        costs = {name: relative_cost(report, base, name) for name in (OURS, *results.peer_names)}
        words = ", ".join(f"{name} {cost:.3f}" for name, cost in costs.items() if not math.isnan(cost))
        print(f"{report.case.name}: time per {unit} over that of {base.case.name}: {words or 'not measured'}")


def relative_cost(report: CaseReport, base: CaseReport, name: str) -> float:
    """Time over that of `base`, each per byte of K and V for single tokens and otherwise per FLOP; NaN if not timed."""
    work = base.case.kv_bytes / report.case.kv_bytes if report.case.is_decode else base.case.flops / report.case.flops
    return report.seconds(name) / base.seconds(name) * work


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


def write_json(path: Path, results: Results) -> None:
    """Store everything measured."""
    content: dict[str, Any] = {
        "facts": dict(results.facts),
        "copy_bytes_per_second": dict(results.copy_rates),
        "matrix_flops_per_second": None if math.isnan(results.matrix_rate) else results.matrix_rate,
        "peers": {peer.name: {"facts": peer.facts, "errors": peer.errors} for peer in results.peers},
        "groups": {name: list(cases) for name, cases in results.groups.items()},
        "cases": [
            {
                **report.case.to_json(),
                "kv_bytes": report.case.kv_bytes,
                "flops": report.case.flops,
                "measurements": [dataclasses.asdict(measurement) for measurement in report.measurements],
                "peers": {name: dataclasses.asdict(timing) for name, timing in report.peers.items()},
                "peer_row_errors": report.peer_errors,
            }
            for report in results.reports
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Results:
    """What `write_json` stored, without the peers' outputs; older files lack groups and the matrix rate."""
    content = json.loads(path.read_text())
    return Results(
        reports=[_read_case(fields) for fields in content["cases"]],
        copy_rates=content["copy_bytes_per_second"],
        facts=content["facts"],
        peers=[PeerReport(name, peer["facts"], {}, peer["errors"]) for name, peer in content["peers"].items()],
        groups=content.get("groups", {}),
        matrix_rate=content.get("matrix_flops_per_second") or math.nan,
    )


def _read_case(fields: dict[str, Any]) -> CaseReport:
    measurements = (
        Measurement(**{**measurement, "timing": measurement["timing"] and Timing(**measurement["timing"])})
        for measurement in fields["measurements"]
    )
    return CaseReport(
        AttentionCase.from_json(fields),
        tuple(measurements),
        {name: Timing(**timing) for name, timing in fields["peers"].items()},
        fields["peer_row_errors"],
    )
