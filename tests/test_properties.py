"""What must hold between calls, whatever the numbers: orders, neighbours, splits, layouts, operations, repetition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jax_bridge
from tests import judge, tolerances
from tests.cases import LAYOUTS, PAGED, Case
from tests.dense_form import Result
from tests.implementations import MARKS, Implementation, implementations_of
from tests.inputs import POSITIONAL, Call, build
from tests.poison import Array, poison_like

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]

SMALL: dict[str, dict[str, Any]] = {
    "page_attention": {"query_lens": (1, 1, 1), "kv_lens": (50, 33, 70)},
    "prefill_page_attention": {"query_lens": (9,), "kv_lens": (41,)},
    "unified_attention": {"query_lens": (1, 12, 5), "kv_lens": (33, 40, 21), "trailing_rows": 1},
    "ragged_decode_attention": {"query_lens": (1, 1, 1), "kv_lens": (70, 33, 5), "dense_len": 80, "causal": False},
    "attention": {"query_lens": (9,), "kv_lens": (21,), "batch": 3, "causal": False},
}
TABLES = {
    "page_attention": "block_tables",
    "prefill_page_attention": "page_indices",
    "unified_attention": "block_tables",
}
LENGTHS = {"page_attention": "context_lens", "unified_attention": "kv_lens", "ragged_decode_attention": "sequence_end"}

paged_rows = pytest.mark.parametrize("implementation", implementations_of(*PAGED), ids=str)
page_rows = pytest.mark.parametrize("implementation", implementations_of("page_attention"), ids=str)
each_precision = pytest.mark.parametrize("dtype", ["float32", "float16"])
"""Kernels have prefill tiles in 16 bits only."""
every_row = pytest.mark.parametrize("implementation", implementations_of(), ids=str)


def small(operation: str, **changes: Any) -> Case:
    """A small case with features that an error in an order or an offset would show in."""
    features: dict[str, Any] = {"sinks": 1, "soft_cap": 4.0, "window": 37, "return_lse": operation != "attention"}
    return Case(name="property", operation=operation).replace(**(SMALL[operation] | features | changes))


@every_row
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twice_the_same_bits(implementation: Implementation, dtype: str) -> None:
    call = build(small(implementation.operation, dtype=dtype))
    assert judge.same_bits(implementation.raw(call), implementation.raw(call))


@paged_rows
@each_precision
def test_permuting_pages_changes_no_bits(implementation: Implementation, dtype: str) -> None:
    call = build(small(implementation.operation, page_order="shared", dtype=dtype))
    table_name, page_axis = TABLES[implementation.operation], call.case.layout.index("P")
    table, num_pages = call.array(table_name), call.array("key_cache").shape[page_axis]
    order = np.random.default_rng(1).permutation(num_pages)
    moved_to = np.argsort(order).astype(table.dtype)
    valid = (table >= 0) & (table < num_pages)
    permuted = call.with_arrays(
        key_cache=np.take(call.array("key_cache"), order, page_axis),
        value_cache=np.take(call.array("value_cache"), order, page_axis),
        **{table_name: np.where(valid, moved_to[np.where(valid, table, 0)], table)},
    )
    assert judge.same_bits(implementation.raw(call), implementation.raw(permuted))


@pytest.mark.parametrize("implementation", implementations_of("page_attention", "ragged_decode_attention"), ids=str)
def test_permuting_sequences_permutes_rows(implementation: Implementation) -> None:
    call = build(small(implementation.operation))
    order = np.array([2, 0, 1])
    names = (
        ("query", "context_lens", "block_tables")
        if implementation.operation == "page_attention"
        else ("query", "key", "value", "sequence_start", "sequence_end")
    )
    permuted = call.with_arrays(**{name: call.array(name)[order] for name in names})
    rows, permuted_rows = implementation.raw(call), implementation.raw(permuted)
    assert judge.same_bits(tuple(np.asarray(part)[order] for part in rows), permuted_rows)


@pytest.mark.parametrize("implementation", implementations_of("unified_attention"), ids=str)
def test_permuting_packed_sequences_permutes_rows(implementation: Implementation) -> None:
    call = build(small("unified_attention"))
    order = [2, 0, 1]
    starts = np.cumsum([0, *call.case.query_lens])
    rows = np.concatenate(
        [np.arange(starts[i], starts[i + 1]) for i in order] + [np.arange(starts[-1], starts[-1] + 1)]
    )
    permuted = call.with_arrays(
        queries=call.array("queries")[rows],
        kv_lens=call.array("kv_lens")[order],
        block_tables=call.array("block_tables")[order],
        query_start_loc=np.cumsum([0, *(call.case.query_lens[i] for i in order)]).astype(np.int32),
    )
    expected, got = implementation(call), implementation(permuted)
    assert expected.lse is not None
    judge.check_close(call, got, Result(expected.out[rows], expected.lse[rows]))


@page_rows
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 50])
def test_forced_splits_agree(implementation: Implementation, num_splits: int) -> None:
    """Among them more splits than tiles, rows shorter than the split count, and rows without keys."""
    case = small("page_attention", kv_lens=(0, 65, 150), window=None, num_splits=num_splits)
    for varied in (case, case.replace(window=70, negative_logits=True, sinks=0, soft_cap=None)):
        call = build(varied)
        judge.check(call, implementation(call))


@paged_rows
def test_layouts_agree(implementation: Implementation) -> None:
    native = build(small(implementation.operation))
    expected = implementation.raw(native)
    for layout in LAYOUTS:
        call = build(small(implementation.operation, kv_layout=layout))
        assert judge.same_bits(implementation.raw(call), expected), layout


@paged_rows
def test_windows_are_counted_alike(implementation: Implementation) -> None:
    """W tokens with the row's own are W - 1 to the left."""
    call = build(small(implementation.operation, window=17))
    expected = implementation(call)
    judge.check_close(call, implementation(call.with_options(sliding_window=(16, 0))), expected)
    judge.check(call, expected)


