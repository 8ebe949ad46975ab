"""The page of stored results: every kind of file has its section, pictures show something, nothing is left outside."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from bench import plots, report
from bench.cases import GROUPS, parse_case
from bench.regression import BASELINES
from bench.results import OURS, Results, write_json
from bench.serving import main as serve
from tests.test_bench_unified import results_of

STORED = sorted(
    path for path in BASELINES.glob("*.json") if path.stem not in ("static", "cpu", "nvidia_h100_80gb_hbm3")
)


def assert_shows_something(path: Path) -> None:
    from matplotlib import image

    picture = image.imread(path)
    assert picture.shape[1] >= 900
    assert picture[0, 0].min() == 1  # a white border
    assert picture[..., :3].std() > 0.05


def scaling_results() -> Results:
    groups = {name: GROUPS[name] for name in ("cliff", "chunks", "contexts", "decode")}
    names = dict.fromkeys(name for cases in groups.values() for name in cases)
    return results_of({name: 1e-5 + parse_case(name).kv_bytes / 3e12 for name in names}, groups)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_stored_result_has_a_section(path: Path, tmp_path: Path) -> None:
    section = report.read_section(path, tmp_path)
    assert section.facts["device"].startswith("NVIDIA H")
    assert section.facts["command"].startswith("python -m bench.")
    assert all(len(row) == len(table.rows[0]) for table in section.tables for row in table.rows)
    assert all(len(table.rows) > 1 for table in section.tables)


def test_every_picture_shows_something(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", scaling_results())
    section = report.read_section(tmp_path / "run.json", tmp_path / "pictures")
    names = {picture.path.stem.removeprefix("run_") for picture in section.pictures}
    assert names == {"roofline", "beside_fa3", "cliff", "chunks", "contexts"}
    for picture in section.pictures:
        assert_shows_something(picture.path)
    assert "decode: fa3 / ours 1.25 (least 1.25)" in [table.title for table in section.tables]


def test_points_that_the_host_bounded_are_drawn_open(tmp_path: Path) -> None:
    results = scaling_results()
    one = results.group("contexts")[0]
    timing = one.timing(OURS)
    assert timing is not None
    slow = dataclasses.replace(one.measurements[0], timing=dataclasses.replace(timing, host=timing.median))
    bounded = dataclasses.replace(one, measurements=(slow,))
    reports = [bounded if report is one else report for report in results.reports]
    plots.plot_contexts(results, tmp_path / "filled.png")
    plots.plot_contexts(dataclasses.replace(results, reports=reports), tmp_path / "open.png")
    assert (tmp_path / "filled.png").read_bytes() != (tmp_path / "open.png").read_bytes()


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    """A peer's message is text, whatever stands in it."""
    results = scaling_results()
    results.peers[0].errors["1x4096"] = "<b>does not do</b>"
    write_json(tmp_path / "run.json", results)
    page = tmp_path / "page" / "index.html"
    assert report.main([str(tmp_path / "run.json"), "--html", str(page)]) == 0
    text = page.read_text()
    assert all(name in text for name in ("1x4096", "1x1024of16384", "a device"))
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert "fa3 on 1x4096: &lt;b&gt;does not do&lt;/b&gt;" in text
    assert text.count("<img") == 5


def test_a_replay_is_drawn_again(tmp_path: Path) -> None:
    stored = tmp_path / "serving.json"
    sizes = ("--layers=1", "--hidden=32", "--heads=2", "--kv-heads=1", "--head-dim=16", "--intermediate=32")
    options = ("--requests=3", "--size-scale=0.02", "--vocabulary=64", "--all-at-once", "--no-check")
    picture = f"--output={tmp_path / 'timeline.png'}"
    assert serve([*sizes, *options, picture, f"--json={stored}"]) == 0
    section = report.read_section(stored, tmp_path / "again")
    (drawn,) = section.pictures
    assert_shows_something(drawn.path)
    assert drawn.path.read_bytes() == (tmp_path / "timeline.png").read_bytes()
    assert ["requests", "3 submitted: 3 served, 0 refused"] in section.tables[0].rows


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"facts": {}}))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "other.json")])
    assert "holds no results of a benchmark" in capsys.readouterr().err
