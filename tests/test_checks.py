"""`check_values` and `explain`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import jax_bridge
from jax_bridge.registry import OPERATIONS as OBJECTS
from tests.small_calls import (
    MP,
    OPERATIONS,
    TOKENS,
    D,
    S,
    arguments,
    call,
    run,
)

BAD_VALUES = [
    ("page_attention", {"context_lens": [13, -1]}, ("context_lens[0] is 13", "at most 12", "context_lens[1] is -1")),
    ("page_attention", {"block_tables": [[0, 6, 9], [-1, 9, 9]]}, ("[0, 1] is 6", "[0, 2] is 9", "[1, 0] is -1")),
    ("page_attention", {"max_context_len": 8}, ("context_lens[0] is 9", "max_context_len = 8")),
    ("prefill_page_attention", {"page_indices": [0, 1, 77]}, ("page_indices[2] is 77", "from 0 to 5")),
    ("prefill_page_attention", {"context_len": [20]}, ("context_len[0] is 20", "at most 12")),
    ("unified_attention", {"query_start_loc": [3, 0, 9]}, ("[1] is 0, expected at least 3", "[2] is 9", "5 rows")),
    ("unified_attention", {"kv_lens": [-2, 40]}, ("kv_lens[0] is -2", "kv_lens[1] is 40")),
    ("ragged_decode_attention", {"sequence_end": [9, 5]}, ("sequence_end[0] is 9", "L = 8")),
    ("ragged_decode_attention", {"sequence_start": [-1, 0]}, ("sequence_start[0] is -1",)),
    (  # pages of a sequence whose rows fall back, too
        "unified_attention",
        {"query_start_loc": [0, 3, 2], "block_tables": [[0, 1, 2], [9, 1, 0]]},
        ("query_start_loc[2] is 2, expected at least 3", "block_tables[1, 0] is 9"),
    ),
    ("ragged_decode_attention", {"sequence_end": [2**40, 5]}, (f"sequence_end[0] is {2**40}",)),
    ("prefill_page_attention", {"context_len": 2**70}, (f"context_len[0] is {2**70}",)),
    ("write_kv_pages", {"slot_mapping": [3, 3, -1, 24, 5]}, ("[1] is 3, the slot of token 0", "[3] is 24", "24 slots")),
    ("page_attention", {"k_scale": float("nan")}, ("k_scale holds [nan]", "finite")),
]


@pytest.mark.parametrize(("operation", "changes", "fragments"), BAD_VALUES)
def test_check_values_lists_every_problem(operation: str, changes: dict[str, Any], fragments: tuple[str, ...]) -> None:
    changed = {name: np.asarray(value) if isinstance(value, list) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=rf"^{operation}: \d+ problems?\n- ") as raised:
        call(lambda *a, **k: jax_bridge.check_values(operation, *a, **k), operation, arguments(operation), **changed)
    missing = [fragment for fragment in fragments if fragment not in str(raised.value)]
    assert not missing, str(raised.value)


REFUSED = [
    (
        "page_attention",
        {"context_lens": np.ones(S), "block_tables": np.zeros((3, 3), int), "k_scale": np.ones(5, np.float32)},
        ("context_lens has dtype float64, expected an integer", "block_tables has shape (3, 3)", "k_scale has shape"),
    ),
    (
        "prefill_page_attention",
        {"context_len": np.ones(2, int), "page_indices": [1, 2]},
        ("context_len has shape (2,), expected a scalar or [1]", "page_indices is [1, 2] of type list"),
    ),
    ("unified_attention", {"queries": np.zeros(3), "key_cache": 5}, ("queries has shape (3,)", "key_cache is 5")),
    (
        "unified_attention",
        {
            "queries": np.zeros((TOKENS, D), np.float32),
            "kv_lens": np.zeros(S, np.float32),
            "block_tables": np.zeros((S, MP), np.float32),
            "query_start_loc": np.zeros(S, int),
            "sliding_window": 0,
            "logits_soft_cap": -1.0,
            "causal": 1,
        },
        (
            f"queries has shape ({TOKENS}, {D})",
            "kv_lens has dtype float32",
            "block_tables has dtype float32",
            "query_start_loc has shape",
            "sliding_window is 0",
            "logits_soft_cap is -1.0",
            "causal is 1",
        ),
    ),
    ("page_attention", {"kv_layout": "NHD", "context_lens": np.ones(S)}, ("kv_layout is 'NHD'", "context_lens has")),
    ("ragged_decode_attention", {"softmax_aux": np.ones((2, 2)), "sliding_window": 0}, ("[Hq, n]", "sliding_window")),
    ("attention", {"key": np.zeros((2, 8, 3, 16), np.float32)}, ("value has shape", "query has 4 heads")),
    (
        "attention",
        {
            "bias": np.ones((9, 9), np.float32),
            "mask_info": "causal",
            "init_bias": 1,
            "dropout_rng": 7,
            "dropout_prob": 2.0,
            "deterministic": False,
            "dtype": "int8",
            "softmax_dtype": "half a float",
            "sliding_window": 0,
            "logits_soft_cap": -1.0,
        },
        (
            "bias has shape (9, 9)",
            "mask_info is",
            "init_bias is 1",
            "dropout_rng is 7",
            "dropout_prob is 2.0",
            "dtype is int8",
            "softmax_dtype is 'half a float'",
            "sliding_window is 0",
            "logits_soft_cap is -1.0",
        ),
    ),
    ("write_kv_pages", {"slot_mapping": np.zeros(4, int)}, ("slot_mapping has shape (4,)",)),
    ("merge_attention_states", {"lse_a": None}, ("lse_a is None",)),
]


@pytest.mark.parametrize(("operation", "changes", "fragments"), REFUSED)
def test_check_values_lists_refused_arguments(
    operation: str, changes: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    pattern = rf"^{operation}: {len(fragments)} problems?\n- "
    with pytest.raises(ValueError, match=pattern) as raised:
        call(lambda *a, **k: jax_bridge.check_values(operation, *a, **k), operation, arguments(operation), **changes)
    missing = [fragment for fragment in fragments if fragment not in str(raised.value)]
    assert not missing, str(raised.value)
    with pytest.raises((TypeError, ValueError), match=rf"^{operation}: (?!\d+ problem)"):
        run(operation, arguments(operation), **changes)


@pytest.mark.parametrize(
    "function",
    [jax_bridge.check_values, jax_bridge.explain, jax_bridge.tune, lambda op, *a, **k: OBJECTS[op].get_impl()(*a, **k)],
    ids=["check_values", "explain", "tune", "get_impl"],
)
def test_missing_and_unknown_arguments_are_told_by_the_operations_name(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"^page_attention: missing a required argument: 'key_cache'"):
        function("page_attention", np.zeros(3))
    with pytest.raises(TypeError, match=r"^attention: got an unexpected keyword argument 'heads'"):
        call(lambda *a, **k: function("attention", *a, **k), "attention", arguments("attention"), heads=3)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_check_values_accepts_good_calls(operation: str) -> None:
    named = arguments(operation)
    if "slot_mapping" in named:
        named["slot_mapping"] = np.asarray([3, -1, 9, 20, -1])
    for op in (operation, getattr(jax_bridge, operation), OBJECTS[operation], type(OBJECTS[operation])):
        assert call(lambda *a, op=op, **k: jax_bridge.check_values(op, *a, **k), operation, named) is None


def test_check_values_ignores_what_is_unused() -> None:
    tables = np.asarray([[-9, 1, 2], [3, 99, -7]])
    named = arguments("page_attention") | {"block_tables": tables}
    assert call(jax_bridge.check_values, "page_attention", named, op="page_attention", sliding_window=4) is None


def test_check_values_needs_concrete_arrays() -> None:
    named = arguments("page_attention")
    with pytest.raises(TypeError, match=r"page_attention: context_lens is a traced value.*expected a concrete array"):
        jax.jit(lambda lens: jax_bridge.check_values("page_attention", **(named | {"context_lens": lens})))(
            np.ones(S, int)
        )
    with pytest.raises(ValueError, match="op is 'paged', expected an operation or one of the names page_attention"):
        jax_bridge.check_values("paged")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_explain_names_the_choice(operation: str) -> None:
    named = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arguments(operation).items()}
    explained = call(lambda *a, **k: jax_bridge.explain(operation, *a, **k), operation, named)
    assert explained.platform == {"cpu": "xla"}.get(jax.default_backend(), explained.platform)
    assert f"{operation}[{explained.platform}]" in str(explained)
    assert f"{jax.default_backend()} backend" in str(explained)
