"""Pictures of stored results, as PNGs: rooflines, ratios to peers, time and bandwidth over sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.results import OURS, CaseReport, Results

INK, GRID = "#333333", "#d9d9d9"
COLOURS = ("#4477aa", "#cc3311", "#228833", "#aa7744", "#8844aa", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", ":", "--", "-.")
OPEN: dict[str, Any] = {"linestyle": "", "markerfacecolor": "white", "markersize": 6.5, "zorder": 3}
OPEN_LABEL = "open: the host was the limit"
SIZE, DPI = (9.0, 5.0), 130  # inches: text stays readable where the picture is shown 900 pixels wide

DATASHEET_MATRIX_RATES = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""FLOPs a second of dense bfloat16 products, for results of before a run measured its own."""


def plot_roofline(results: Results, path: Path) -> None:
    """Draw FLOPs per second over FLOPs per byte of K and V, under the two ceilings.

    Raises:
        ValueError: nothing was measured.
    """
    if not results.reports:
        raise ValueError("no case was measured")
    device = _device(results)
    is_measured = not math.isnan(results.matrix_rate)
    matrix_rate = results.matrix_rate if is_measured else DATASHEET_MATRIX_RATES.get(device, math.nan)
    intensities = [_intensity(report) for report in results.reports]
    with figure(path) as axes:
        for name, style in _styles(results):
            points = [
                (_intensity(report), report.case.flops / report.seconds(name) / 1e12)
                for report in results.reports
                if not math.isnan(report.seconds(name))
            ]
            if points:
                fill = style["color"] if name == OURS else "none"  # peers as outlines, so that none hides another
                axes.scatter(
                    *zip(*points, strict=True),
                    facecolors=fill,
                    edgecolors=style["color"],
                    marker=style["marker"],
                    s=36,
                    label=name,
                    zorder=3,
                )
        bandwidth = results.copy_bandwidth
        ridge = matrix_rate / bandwidth if not math.isnan(matrix_rate) else 4 * max(intensities)
        low, high = min(intensities) / 2, 2 * max([*intensities, ridge])
        label = f"copy bandwidth of the run, {bandwidth / 1e12:.2f} TB/s"
        axes.plot(
            [low, ridge], [low * bandwidth / 1e12, ridge * bandwidth / 1e12], color=INK, lw=1, ls="--", label=label
        )
        if not math.isnan(matrix_rate):
            words = "matrix product of the run" if is_measured else "matrix product of the datasheet"
            label = f"{words}, {matrix_rate / 1e12:.0f} TFLOP/s"
            axes.plot([ridge, high], [matrix_rate / 1e12] * 2, color=INK, lw=1, ls=":", label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs a byte of K and V")
        axes.set_ylabel("TFLOP/s")
        axes.set_title(f"Every case under its roofline, {device}")


def plot_ratios(results: Results, peer: str, path: Path) -> None:
    """Draw the peer's time over ours for every case, by groups.

    Raises:
        ValueError: the peer was not timed.
    """
    groups: dict[str, dict[str, float]] = {}
    seen: set[str] = set()
    for group in results.groups:
        ratios = {
            r.case.name: r.seconds(peer) / r.seconds(OURS) for r in results.group(group) if r.case.name not in seen
        }
        seen |= ratios.keys()
        if timed := {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}:
            groups[group] = timed
    if not groups:
        raise ValueError(f"{peer} was not timed")
    num_lines = sum(map(len, groups.values())) + 1.4 * len(groups)
    with figure(path, size=(SIZE[0], 1.0 + 0.22 * num_lines)) as axes:
        place = 0.0
        ticks: dict[float, str] = {}
        for group, timed in groups.items():
            axes.text(0.005, place, group, va="center", weight="bold", fontsize=9.5)
            places = [place + 1 + index for index in range(len(timed))]
            axes.barh(places, list(timed.values()), color=COLOURS[0], height=0.78)
            for y, ratio in zip(places, timed.values(), strict=True):
                axes.text(ratio - 0.008, y, f"{ratio:.2f}", va="center", ha="right", color="white", fontsize=9)
            ticks |= dict(zip(places, timed, strict=True))
            place = places[-1] + 1.4
        axes.axvline(1.0, color=INK, lw=1)
        axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
        axes.set_ylim(place - 0.6, -0.8)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"time of {peer} over ours: above 1 ours is faster")
        axes.set_title(f"Beside {peer}, {_device(results)}")


