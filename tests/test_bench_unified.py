"""The unified benchmark's own arithmetic: cases, work counts, checks, configurations, and stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
import reference
from bench import operations
from bench.cases import (
    DEFAULT_GROUPS,
    GROUPS,
    NAMES,
    AttentionCase,
    Geometry,
    argument_sets,
    by_geometry,
    num_pool_pages,
    parse_case,
)
from bench.check import ROW_TOLERANCE, Check, build_check, checked_rows
from bench.comparison import peer_columns
from bench.operations import OPERATIONS, parse_configs, parse_sweep
from bench.peers import PeerReport, PeerResult
from bench.results import OURS, CaseReport, Measurement, Results, read_json, relative_cost, write_json
from bench.runner import Outcome, Pool
from bench.timing import Program, Timing, compile_calls
from bench.unified import main, parse_arguments

BASELINES = Path(__file__).parents[1] / "bench" / "baselines"
SIZES = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 4}
OPTIONS = ("--num-q-heads=4", "--num-kv-heads=2", "--head-dim=16", "--page-size=4", "--platform=xla", "--pool-gb=2e-4")
QUICK = ("--max-calls=2", "--jobs=1")


def freeze_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call take 10 us: what a busy machine measures in so short a time may be anything."""

    def measure(program: Program, **sampling: Any) -> Timing:
        del sampling
        program.run(1)
        return Timing.of([1e-5] * 3)

    for module in ("runner", "jax_peers"):
        monkeypatch.setattr(f"bench.{module}.measure_program", measure)
    monkeypatch.setattr("bench.comparison.copy_bandwidth", lambda num_bytes, **sampling: {"memcpy": 1e12})
    monkeypatch.setattr("bench.comparison.matrix_rate", lambda size, **sampling: 1e14)


def every_case() -> dict[str, AttentionCase]:
    return {name: parse_case(name) for names in GROUPS.values() for name in names}


def test_names_say_what_a_case_is() -> None:
    case = parse_case("2x7+3x4of9-d80-kv1-page64-window5-cap30-sinks", num_q_heads=4, page_size=16)
    assert case.lengths == (7, 7, 9, 9, 9)
    assert case.query_lens == (1, 1, 4, 4, 4)
    assert (case.num_q_heads, case.geometry) == (4, Geometry(1, 80, 64))
    assert (case.window, case.soft_cap, case.sinks) == (5, 30.0, True)
    assert case.base == "2x7+3x4of9"
    np.testing.assert_array_equal(case.query_start_loc, [0, 1, 2, 6, 10, 14])
    assert AttentionCase.from_json(json.loads(json.dumps(case.to_json()))) == case


@pytest.mark.parametrize("name", ["2x5of4", "2x0of4", "1x4+", "1x4-d", "1x4-page0", "1x4-heads2", "1x4-sinks3", ""])
def test_impossible_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="case"):
        parse_case(name)


def test_groups_hold_what_they_promise() -> None:
    cases = every_case()
    assert all(len(set(names)) == len(names) for names in GROUPS.values())
    assert cases["trace128"].num_seqs == 128
    assert 128 <= min(cases["drawn64"].lengths) < max(cases["drawn64"].lengths) <= 16_384
    assert cases["1x131072+63x512"].lengths == (131_072, *(512,) * 63)
    assert cases["31x2048+1x2048of2048"].query_lens == (*(1,) * 31, 2048)
    assert {cases[name].num_tokens for name in GROUPS["chunks"] if name.startswith("16x")} == {
        16 * 2**i for i in range(10)
    }
    assert all(cases[name].is_decode for group in ("decode", "ragged", "cliff") for name in GROUPS[group])


def test_default_pool_holds_every_case_and_has_one_size() -> None:
    groups = by_geometry(every_case().values())
    sizes = {num_pool_pages(cases, 24e9) * geometry.page_bytes for geometry, cases in groups.items()}
    assert len(groups) > 9
    assert len(sizes) == 1
    assert 23.9e9 < sizes.pop() <= 24e9


def test_rotation_defeats_the_cache_without_taking_the_memory() -> None:
    for case in every_case().values():
        calls, chunks = case.rotation(64)
        io_bytes = 4 * case.num_tokens * case.num_q_heads * case.head_dim
        assert calls * chunks * (case.kv_bytes + io_bytes) > 5e8, case.name
        assert calls * chunks * io_bytes < 1.5e9, case.name