@pytest.mark.parametrize("implementation", implementations_of("ragged_decode_attention"), ids=str)
def test_ragged_windows_are_counted_alike(implementation: Implementation) -> None:
    call = build(small("ragged_decode_attention", window=17))
    expected = implementation(call)
    judge.check_close(call, implementation(call.with_options(sliding_window=(16, 0))), expected)


@pytest.mark.parametrize("implementation", implementations_of("prefill_page_attention"), ids=str)
@pytest.mark.parametrize("window", [None, 11])
def test_chunks_equal_one_shot(implementation: Implementation, window: int | None) -> None:
    whole = build(small("prefill_page_attention", query_lens=(45,), kv_lens=(45,), window=window))
    out, lse = [], []
    for first, last in ((0, 15), (15, 30), (30, 45)):
        case = whole.case.replace(query_lens=(last - first,), kv_lens=(last,))
        chunk = Call(case, whole.arrays, whole.options).with_arrays(
            query=whole.array("query")[first:last], context_len=np.array([last], np.int32)
        )
        rows = implementation(chunk)
        out.append(rows.out)
        lse.append(rows.lse)
    judge.check(whole, Result(np.concatenate(out), np.concatenate([part for part in lse if part is not None])))


def _as_page_call(unified: Call, rows: Array) -> Call:
    """The rows of a unified call that are the last of their sequence, as a decode call."""
    case = unified.case.replace(
        operation="page_attention", query_lens=(1,) * len(rows), leading_rows=0, trailing_rows=0, kv_layout="PTHD"
    )
    arrays = {
        "query": unified.array("queries")[rows],
        "key_cache": unified.array("key_cache"),
        "value_cache": unified.array("value_cache"),
        "context_lens": unified.array("kv_lens"),
        "block_tables": unified.array("block_tables"),
        "attention_sink": unified.array("attention_sink"),
        "alibi_slopes": unified.arrays["alibi_slopes"],
    }
    options = {
        "attn_logits_soft_cap": case.soft_cap,
        "sliding_window": case.window,
        "kv_layout": "PTHD",
        "return_lse": True,
    }
    return Call(case, arrays, options)


@pytest.mark.parametrize("decode", implementations_of("page_attention"), ids=str)
@pytest.mark.parametrize("unified", implementations_of("unified_attention"), ids=str)
def test_decode_is_the_last_row_of_unified(decode: Implementation, unified: Implementation) -> None:
    call = build(small("unified_attention", alibi=True))
    last = np.cumsum(call.case.query_lens) - 1
    rows = unified(call)
    assert rows.lse is not None
    page_call = _as_page_call(call, last)
    judge.check_close(page_call, decode(page_call), Result(rows.out[last], rows.lse[last]))


@pytest.mark.parametrize("prefill", implementations_of("prefill_page_attention"), ids=str)
@pytest.mark.parametrize("unified", implementations_of("unified_attention"), ids=str)
def test_prefill_is_unified_of_one_sequence(prefill: Implementation, unified: Implementation) -> None:
    call = build(small("prefill_page_attention", alibi=True, kv_layout="PTHD"))
    case = call.case.replace(operation="unified_attention")
    options = {
        "logits_soft_cap": case.soft_cap,
        "sliding_window": case.window,
        "kv_layout": "PTHD",
        "return_lse": True,
    }
    arrays = {
        "queries": call.array("query"),
        "key_cache": call.array("key_cache"),
        "value_cache": call.array("value_cache"),
        "kv_lens": call.array("context_len"),
        "block_tables": call.array("page_indices")[None],
        "query_start_loc": np.array([0, case.query_lens[0]], np.int32),
        "attention_sink": call.array("attention_sink"),
        "alibi_slopes": call.array("alibi_slopes"),
    }
    judge.check_close(call, prefill(call), unified(Call(case, arrays, options)))


