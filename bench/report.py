"""Stored results as one page: `python -m bench.report RESULTS.json ... --html report.html --pictures docs/h100`.

The page holds its pictures and needs nothing else. It takes what the benchmarks of this folder store with `--json` (or
`--benchmark-json`), each file of which says on what machine and with which command it was made. Example:

    python -m bench.report bench/baselines/unified_h100*.json --html report.html --pictures docs/h100
"""

from __future__ import annotations

import argparse
import base64
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import plots
from bench.results import Results, comparison_table, means, read_json

SCALING = {"cliff": plots.plot_bandwidth, "chunks": plots.plot_chunks, "contexts": plots.plot_contexts}
VARIANTS = {"shapes", "features"}  # of a case or two, which say little under a roofline
CAPTIONS = {
    "cliff": "Bandwidth over the batch size: no step anywhere.",
    "chunks": "From decoding over short chunks to prompts.",
    "contexts": "Time over the length of the context.",
}
TEMPLATE = Path(__file__).parent / "report.html.jinja"


@dataclass(frozen=True)
class Table:
    """Rows of text, the first of which names the columns."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    caption: str
    path: Path

    @property
    def data(self) -> str:
        """The bytes, as a page holds them."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass
class Section:
    """What one file of results says."""

    title: str
    facts: Mapping[str, str]
    remarks: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def read_section(path: Path, pictures: Path) -> Section:
    """The section of a file of results; its pictures are drawn into a folder, named after the file.

    Raises:
        ValueError: no benchmark of this folder stored the file.
    """
    content = json.loads(path.read_text())
    for is_such, build in _KINDS:
        if is_such(content):
            return build(path, content, pictures)
    raise ValueError(f"{path} holds no results of a benchmark of this project")


def _comparison(path: Path, content: Mapping[str, Any], pictures: Path) -> Section:
    del content
    results = read_json(path)
    facts = dict(results.facts) | {k: v for peer in results.peers for k, v in peer.facts.items()}
    if not results.groups:
        results = _in_one_group(results)
    section = Section(f"{facts.get('operation', 'page_attention')}: {', '.join(results.groups)}", facts)
    others = {name: cases for name, cases in results.groups.items() if name not in SCALING}
    draw = functools.partial(_picture, pictures, path)
    if others:
        compared = _of_groups(results, others)
        if others.keys() - VARIANTS:
            caption = "Achieved FLOPs under the two ceilings."
            section.pictures.append(draw("roofline", caption, functools.partial(plots.plot_roofline, compared)))
        for name in results.peer_names:
            if any(means(results.group(group), name) for group in others):
                plot = functools.partial(plots.plot_ratios, compared, name)
                section.pictures.append(draw(f"beside_{name}", f"Beside {name}.", plot))
    for group in results.groups:
        if group in SCALING:
            section.pictures.append(draw(group, CAPTIONS[group], functools.partial(SCALING[group], results)))
        reports = results.group(group)
        found = {name: means(reports, name) for name in results.peer_names}
        words = [f"{name} / ours {mean[0]:.2f} (least {mean[1]:.2f})" for name, mean in found.items() if mean]
        title = f"{group}: {', '.join(words)}" if words else group
        section.tables.append(Table(title, comparison_table(results, reports)))
    for peer in results.peers:
        section.remarks += [f"{peer.name} on {case}: {message}" for case, message in peer.errors.items()]
    return section


def _in_one_group(results: Results) -> Results:
    return _of_groups(results, {"cases": [report.case.name for report in results.reports]})


def _of_groups(results: Results, groups: Mapping[str, Sequence[str]]) -> Results:
    names = {name for cases in groups.values() for name in cases}
    reports = [report for report in results.reports if report.case.name in names]
    return Results(reports, results.copy_rates, results.facts, results.peers, groups, results.matrix_rate)


def _picture(folder: Path, source: Path, name: str, caption: str, draw: Callable[[Path], None]) -> Picture:
    path = folder / f"{source.stem}_{name}.png"
    draw(path)
    return Picture(caption, path)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _ragged(path: Path, content: Mapping[str, Any], pictures: Path) -> Section:
    del path, pictures
    copy = max(content["copy"].values())
    rows = [["rows", "us", "TB/s", "of copy", "page_attention us", "page / ragged"]]
    for row in content["seconds"]:
        rate = row["bytes"] / row["ragged"]
        speeds = [_us(row["ragged"]), f"{rate / 1e12:.2f}", f"{rate / copy:.0%}", _us(row["pages"])]
        rows.append([row["case"], *speeds, f"{row['pages'] / row['ragged']:.2f}"])
    return Section("ragged_decode_attention", content["facts"], tables=[Table("over dense rows", rows)])


def _cache(path: Path, content: Mapping[str, Any], pictures: Path) -> Section:
    del path, pictures
    copy = max(content["copy"].values())
    rows = [["call", "us", "TB/s", "of copy"]]
    for row in content["calls"]:
        rate = row["bytes"] / row["seconds"]
        rows.append([row["call"], _us(row["seconds"]), f"{rate / 1e12:.2f}", f"{rate / copy:.0%}"])
    title = "write_kv_pages and merge_attention_states"
    return Section(title, content["facts"], tables=[Table("bytes read and written", rows)])