@pytest.mark.parametrize("name", ["3x5", "2x3of9", "1x9of9", "1x6of9-window4", "2x3of9-window1", "1x4of9-window30"])
def test_work_is_what_the_mask_leaves(name: str) -> None:
    case = parse_case(name, **SIZES)
    visible_pairs = visible_keys = 0
    for rows, keys in zip(case.query_lens, case.lengths, strict=True):
        row, key = np.arange(keys - rows, keys)[:, None], np.arange(keys)
        mask = (key <= row) & (key > row - (case.window or keys))
        visible_pairs += int(mask.sum())
        visible_keys += int(mask.any(axis=0).sum())
    assert case.flops == 4 * 16 * 4 * visible_pairs
    assert case.kv_bytes == visible_keys * 2 * 2 * 16 * 2


def test_table_entries_past_the_end_take_no_pages() -> None:
    case = parse_case("1x33+2x5", **SIZES)
    pages = num_pool_pages([case], 13 * case.geometry.page_bytes)
    tables = argument_sets(case, pages, 1)[0].block_tables
    assert tables.shape == (3, 9)
    assert not tables[1:, 2:].any()
    assert len({*tables[0], *tables[1:, :2].flat}) == 13


def test_first_and_last_rows_are_checked() -> None:
    few = parse_case("5x1+3x40of50", **SIZES)
    rows = checked_rows(few)
    assert {*few.query_start_loc[:-1], *(few.query_start_loc[1:] - 1)} <= {*rows}
    many = checked_rows(parse_case("100x1+4x512of600"))
    assert len(many) == len({*many}) == 64
    assert {0, 100 + 4 * 512 - 1} <= {*many}
    assert np.sum(many >= 100) > 40


def checked(name: str) -> tuple[AttentionCase, Check, Any]:
    """A case, its check, and a function that answers it with other options than it asks for."""
    case = parse_case(name, **SIZES)
    pages = num_pool_pages([case], 1e5)
    pool = Pool.build(case.geometry, pages, "PHTD")
    arguments = argument_sets(case, pages, 1)[0]
    check = build_check(case, pool.caches, "PHTD", arguments)

    def attend(**changes: Any) -> jax.Array:
        options = {
            "sliding_window": case.window,
            "logits_soft_cap": case.soft_cap,
            "attention_sink": case.sink_logits,
            "kv_lens": jnp.array(case.lengths),
            **changes,
        }
        kv_lens = options.pop("kv_lens")
        query = jnp.asarray(arguments.query, jnp.bfloat16)
        tables = jnp.asarray(arguments.block_tables)
        starts = jnp.asarray(case.query_start_loc)
        return reference.unified_attention(query, *pool.caches, kv_lens, tables, starts, kv_layout="PHTD", **options)

    return case, check, attend


def test_check_accepts_what_is_right_and_nothing_else() -> None:
    case, check, attend = checked("2x37+1x20of21+1x3of40-window9-cap2-sinks")
    right = attend()
    assert check.error(right) < ROW_TOLERANCE
    wrong: dict[str, Any] = {
        "sliding_window": 10,
        "logits_soft_cap": None,
        "attention_sink": None,
        "kv_lens": jnp.array(case.lengths) - 1,
    }
    for name, value in wrong.items():
        assert check.error(attend(**{name: value})) > ROW_TOLERANCE, name
    assert np.isnan(check.error(right.at[7, 1, 3].set(jnp.nan)))


def test_wrong_row_that_is_not_checked_shows_beside_a_peer() -> None:
    case, check, attend = checked("1x100of100")
    right = attend()
    unchecked = min({*range(100)} - {*check.rows})
    outcome = Outcome([], check, right)
    for output, is_wrong in ((right, False), (right.at[unchecked].multiply(1.1), True)):
        bits = np.asarray(jax.lax.bitcast_convert_type(output, jnp.int16))
        peer = PeerReport("peer", {}, {case.name: PeerResult(1.0, 1.0, 1.0, bits)}, {})
        [(_, _, error)] = peer_columns(case, [peer], outcome)
        assert check.error(output) < ROW_TOLERANCE
        assert (error > 2 * ROW_TOLERANCE) == is_wrong


def test_unwritten_outputs_start_as_nan() -> None:
    program = compile_calls(jnp.sin, [(jnp.zeros(2),)]).bind([(jnp.zeros(2),)])
    assert np.isnan(program.outputs[0]).all()
    np.testing.assert_array_equal(program.run(0)[0], [0, 0])


def test_configurations_are_parsed() -> None:
    assert parse_configs("default;prefill_block_m=128,num_stages=3 ; bulk_loop=true") == [
        {},
        {"prefill_block_m": 128, "num_stages": 3},
        {"bulk_loop": True},
    ]
    assert parse_sweep("a=1,2;b=false") == [{}, {"a": 1, "b": False}, {"a": 2, "b": False}]
    with pytest.raises(SystemExit):
        parse_arguments(["--configs", "num_stages=many"])