@pytest.mark.parametrize("decode", implementations_of("page_attention"), ids=str)
@pytest.mark.parametrize("ragged", implementations_of("ragged_decode_attention"), ids=str)
def test_decode_is_ragged_over_gathered_pages(decode: Implementation, ragged: Implementation) -> None:
    """A window of W here is (W - 1, 0) there."""
    call = build(small("page_attention", kv_layout="PTHD", window=29, sinks=0), poisoned=False)
    table, size = call.array("block_tables"), call.case.page_size
    shape = (len(table), table.shape[1] * size, call.case.num_kv_heads, call.case.head_dim)
    lens = call.array("context_lens")
    case = call.case.replace(operation="ragged_decode_attention", dense_len=shape[1], window=(28, 0), causal=False)
    dense = Call(
        case,
        {
            "query": call.array("query"),
            "key": call.array("key_cache")[table].reshape(shape),
            "value": call.array("value_cache")[table].reshape(shape),
            "sequence_start": np.zeros_like(lens),
            "sequence_end": lens,
            "softmax_aux": None,
        },
        {"logits_soft_cap": case.soft_cap, "sliding_window": case.window, "return_lse": True},
    )
    judge.check_close(call, ragged(dense), decode(call))


@page_rows
def test_merged_halves_equal_the_whole(implementation: Implementation) -> None:
    """The sinks count in one half."""
    whole = build(small("page_attention", window=None, kv_lens=(70, 16, 90)))
    size = whole.case.page_size
    half_pages = 2
    lens, table = whole.array("context_lens"), whole.array("block_tables")
    first = whole.with_arrays(context_lens=np.minimum(lens, half_pages * size))
    second = whole.with_arrays(
        context_lens=np.maximum(lens - half_pages * size, 0),
        block_tables=np.ascontiguousarray(table[:, half_pages:]),
        attention_sink=None,
    )
    merged = jax_bridge.merge_attention_states(*implementation.raw(first), *implementation.raw(second))
    out, lse = (np.asarray(part).astype(np.float64) for part in merged)
    judge.check_close(whole, Result(out, lse), judge.truth(whole))


def _poison_second(call: Call) -> Call:
    """NaN wherever only the second sequence or batch row looks, its query included."""
    operation = call.operation
    if operation not in PAGED:
        names = POSITIONAL[operation][:3]
        arrays = {name: call.array(name).copy() for name in names}
        for array in arrays.values():
            array[1] = np.nan
        return call.with_arrays(**arrays)
    pages, page_axis = _pages_of_second(call), call.case.layout.index("P")
    arrays = {}
    for name in ("key_cache", "value_cache"):
        pages_first = np.moveaxis(call.array(name).copy(), page_axis, 0)
        pages_first[pages] = poison_like(pages_first[pages].shape, pages_first.dtype)
        arrays[name] = np.ascontiguousarray(np.moveaxis(pages_first, 0, page_axis))
    query = POSITIONAL[operation][0]
    arrays[query] = call.array(query).copy()
    starts = np.cumsum([0, *call.case.query_lens])
    arrays[query][starts[1] : starts[2]] = np.nan
    return call.with_arrays(**arrays)