def _shared_prefix(path: Path, content: Mapping[str, Any], pictures: Path) -> Section:
    del path, pictures
    rows = [["shared tokens", "flat us", "recipe us", "flat / recipe", "at once us", "flat / at once"]]
    for row in content["seconds"]:
        others = (text for way in ("recipe", "at_once") for text in (_us(row[way]), f"{row['flat'] / row[way]:.2f}"))
        rows.append([str(row["shared"]), _us(row["flat"]), *others])
    title = f"{content['sequences']} sequences with {content['own']} tokens of their own"
    return Section("A prefix that many sequences share", content["facts"], tables=[Table(title, rows)])


def _sharded(path: Path, content: Mapping[str, Any], pictures: Path) -> Section:
    del path, pictures
    timings = {name: timing["median"] for name, timing in content["timings"].items()}
    alone = next(iter(timings.values()))
    rows = [["shared out", "us", "speed-up"]]
    rows += [[name, _us(seconds), f"{alone / seconds:.2f}"] for name, seconds in timings.items()]
    return Section("Several devices", content["facts"], tables=[Table(content["case"]["name"], rows)])


def _dense(path: Path, content: Mapping[str, Any], pictures: Path) -> Section:
    del path, pictures
    rows = [["case", "platform", "us", "TFLOP/s", "of matrix product"]]
    for row in content["cases"]:
        if "failure" in row:
            rows.append([row["case"], row["platform"], row["failure"], "", ""])
            continue
        rate = row["flops"] / row["timing"]["median"]
        share = rate / content["matrix_flops_per_second"]
        rows.append([row["case"], row["platform"], _us(row["timing"]["median"]), f"{rate / 1e12:.0f}", f"{share:.0%}"])
    return Section("attention", content["facts"], tables=[Table(f"heads of {content['model']}", rows)])


def _serving(path: Path, content: Mapping[str, Any], pictures: Path) -> Section:
    from bench.serving_report import StepSample, draw_timeline

    samples = [StepSample(*sample) for sample in content["samples"]]

    def draw(target: Path) -> None:
        draw_timeline(samples, content["pool_pages"], content["max_batch"], target)

    picture = _picture(pictures, path, "timeline", "Batch, pool and tokens over the time of the run.", draw)
    table = Table(content["title"], [["measure", "value"], *content["measures"]])
    return Section("Serving a request trace", content["facts"], pictures=[picture], tables=[table])


def _suite(path: Path, content: Mapping[str, Any], pictures: Path) -> Section:
    del path, pictures
    rows = [["case", "us a call", "GB/s", "TFLOP/s", "of copy", "of matrix product"]]
    for benchmark in content["benchmarks"]:
        info = benchmark["extra_info"]
        if "seconds_per_call" in info:
            rates = [f"{info['GB/s']:.0f}", f"{info['TFLOP/s']:.1f}"]
            shares = [f"{info[name]:.0%}" for name in ("of_copy_bandwidth", "of_matrix_rate")]
            name = benchmark["name"].removeprefix("test_")
            rows.append([name, _us(info["seconds_per_call"]), *rates, *shares])
    facts = {"device": content["benchmarks"][0]["extra_info"]["device"], "made": content["datetime"]}
    return Section("The suites", facts, tables=[Table("pytest-benchmark", rows)])


_KINDS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Path, Mapping[str, Any], Path], Section]], ...] = (
    (lambda content: "benchmarks" in content, _suite),
    (lambda content: "samples" in content, _serving),
    (lambda content: "timings" in content, _sharded),
    (lambda content: "calls" in content, _cache),
    (lambda content: "sequences" in content, _shared_prefix),
    (lambda content: "seconds" in content, _ragged),
    (lambda content: "model" in content and "cases" in content, _dense),
    (lambda content: "copy_bytes_per_second" in content, _comparison),
)


def render(sections: Sequence[Section], title: str) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(title=title, sections=sections)


def devices_of(sections: Sequence[Section]) -> Iterator[str]:
    """The devices that the results are of, each once."""
    yield from dict.fromkeys(section.facts.get("device", "unknown device") for section in sections)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="files of results")
    parser.add_argument("--html", type=Path, default=Path("build/report.html"), help="the page")
    parser.add_argument("--pictures", type=Path, help="folder to keep the pictures in, too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            sections = [read_section(path, options.pictures or Path(folder)) for path in options.results]
        except (OSError, ValueError) as error:
            parser.error(str(error))
        page = render(sections, f"Attention kernels on {', '.join(devices_of(sections))}")
    options.html.parent.mkdir(parents=True, exist_ok=True)
    options.html.write_text(page)
    print(f"{len(sections)} sections, {sum(len(section.pictures) for section in sections)} pictures: {options.html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