def test_groups_and_cases_are_selected(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(parse_arguments([])[1].groups) == list(DEFAULT_GROUPS)
    _, plan = parse_arguments(["--groups", "decode,cliff"])
    assert len(plan.groups["cliff"]) == 17
    assert len(plan.cases) == len({*NAMES, *GROUPS["cliff"]})
    _, plan = parse_arguments(["--cases", "2x3of5,1x4"])
    assert [case.name for case in plan.groups["cases"]] == ["2x3of5", "1x4"]
    for wrong in (["--groups", "huge"], ["--cases", "x"], ["--cases", "2x3", "--operation=prefill_page_attention"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
    assert "takes one sequence, unlike case 2x3" in capsys.readouterr().err


def test_wrong_result_voids_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    freeze_times(monkeypatch)

    def call(*arrays: Any, cfg: Any, **options: Any) -> Any:
        output = OPERATIONS["unified_attention"].call(*arrays, cfg=cfg, **options)
        return output.at[-1].multiply(1.1) if cfg else output

    planted = operations.Operation("planted", jax_bridge.UnifiedAttentionConfig, call, "anything", lambda case: True)
    monkeypatch.setitem(OPERATIONS, "planted", planted)
    path = tmp_path / "results.json"
    arguments = ["--operation=planted", "--cases=2x6+1x3of9", f"--json={path}", "--configs", "num_warps=4;default"]
    assert main([*arguments, *OPTIONS, *QUICK]) == 0
    [report] = read_json(path).reports
    assert [measurement.config for _, measurement in report.timed] == ["default"]
    assert "wrong: row error" in str(report.measurements[0].failure)


def test_every_operation_runs_and_the_time_limit_ends_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    freeze_times(monkeypatch)
    assert main(["--operation=prefill_page_attention", "--cases=1x5of9-window3", *OPTIONS, *QUICK]) == 0
    assert main(["--operation=page_attention", "--cases=2x9-cap3-sinks,2x9", *OPTIONS, *QUICK]) == 0
    assert "2x9-cap3-sinks: time per KV byte over that of 2x9: ours" in capsys.readouterr().out
    assert main(["--cases=2x9", "--time-limit=-1", *OPTIONS, *QUICK]) == 1
    assert "2x9 [default]: time limit" in capsys.readouterr().out


def results_of(seconds: dict[str, float], groups: dict[str, tuple[str, ...]]) -> Results:
    reports = [
        CaseReport(
            parse_case(name),
            (Measurement("default", Timing.of([median] * 3), 1e-3), Measurement("broken", None, failure="no")),
            {"fa3": Timing.of([1.25 * median] * 3)},
            {"fa3": 2e-3},
        )
        for name, median in seconds.items()
    ]
    return Results(reports, {"memcpy": 3e12}, {"device": "a device"}, [PeerReport("fa3", {"a": "b"}, {}, {})], groups)


def test_variants_are_compared_by_the_work_that_bounds_them() -> None:
    seconds = {"4x64": 1e-5, "4x64-d64": 1e-5, "1x64of64": 1e-5, "1x64of64-kv1": 1e-5, "1x64of64-d256": 1e-5}
    reports = {report.case.name: report for report in results_of(seconds, {}).reports}
    costs = [relative_cost(reports[name], reports[name.split("-")[0]], OURS) for name in seconds]
    assert costs == [1, 2, 1, 1, 0.5]


def test_results_survive_storing(tmp_path: Path) -> None:
    results = results_of({"2x7": 2e-5, "1x3of9-cap30": 1e-5}, {"cases": ("2x7", "1x3of9-cap30")})
    write_json(tmp_path / "results.json", results)
    again = read_json(tmp_path / "results.json")
    assert again.reports == results.reports
    assert again.group("cases") == results.reports
    assert (again.copy_rates, again.facts, again.peers) == (results.copy_rates, results.facts, results.peers)
    with pytest.raises(ValueError, match="no case of the group 'cliff'"):
        again.group("cliff")


@pytest.mark.parametrize("path", sorted(BASELINES.glob("decode_*.json")), ids=lambda path: path.stem)
def test_baselines_are_readable(path: Path) -> None:
    results = read_json(path)
    assert results.copy_bandwidth > 2e12
    for report in results.reports:
        assert report.case == parse_case(report.case.name)
        assert report.timed