def _pages_of_second(call: Call) -> Array:
    table = call.array("block_tables")
    pages = [row[: -(-length // call.case.page_size)] for row, length in zip(table, call.case.kv_lens, strict=True)]
    others = np.concatenate([pages[0], pages[2]])
    return np.array([page for page in pages[1] if page not in others and 0 <= page < call.array("key_cache").size])


@pytest.mark.parametrize(
    "implementation", [row for row in implementations_of() if row.operation != "prefill_page_attention"], ids=str
)
@pytest.mark.parametrize("page_order", ["shuffled", "shared"])
@each_precision
def test_neighbours_change_no_bits(implementation: Implementation, page_order: str, dtype: str) -> None:
    call = build(small(implementation.operation, page_order=page_order, window=None, dtype=dtype))
    poisoned = _poison_second(call)
    rows = call.case.query_lens if implementation.operation in PAGED else (1,) * 3
    keep = np.ones(np.shape(call.array(POSITIONAL[implementation.operation][0]))[0], bool)
    starts = np.cumsum([0, *rows])
    keep[starts[1] : starts[2]] = False
    before, after = implementation.raw(call), implementation.raw(poisoned)
    parts = list(zip(*(part if isinstance(part, tuple) else (part,) for part in (before, after)), strict=True))
    assert all(judge.same_bits(np.asarray(mine)[keep], np.asarray(theirs)[keep]) for mine, theirs in parts)
    assert np.isnan(np.asarray(parts[0][1]).astype(np.float64)[~keep]).any()


@pytest.mark.parametrize(
    "implementation",
    implementations_of("page_attention", "unified_attention", "ragged_decode_attention"),
    ids=str,
)
def test_nonsense_in_one_sequence_leaves_the_others(implementation: Implementation) -> None:
    """Lengths beyond the table and pages beyond the pool where they are used: nothing crashes, nobody else notices."""
    operation = implementation.operation
    call = build(small(operation, window=None, num_splits=2 if operation == "page_attention" else 0))
    lengths = call.array(LENGTHS[operation]).copy()
    lengths[1] = 10**6
    wrong = [call.with_arrays(**{LENGTHS[operation]: lengths})]
    if operation in PAGED:
        for page in (-5, 10**6, 2**31 - 1, -(2**31)):
            table = call.array("block_tables").copy()
            table[1, 0] = page
            wrong.append(call.with_arrays(block_tables=table))
    else:
        start = call.array("sequence_start").copy()
        start[1] = -(10**6)
        wrong.append(call.with_arrays(sequence_start=start))
    starts = np.cumsum([0, *call.case.query_lens])
    keep = [row for row in range(int(starts[-1])) if not starts[1] <= row < starts[2]]
    expected = judge.truth(call)
    bounds = tolerances.calibrate(call, expected)
    for nonsense in wrong:
        bounds.out.check("out", implementation(nonsense).out[keep], expected.out[keep])


@every_row
@pytest.mark.parametrize("head_dim", [32, 72])
def test_default_scale_is_the_exact_one(implementation: Implementation, head_dim: int) -> None:
    call = build(small(implementation.operation, head_dim=head_dim, dtype="bfloat16"))
    name = "attn_scale" if implementation.operation == "page_attention" else "softmax_scale"
    explicit = call.with_options(**{name: head_dim**-0.5})
    assert judge.same_bits(implementation.raw(call), implementation.raw(explicit))


@paged_rows
def test_scale_of_one_head_stays_there(implementation: Implementation) -> None:
    """NaN in the scales of the second KV head leaves the query heads of the first alone."""
    call = build(small(implementation.operation, kv_scale="head", cache_dtype="int8", sinks=0))
    spoiled = call.with_arrays(
        **{name: np.array([call.array(name)[0], np.nan], np.float32) for name in ("k_scale", "v_scale")}
    )
    before, after = implementation(call), implementation(spoiled)
    group_size = call.case.group_size
    assert np.array_equal(before.out[:, :group_size], after.out[:, :group_size])
    assert np.isnan(after.out[:, group_size:]).any()


@page_rows
@pytest.mark.parametrize("bound", [70, 71, 1000])
def test_a_bound_on_the_length_changes_nothing(implementation: Implementation, bound: int) -> None:
    call = build(small("page_attention", max_context_len=bound))
    judge.check(call, implementation(call))


EMPTY: dict[str, list[dict[str, Any]]] = {
    "page_attention": [
        {"query_lens": (), "kv_lens": ()},
        {"query_lens": (1, 1), "kv_lens": (0, 0), "table_slack": 0},
        {"query_lens": (1, 1), "kv_lens": (0, 0), "num_splits": 4},
    ],
    "prefill_page_attention": [
        {"query_lens": (0,), "kv_lens": (20,)},
        {"query_lens": (3,), "kv_lens": (0,), "table_slack": 0},
    ],
    "unified_attention": [
        {"query_lens": (), "kv_lens": (), "trailing_rows": 0},
        {"query_lens": (), "kv_lens": (), "trailing_rows": 3},
        {"query_lens": (0, 0), "kv_lens": (5, 0), "trailing_rows": 0},
        {"query_lens": (2, 1), "kv_lens": (0, 0), "table_slack": 0},
    ],
    "ragged_decode_attention": [
        {"query_lens": (), "kv_lens": ()},
        {"query_lens": (), "kv_lens": (), "rank_four": True},
        {"query_lens": (1, 1), "kv_lens": (0, 0), "dense_len": 0},
    ],
    "attention": [
        {"batch": 0},
        {"query_lens": (0,)},
        {"kv_lens": (0,)},
    ],
}


@pytest.mark.parametrize(
    ("implementation", "sizes"),
    [
        pytest.param(row, sizes, id=f"{row.name}-{position}")
        for row in implementations_of()
        for position, sizes in enumerate(EMPTY[row.operation])
    ],
)
@pytest.mark.parametrize("sinks", [0, 1])
def test_nothing_gives_nothing(implementation: Implementation, sizes: dict[str, Any], sinks: int) -> None:
    call = build(small(implementation.operation, **(sizes | {"sinks": sinks})))
    got = implementation(call)
    assert not got.out.any()
    judge.check(call, got)