def plot_bandwidth(results: Results, path: Path) -> None:
    """Draw bytes per second over the batch size, from the group `cliff`.

    Raises:
        ValueError: no case of that group was measured.
    """
    reports = results.group("cliff")
    with figure(path) as axes:
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
    families: dict[str, list[CaseReport]] = {}
    for report in results.group("chunks"):
        families.setdefault(f"{report.case.num_seqs} x {report.case.lengths[0]} keys", []).append(report)
    with _family_figure(
        results, families, path, lambda report: report.case.query_lens[0], "new tokens of each sequence"
    ) as axes:
        axes.set_title(f"From one new token to long chunks, {_device(results)}")


def plot_contexts(results: Results, path: Path) -> None:
    """Draw microseconds a call over the keys of each sequence, from the group `contexts`.

    Raises:
        ValueError: no case of that group was measured.
    """
    families: dict[str, list[CaseReport]] = {}
    for report in results.group("contexts"):
        num_seqs = report.case.num_seqs
        families.setdefault(f"{num_seqs} sequence{'s' if num_seqs > 1 else ''}", []).append(report)
    with _family_figure(
        results, families, path, lambda report: report.case.lengths[0], "keys of each sequence"
    ) as axes:
        axes.set_title(f"Decoding over context lengths, {_device(results)}")


@contextmanager
def _family_figure(
    results: Results,
    families: dict[str, list[CaseReport]],
    path: Path,
    place: Callable[[CaseReport], int],
    label: str,
) -> Iterator[Any]:
    """Lines of microseconds a call, one for each family and implementation, over `place`."""
    ticks = sorted({place(report) for reports in families.values() for report in reports})
    with figure(path) as axes:
        for line, (family, reports) in zip(LINES, families.items(), strict=False):
            for name, style in _styles(results):
                _draw(axes, reports, place, name, _us, label=f"{name}, {family}", ls=line, **style)
        _log2_axis(axes, ticks, label)
        axes.set_yscale("log")
        axes.set_ylabel("us a call")
        yield axes


def _draw(
    axes: Any,
    reports: Sequence[CaseReport],
    place: Callable[[CaseReport], int],
    name: str,
    height: Callable[[CaseReport, str], float],
    **style: Any,
) -> None:
    drawn = sorted((report for report in reports if not math.isnan(height(report, name))), key=place)
    if drawn:
        axes.plot([place(report) for report in drawn], [height(report, name) for report in drawn], **style)
    for report in drawn:
        if _is_host_bound(report, name):
            axes.plot(place(report), height(report, name), **OPEN, color=style["color"], marker=style["marker"])
            if OPEN_LABEL not in axes.get_legend_handles_labels()[1]:
                axes.plot([], [], **OPEN, color=INK, marker="o", label=OPEN_LABEL)


def _is_host_bound(report: CaseReport, name: str) -> bool:
    timing = report.timing(name)
    return timing is not None and timing.host_bound


def _terabytes(report: CaseReport, name: str) -> float:
    return report.case.kv_bytes / report.seconds(name) / 1e12


def _us(report: CaseReport, name: str) -> float:
    return report.seconds(name) * 1e6


def _intensity(report: CaseReport) -> float:
    return report.case.flops / report.case.kv_bytes


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
def figure(path: Path, *, rows: int = 1, size: tuple[float, float] = SIZE, font_size: int = 11) -> Iterator[Any]:
    """Axes to draw on, or an array of as many as there are rows; the picture is stored as a PNG when they are done.

    Linear axes begin at 0, and where something has a label there is a legend.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "font.size": font_size,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        picture, axes = pyplot.subplots(rows, 1, figsize=size, sharex=True, layout="constrained")
        yield axes
        for part in picture.axes:
            part.grid(axis="x" if part.yaxis_inverted() else "both", color=GRID, linewidth=0.6)
            part.set_axisbelow(True)
            if part.get_yscale() == "linear" and not part.yaxis_inverted():
                part.set_ylim(bottom=0)
            handles, labels = part.get_legend_handles_labels()
            if part.get_legend() is None and handles:
                order = sorted(range(len(labels)), key=lambda number: labels[number] == OPEN_LABEL)
                part.legend([handles[number] for number in order], [labels[number] for number in order], frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=DPI, facecolor="white")
        pyplot.close(picture)
