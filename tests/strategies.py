"""Hypothesis strategies: small problems of any shape, features on and off, lengths that love edges."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.cases import FLOATS, LAYOUTS, NATIVE_LAYOUT, PAGED, QUANTISED, Case

EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
"""Lengths one below, at and above common tiles and pages."""

PAGE_SIZES = (1, 3, 8, 16, 16, 20, 32, 64)
HEAD_DIMS = (16, 24, 32, 40, 64, 80, 128)
GROUP_SIZES = (1, 2, 3, 4, 7, 8, 17)


def lengths(largest: int, page_size: int = 16) -> st.SearchStrategy[int]:
    """Lengths up to `largest`, often next to a multiple of a tile or page."""
    near_pages = [count * page_size + offset for count in (1, 2, 3) for offset in (-1, 0, 1)]
    edges = sorted({edge for edge in (*EDGES, *near_pages) if 0 <= edge <= largest})
    return st.one_of(st.sampled_from(edges), st.integers(0, largest))


@st.composite
def cases(draw: st.DrawFn, operation: str) -> Case:
    """A case of `operation`; with `seed`, everything that a call needs."""
    paged = operation in PAGED
    num_kv_heads = draw(st.sampled_from((1, 2, 3)))
    group_size = draw(st.sampled_from(GROUP_SIZES))
    page_size = draw(st.sampled_from(PAGE_SIZES)) if paged else 16
    several_rows = operation in ("unified_attention", "attention")
    case = Case(
        name="fuzz",
        operation=operation,
        num_q_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        value_head_dim=draw(st.sampled_from((None, None, 24, 48))) if several_rows else None,
        page_size=page_size,
        spare_pages=draw(st.integers(0, 4)),
        table_slack=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(FLOATS)),
        softmax_scale=draw(st.sampled_from((None, None, 0.11))),
        soft_cap=draw(st.sampled_from((None, None, 2.5, 30.0, 1e5))),
        query_gain=draw(st.sampled_from((1.0, 1.0, 5.0))),
    )
    if paged:
        case = draw(_paged(case))
    elif operation == "ragged_decode_attention":
        case = draw(_ragged(case))
    else:
        case = draw(_dense(case))
    return case


@st.composite
def _paged(draw: st.DrawFn, case: Case) -> Case:
    largest = min(150, 40 * case.page_size)
    lens = draw(
        st.lists(lengths(largest, case.page_size), min_size=1, max_size=1)
        if case.operation == "prefill_page_attention"
        else st.lists(lengths(largest, case.page_size), max_size=4)
    )
    if case.operation == "page_attention":
        query_lens = [1] * len(lens)
    elif case.operation == "prefill_page_attention":
        query_lens = [draw(st.integers(0, 20))]
    else:
        query_lens = [draw(st.sampled_from((0, 1, 1, 2, 9, 17, length, length + 2))) % 40 for length in lens]
    cache_dtype = draw(st.sampled_from((None, None, None, *QUANTISED)))
    causal = case.operation != "unified_attention" or draw(st.booleans())
    width = draw(st.integers(1, 70))
    return case.replace(
        kv_lens=tuple(lens),
        query_lens=tuple(query_lens),
        page_order=draw(st.sampled_from(("shuffled", "shared", "duplicate"))),
        kv_layout=draw(st.sampled_from((NATIVE_LAYOUT[case.operation], *LAYOUTS))),
        cache_dtype=cache_dtype,
        kv_scale=draw(st.sampled_from(("scalar", "head") if cache_dtype else ("none",))),
        index_dtype=draw(st.sampled_from(("int32", "int32", "int16", "uint32"))),
        window=draw(st.sampled_from((None, None, width, (width, 0), (width, 3)))),
        causal=causal,
        sinks=draw(st.sampled_from((0, 0, 1))),
        alibi=draw(st.sampled_from((False, False, True))),
        qq_bias=draw(st.sampled_from((0, 0, 3, 17))) if case.operation == "unified_attention" else 0,
        num_splits=draw(st.sampled_from((0, 0, 1, 2, 3, 9))) if case.operation == "page_attention" else 0,
        return_lse=draw(st.booleans()),
        leading_rows=draw(st.integers(0, 2)) if case.operation == "unified_attention" else 0,
        trailing_rows=draw(st.integers(0, 3)) if case.operation == "unified_attention" else 0,
    )


@st.composite
def _ragged(draw: st.DrawFn, case: Case) -> Case:
    dense_len = draw(st.integers(1, 140))
    lens = draw(st.lists(lengths(dense_len), max_size=4))
    width = draw(st.integers(1, 70))
    sinks = draw(st.sampled_from((0, 0, 1, 2)))
    return case.replace(
        dense_len=dense_len,
        kv_lens=tuple(lens),
        query_lens=(1,) * len(lens),
        causal=False,
        window=draw(st.sampled_from((None, None, width, (width, 0), (width, 3)))),
        sinks=sinks,
        shared_sinks=sinks > 0 and draw(st.booleans()),
        return_lse=draw(st.booleans()),
        rank_four=draw(st.booleans()),
    )


@st.composite
def _dense(draw: st.DrawFn, case: Case) -> Case:
    width = draw(st.integers(1, 30))
    sinks = draw(st.sampled_from((0, 0, 1, 2)))
    shared = sinks > 0 and sinks != case.num_q_heads and draw(st.booleans())
    bias = st.tuples(st.booleans(), st.booleans(), st.booleans())
    mask = draw(st.sampled_from(("none", "none", "shared", "heads", "segments", "segments", "lengths")))
    smallest = 4 if mask == "segments" else 1
    return case.replace(
        batch=draw(st.integers(0, 2)),
        query_lens=(draw(st.integers(smallest, 40)),),
        kv_lens=(draw(st.integers(smallest, 70)),),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from((None, None, width, (width, 0), (2, width)))),
        sinks=sinks,
        shared_sinks=shared,
        mask=mask,
        bias=draw(st.sampled_from((True, False, False)).flatmap(lambda has: bias if has else st.none())),
        return_weights=draw(st.sampled_from((True, False, False, False))),
    )
