"""The shared-prefix recipe equals one flat call over tables that repeat the shared pages."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bench import shared_prefix
from tests import judge
from tests.cases import Case
from tests.dense_form import Result
from tests.implementations import CACHE_PLATFORMS, MARKS, Implementation, arguments, implementations_of
from tests.inputs import Call, build

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]

PAGE_SIZE = 8


def shared_call(prefix_pages: int, **fields: Any) -> Call:
    """A flat call in which all sequences begin with the first pages of the first one."""
    sizes = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 40, "page_size": PAGE_SIZE, "return_lse": True}
    call = build(Case(name="shared", operation="unified_attention", **{**sizes, **fields}))
    tables = call.array("block_tables").copy()
    tables[:, :prefix_pages] = tables[0, :prefix_pages]
    return call.with_arrays(block_tables=tables)


def recipe(platform: str, call: Call, prefix_pages: int, prefix_splits: int | None) -> Result:
    """The recipe's answer, cut out of the arguments of the flat call."""
    (queries, key_cache, value_cache, lens, tables, starts), keywords = arguments(call)
    keywords = {name: value for name, value in keywords.items() if name not in ("causal", "return_lse")}
    prefix_len = prefix_pages * PAGE_SIZE
    out, lse = shared_prefix.attend_shared_prefix(
        queries,
        key_cache,
        value_cache,
        jnp.array([prefix_len]),
        tables[:1, :prefix_pages],
        lens - prefix_len,
        tables[:, prefix_pages:],
        starts,
        prefix_splits=prefix_splits,
        platform=platform,
        **keywords,
    )
    return Result(np.asarray(out).astype(np.float64), lse=np.asarray(lse).astype(np.float64))


CALLS: dict[str, tuple[int, dict[str, Any]]] = {
    "decoding": (4, {"query_lens": (1, 1, 1, 1), "kv_lens": (40, 33, 49, 57)}),
    "chunks_and_padding": (
        2,
        {"query_lens": (5, 1, 0, 9), "kv_lens": (21, 30, 16, 25), "leading_rows": 1, "trailing_rows": 2},
    ),
    "more_rows_than_shared_tokens": (1, {"query_lens": (20, 3, 1), "kv_lens": (28, 12, 9)}),
    "sinks_cap_bias_and_layout": (
        3,
        {"query_lens": (1, 4), "kv_lens": (30, 28), "sinks": 1, "soft_cap": 5.0, "qq_bias": 4, "kv_layout": "HPTD"},
    ),
    "narrow_values": (2, {"query_lens": (1, 2), "kv_lens": (40, 18), "value_head_dim": 24}),
    "int8": (2, {"query_lens": (1, 2), "kv_lens": (40, 18), "cache_dtype": "int8", "kv_scale": "head"}),
}


@pytest.mark.parametrize(
    "implementation",
    [row for row in implementations_of("unified_attention") if row.platform in CACHE_PLATFORMS],
    ids=str,
)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("prefix_splits", [None, 3], ids=("one_after_another", "at_once"))
def test_recipe_equals_the_flat_call(implementation: Implementation, name: str, prefix_splits: int | None) -> None:
    prefix_pages, fields = CALLS[name]
    call = shared_call(prefix_pages, **fields)
    judge.check_close(call, recipe(implementation.platform, call, prefix_pages, prefix_splits), implementation(call))


def test_holding_back_own_tokens_changes_no_lengths() -> None:
    """Whatever the queries are that the lengths wait for."""
    call = shared_call(4, query_lens=(1, 1), kv_lens=(40, 33))
    unspoiled = recipe("xla", call, 4, 3)
    queries = call.array("queries").copy()
    queries[0, 0, 0] = np.nan
    spoiled = recipe("xla", call.with_arrays(queries=queries), 4, 3)
    np.testing.assert_array_equal(spoiled.out[1:], unspoiled.out[1:])


def test_documentation_shows_the_recipe_as_it_is_tested() -> None:
    page = Path(__file__).parent.parent / "docs" / "shared_prefix.md"
    assert inspect.getsource(shared_prefix.attend_shared_prefix) in page.read_text()


def test_benchmark_runs_and_notices_wrong_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--sequences 2 --own 16 --shared 32 --platform xla --pool-gb 0.02 --repeats 2 --max-calls 4 --sample-ms 1"
    assert shared_prefix.main(options.split()) == 0
    assert "| 32 |" in capsys.readouterr().out
    merge = shared_prefix.merge_attention_states
    monkeypatch.setattr(shared_prefix, "merge_attention_states", lambda a, b, c, d, **k: merge(a, b, c, d + 1, **k))
    with pytest.raises(ArithmeticError, match="recipe over 32 shared tokens"):
        shared_prefix.main(options.split())
