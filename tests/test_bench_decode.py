"""The decode benchmark's own arithmetic: inputs that two processes rebuild alike, timing programs, the report."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.cases import NAMES, AttentionCase, argument_sets, num_pool_pages, parse_case, scramble
from bench.peers import PeerReport
from bench.results import CaseReport, Measurement, Results, print_report
from bench.timing import Timing, compile_program


def test_cache_contents_are_the_same_in_int64_and_uint32() -> None:
    pages = np.array([0, 1, 70_000, 366_210])
    within = np.array([0, 1, 127, 16_383])
    wide = scramble(pages[:, None], within, 2)
    narrow = scramble(jnp.asarray(pages, jnp.uint32)[:, None], jnp.asarray(within, jnp.uint32), 2, jnp.uint32)
    np.testing.assert_array_equal(wide, np.asarray(narrow))
    assert wide.min() >= 0
    assert wide.max() <= 255
    assert len(np.unique(wide)) > 10


def test_issue_cases_have_their_bytes_and_lengths() -> None:
    cases = {name: parse_case(name) for name in NAMES}
    assert cases["64x4096"].kv_bytes == 64 * 4096 * 4096
    assert cases["ragged64"].lengths[1] == 128 + 7919
    assert all(
        calls * chunks * cases[name].kv_bytes > 5e8 for name in NAMES for calls, chunks in [cases[name].rotation(64)]
    )


@pytest.mark.parametrize("name", ["4096", "ragged", "0x4", "4x0", "x4"])
def test_unknown_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="case"):
        parse_case(name)


def test_small_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 256 pages"):
        num_pool_pages([parse_case("1x4096")], 1e6)


def test_argument_sets_are_repeatable_and_do_not_share_pages() -> None:
    case = parse_case("3x50", num_q_heads=2, num_kv_heads=1, head_dim=16)
    first, second = argument_sets(case, 40, 2)
    again = argument_sets(case, 40, 3)[1]
    np.testing.assert_array_equal(second.block_tables, again.block_tables)
    np.testing.assert_array_equal(second.query, again.query)
    assert len({*first.block_tables.flat, *second.block_tables.flat}) == 2 * 3 * 4
    assert not np.array_equal(first.query, second.query)
    np.testing.assert_array_equal(first.query, np.asarray(jnp.asarray(first.query, jnp.bfloat16), np.float32))


def test_program_rotates_among_groups_of_arguments() -> None:
    sets = [(jnp.full((2,), index, jnp.float32),) for index in range(6)]
    program = compile_program(lambda offset, x: x + offset, sets, shared=(jnp.float32(10),), calls_per_program=2)
    values = [[float(output[0]) for output in program.run(index)] for index in range(4)]
    assert values == [[10, 11], [12, 13], [14, 15], [10, 11]]
    with pytest.raises(ValueError, match="6 argument sets"):
        compile_program(jnp.sin, sets, calls_per_program=4)


def test_chained_calls_take_the_answer_of_the_call_before() -> None:
    sets = [(jnp.float32(0), jnp.float32(1)), (jnp.float32(10), jnp.float32(1))]
    unchained, chained = (compile_program(jnp.add, sets, chained=chained).run(0) for chained in (False, True))
    assert unchained == (1, 11)
    assert chained == (1, 2)


def test_options_of_the_compiler_reach_it() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compile_program(jnp.sin, [(jnp.zeros(2),)], compiler_options={"no_such_option": "1"})


def test_every_call_of_a_program_is_executed() -> None:
    calls = []

    def record(x: np.ndarray) -> np.ndarray:
        calls.append(float(x))
        return x

    sets = [(jnp.float32(index),) for index in range(3)]
    program = compile_program(lambda x: jax.pure_callback(record, x, x), sets)
    jax.block_until_ready(program.run(0))
    assert sorted(calls) == [0, 1, 2]


def test_report_ranks_right_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    case = AttentionCase("1x100", (100,))
    fast, slow = Timing.of([1e-6] * 3), Timing.of([2e-6] * 3)
    measurements = (
        Measurement("wrong", fast, 0.5, "wrong: row error"),
        Measurement("right", slow, 1e-3),
        Measurement("broken", None, failure="out of resources"),
    )
    report = CaseReport(case, measurements, {"fa3": Timing.of([3e-6] * 3)}, {"fa3": 1e-3})
    print_report(Results([report], {"memcpy": 3e12}, {"device": "test"}, [PeerReport("fa3", {}, {}, {})]))
    printed = capsys.readouterr().out
    assert "geometric mean 1.500, least 1.500" in printed
    assert "1x100 [broken]: out of resources" in printed
    assert [m.config for _, m in report.timed] == ["right"]
