"""Properties of tiles of several tokens: splits, classes of rows, row padding, nonsense starts and lengths.

In 16 bits, since float32 has no prefill tiles, and with tiles so small that a tiny call has many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import judge, tolerances
from tests.cases import Case
from tests.dense_form import Result
from tests.implementations import MARKS, Implementation, implementations_of, small_tiles
from tests.inputs import Call, build

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]

unified_rows = pytest.mark.parametrize("implementation", implementations_of("unified_attention"), ids=str)
prefill_rows = pytest.mark.parametrize("implementation", implementations_of("prefill_page_attention"), ids=str)


def packed(**changes: Any) -> Case:
    """A batch with sequences of few and of many rows; the last one has more tokens than keys."""
    case = Case(
        name="packed",
        operation="unified_attention",
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=16,
        query_lens=(1, 20, 9, 22),
        kv_lens=(50, 40, 9, 18),
        dtype="float16",
        return_lse=True,
    )
    return case.replace(**changes)


def chunk(**changes: Any) -> Case:
    """A chunk of one sequence."""
    return packed(operation="prefill_page_attention", query_lens=(20,), kv_lens=(70,)).replace(**changes)


VARIATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "features": {"window": 13, "sinks": 1, "soft_cap": 4.0},
}
each_variation = pytest.mark.parametrize("variation", VARIATIONS)


@unified_rows
@each_variation
@pytest.mark.parametrize(
    "fields",
    [
        {"seq_threshold_3d": 0},
        {"seq_threshold_3d": 1000},
        *({"num_par_softmax_segments": segments} for segments in (1, 2, 3, 7, 50)),
    ],
    ids=lambda fields: "-".join(f"{name}-{value}" for name, value in fields.items()),
)
def test_segments_agree(implementation: Implementation, variation: str, fields: dict[str, int]) -> None:
    """Undivided keys, any number of segments, and the balance: one result, also for rows without a key."""
    call = build(packed(**VARIATIONS[variation]))
    judge.check(call, implementation(call, cfg=small_tiles("unified_attention", **fields)))


@prefill_rows
@each_variation
@pytest.mark.parametrize("num_splits", [None, 1, 2, 3, 50])
def test_splits_of_a_chunk_agree(implementation: Implementation, variation: str, num_splits: int | None) -> None:
    call = build(chunk(**VARIATIONS[variation]))
    judge.check(call, implementation(call, cfg=small_tiles("prefill_page_attention", num_splits=num_splits)))


@unified_rows
@pytest.mark.parametrize(
    ("group_size", "query_lens"),
    [(1, (15, 16, 17, 33)), (3, (5, 6, 11, 1)), (5, (3, 4, 7, 13)), (7, (2, 3, 5, 1)), (71, (1, 2, 1, 1))],
)
def test_every_sequence_is_of_one_class(
    implementation: Implementation, group_size: int, query_lens: tuple[int, ...]
) -> None:
    """Rows just below, at and above a decode tile, packed by any group size, between padding."""
    kv_lens = tuple(length + extra for length, extra in zip(query_lens, (0, 18, 5, 30), strict=True))
    case = packed(query_lens=query_lens, kv_lens=kv_lens, num_q_heads=group_size, leading_rows=2, trailing_rows=3)
    call = build(case)
    judge.check(call, implementation(call, cfg=small_tiles("unified_attention")))


@unified_rows
def test_permuting_sequences_of_both_classes_permutes_rows(implementation: Implementation) -> None:
    cfg = small_tiles("unified_attention", num_par_softmax_segments=2)
    call = build(packed())
    order = [3, 1, 0, 2]
    starts = np.cumsum([0, *call.case.query_lens])
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    permuted = call.with_arrays(
        queries=call.array("queries")[rows],
        kv_lens=call.array("kv_lens")[order],
        block_tables=call.array("block_tables")[order],
        query_start_loc=np.cumsum([0, *(call.case.query_lens[i] for i in order)]).astype(np.int32),
    )
    before, after = implementation.raw(call, cfg=cfg), implementation.raw(permuted, cfg=cfg)
    parts = tuple(np.asarray(part)[rows] for part in before)
    if implementation.platform == "triton":
        assert judge.same_bits(parts, after)  # forced segments do not depend on the batch
    else:
        expected = implementation(call)
        assert expected.lse is not None
        judge.check_close(call, implementation(permuted), Result(expected.out[rows], expected.lse[rows]))


def _one_row(call: Call) -> Call:
    """The decode call with the last row of a chunk."""
    case = call.case.replace(operation="page_attention", query_lens=(1,))
    arrays = {
        "query": call.array("query")[-1:],
        "key_cache": call.array("key_cache"),
        "value_cache": call.array("value_cache"),
        "context_lens": call.array("context_len"),
        "block_tables": call.array("page_indices")[None],
        "attention_sink": call.arrays["attention_sink"],
    }
    return Call(case, arrays, {name: value for name, value in call.options.items() if name != "softmax_scale"})


@prefill_rows
@pytest.mark.parametrize("decode", implementations_of("page_attention"), ids=str)
@each_variation
def test_last_row_of_a_chunk_is_decoding(
    implementation: Implementation, decode: Implementation, variation: str
) -> None:
    call = build(chunk(**VARIATIONS[variation]))
    page_call, rows = _one_row(call), implementation(call, cfg=small_tiles("prefill_page_attention"))
    assert rows.lse is not None
    judge.check_close(page_call, decode(page_call), Result(rows.out[-1:], rows.lse[-1:]))


BATCH = packed(query_lens=(1, 20, 5), kv_lens=(50, 40, 9), trailing_rows=1, return_lse=False)
STARTS: dict[str, tuple[list[int], slice]] = {
    "end_beyond_rows": ([0, 1, 21, 10**6], slice(0, 21)),
    "end_at_the_last_integer": ([0, 1, 21, 2**31 - 1], slice(0, 21)),
    "begin_negative": ([-7, 1, 21, 26], slice(1, 26)),
    "begin_far_negative": ([-(2**31), 1, 21, 26], slice(1, 26)),
    "last_decreases": ([0, 1, 21, 3], slice(0, 1)),
    "middle_decreases": ([0, 1, 0, 26], slice(1, 1)),
    "all_beyond_rows": ([0, 1, 100, 200], slice(0, 1)),
    "reversed": ([26, 21, 1, 0], slice(0, 0)),
}


@unified_rows
@pytest.mark.parametrize("name", STARTS)
def test_nonsense_starts_leave_the_others(implementation: Implementation, name: str) -> None:
    """Nothing crashes, and sequences whose rows no other claims have their answers."""
    starts, right = STARTS[name]
    call, expected, bounds = judge.problem(BATCH)
    got = implementation(
        call.with_arrays(query_start_loc=np.array(starts, np.int32)), cfg=small_tiles("unified_attention")
    )
    bounds.out.check("out", got.out[right], expected.out[right])


@unified_rows
@pytest.mark.parametrize("length", [-1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("sequence", [0, 1])
def test_nonsense_lengths_leave_the_others(implementation: Implementation, length: int, sequence: int) -> None:
    call, expected, bounds = judge.problem(BATCH)
    lengths = call.array("kv_lens").copy()
    lengths[sequence] = length
    got = implementation(call.with_arrays(kv_lens=lengths), cfg=small_tiles("unified_attention"))
    starts = np.cumsum([0, *BATCH.query_lens])
    others = np.delete(np.arange(starts[-1]), np.arange(starts[sequence], starts[sequence + 1]))
    bounds.out.check("out", got.out[others], expected.out[others])


@prefill_rows
@pytest.mark.parametrize("length", [-1, -(2**31), 2**31 - 1])
def test_nonsense_lengths_of_a_chunk_do_not_crash(implementation: Implementation, length: int) -> None:
    call = build(chunk())
    got = implementation(
        call.with_arrays(context_len=np.array([length], np.int32)), cfg=small_tiles("prefill_page_attention")
    )
    if length < 0:
        tolerances.Bound(0.0, 0.0).check("out", got.out, np.zeros_like(got.out))
