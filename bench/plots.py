"""Pictures of stored results: bandwidth over the batch size, and time over the new tokens of a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.results import OURS, CaseReport, Results

INK, GRID = "#333333", "#d9d9d9"
COLOURS = ("#4477aa", "#cc3311", "#228833")
MARKERS = ("o", "s", "^")
SIZE, DPI = (9.0, 5.0), 130  # inches: text stays readable where the picture is shown 900 pixels wide


def plot_bandwidth(results: Results, path: Path) -> None:
    """Draw bytes per second over the batch size, from the group `cliff`.

    Raises:
        ValueError: no case of that group was measured.
    """
    reports = results.group("cliff")
    with _figure(path) as axes:
        for name, style in _styles(results):
            _draw(axes, reports, lambda case: case.case.num_seqs, name, _terabytes, label=name, **style)
        bandwidth = results.copy_bandwidth / 1e12
        axes.axhline(bandwidth, color=INK, linestyle="--", linewidth=1, label=f"copy, {bandwidth:.2f} TB/s")
        _log2_axis(axes, sorted({report.case.num_seqs for report in reports}), "sequences in the batch")
        axes.set_ylabel("KV cache read, TB/s")
        axes.set_title(f"Decoding, {reports[0].case.lengths[0]} keys a sequence, {_device(results)}")


def plot_chunks(results: Results, path: Path) -> None:
    """Draw microseconds a call over the new tokens of each sequence, from the group `chunks`.

    Raises:
        ValueError: no case of that group was measured.
    """
    families: dict[tuple[int, int], list[CaseReport]] = {}
    for report in results.group("chunks"):
        families.setdefault((report.case.num_seqs, report.case.lengths[0]), []).append(report)
    tokens = sorted({report.case.query_lens[0] for reports in families.values() for report in reports})
    with _figure(path) as axes:
        for line, ((num_seqs, keys), reports) in zip(("-", ":", "--"), families.items(), strict=False):
            for name, style in _styles(results):
                label = f"{name}, {num_seqs} x {keys} keys"
                _draw(axes, reports, lambda case: case.case.query_lens[0], name, _us, label=label, ls=line, **style)
        _log2_axis(axes, tokens, "new tokens of each sequence")
        axes.set_yscale("log")
        axes.set_ylabel("us a call")
        axes.set_title(f"From one new token to long chunks, {_device(results)}")


def _draw(
    axes: Any,
    reports: Sequence[CaseReport],
    place: Callable[[CaseReport], int],
    name: str,
    height: Callable[[CaseReport, str], float],
    **style: Any,
) -> None:
    points = sorted((place(report), height(report, name)) for report in reports)
    points = [point for point in points if not math.isnan(point[1])]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _terabytes(report: CaseReport, name: str) -> float:
    return report.case.kv_bytes / report.seconds(name) / 1e12


def _us(report: CaseReport, name: str) -> float:
    return report.seconds(name) * 1e6


def _styles(results: Results) -> Iterator[tuple[str, dict[str, Any]]]:
    names = [OURS, *results.peer_names]
    for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        yield name, {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.8}


def _device(results: Results) -> str:
    return results.facts.get("device", "unknown device")


def _log2_axis(axes: Any, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel(label)


@contextmanager
def _figure(path: Path) -> Iterator[Any]:
    """Axes to draw on; the picture is stored as a PNG at `path` when they are done."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, **style}):
        figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
        yield axes
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, facecolor="white")
        pyplot.close(figure)
