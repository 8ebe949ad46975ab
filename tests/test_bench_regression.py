"""What the comparison with stored ratios says of measured results, of slower ones and of missing ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench import regression
from bench.cases import GROUPS
from bench.regression import BASELINES, compare, read_baseline, read_ratios
from bench.results import CaseReport, Results, read_json, write_json
from tests.cases import MODELS

H100 = "NVIDIA H100 80GB HBM3"
MEASURED = BASELINES / "unified_h100.json"
OTHERS = (BASELINES / "unified_h100_mixed.json", BASELINES / "unified_h100_prompts.json")
SOURCES = [str(path) for path in (MEASURED, *OTHERS)]


def ratios_of(*paths: Path) -> dict[str, dict[str, float]]:
    """Those of H100s, of a case in several files the last ones."""
    found: dict[str, dict[str, float]] = {}
    for path in paths:
        device, ratios = read_ratios(path)
        assert device == H100
        found |= ratios
    return found


def slower(results: Results, name: str, factor: float) -> Results:
    """The results, had our time on one case been longer."""

    def stretch(report: CaseReport) -> CaseReport:
        if report.case.name != name:
            return report
        (measurement,) = report.measurements
        assert measurement.timing is not None
        timing = dataclasses.replace(measurement.timing, median=measurement.timing.median * factor)
        return dataclasses.replace(report, measurements=(dataclasses.replace(measurement, timing=timing),))

    return dataclasses.replace(results, reports=[stretch(report) for report in results.reports])


def test_the_baseline_is_what_was_measured() -> None:
    measured, stored = ratios_of(MEASURED, *OTHERS), read_baseline(H100)
    assert measured.keys() <= stored.keys()
    lines, worse = compare(measured, stored)
    assert not worse
    assert all("of fa3 (" in line and "0.0%)" in line for line in lines if "sinks" not in line)


def test_a_whole_run_measures_all_that_is_stored() -> None:
    """Else it would miss cases and fail, however fast the others are."""
    cases = {f"unified_attention[{name}]" for group in regression.GROUPS for name in GROUPS[group]}
    suites = {f"unified_attention[{model}-" for model in MODELS}
    stored = {name for name in read_baseline(H100) if name.startswith("unified_attention[")}
    assert {name for name in stored if not name.startswith(tuple(suites))} == cases


@pytest.mark.parametrize(("factor", "is_noticed"), [(1.03, False), (1.08, True)])
def test_what_became_slower_is_named(factor: float, is_noticed: bool, tmp_path: Path) -> None:
    path = tmp_path / "now.json"
    write_json(path, slower(read_json(MEASURED), "8x4096", factor))
    _, worse = compare(ratios_of(path, *OTHERS), read_baseline(H100))
    assert [line.partition(":")[0] for line in worse] == (["unified_attention[8x4096]"] if is_noticed else [])
    assert regression.main([str(path), *map(str, OTHERS)]) == int(is_noticed)


def test_a_run_as_fast_as_the_baseline_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(regression, "BASELINES", tmp_path)
    assert regression.main([*SOURCES, "--write"]) == 0
    assert regression.main(SOURCES) == 0
    assert regression.main([str(MEASURED)]) == 1  # half of it was not measured


def test_without_the_peer_the_bound_decides() -> None:
    """A case that waits for memory is held to the copy bandwidth, one that computes to the matrix rate."""
    stored = {"decode": {"fa3": 1.0, "copy": 0.9, "product": 0.01}, "prompt": {"copy": 0.05, "product": 0.6}}
    found = {"decode": {"copy": 0.8, "product": 0.02}, "prompt": {"copy": 0.01, "product": 0.6}}
    lines, worse = compare(found, stored)
    assert [line.split(" of ")[1].split()[0] for line in lines] == ["copy", "product"]
    assert worse == ["decode: 0.900 -> 0.800 of copy (-11.1%)"]


def test_cases_that_were_not_measured_are_named() -> None:
    stored = {"a[1]": {"copy": 0.5}, "a[2]": {"copy": 0.5}, "b[1]": {"copy": 0.5}}
    lines, worse = compare({"a[1]": {"copy": 0.6}, "a[3]": {"copy": 0.1}}, stored)
    assert worse == ["a[2]: not measured"]  # nothing of b was asked for
    assert lines[1] == "a[3]: not in the baseline"
    _, worse = compare({"a[1]": {"copy": 0.6}}, stored, whole=True)
    assert worse == ["a[2]: not measured", "b[1]: not measured"]


def test_a_baseline_is_written_over_the_same_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(regression, "BASELINES", tmp_path)
    assert regression.main([str(MEASURED), "--write"]) == 0
    changed = tmp_path / "changed.json"
    write_json(changed, slower(read_json(MEASURED), "1x4096", 2.0))
    stored = read_baseline(H100)
    assert regression.main([str(changed)]) == 1
    assert regression.main([str(changed), "--write"]) == 0
    assert regression.main([str(changed)]) == 0
    again = read_baseline(H100)
    assert again["unified_attention[1x4096]"]["fa3"] == pytest.approx(
        stored["unified_attention[1x4096]"]["fa3"] / 2, rel=1e-3
    )
    assert again.keys() == stored.keys()
    assert json.loads(regression.baseline_path(H100).read_text())["sources"] == [MEASURED.name, "changed.json"]


def test_what_holds_no_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {"a.json": {"facts": {}}, "b.json": {"benchmarks": []}}.items():
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            regression.main([str(tmp_path / name)])
    assert "holds no results" in capsys.readouterr().err
