"""The kernel for Hopper without a GPU: its answers, and that missing waits would show."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_bridge.device import target_device
from tests import judge, strategies, tolerances
from tests.cases import Case
from tests.dense_form import Result
from tests.implementations import HAS_KERNEL, ON_GPU, SMALL_DEVICE, kernel_of, specialized
from tests.inputs import Call, build

pytestmark = pytest.mark.skipif(ON_GPU or not HAS_KERNEL, reason="runs in Triton's interpreter")

MIXED = Case(
    name="hopper_interpreted",
    operation="unified_attention",
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    dtype="bfloat16",
    query_lens=(1, 40, 0, 3),
    kv_lens=(230, 170, 9, 20),
    leading_rows=1,
    trailing_rows=2,
)
PROMPT = MIXED.replace(query_lens=(100,), kv_lens=(130,), leading_rows=0, trailing_rows=0)
CHUNK = PROMPT.replace(operation="prefill_page_attention", query_lens=(20,), kv_lens=(230,))
CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "mixed": (MIXED, {}),
    "mixed_one_slot": (MIXED, {"num_stages": 1}),
    "mixed_split_often": (MIXED, {"min_tiles_per_split": 1, "num_stages": 4}),
    "mixed_window": (MIXED.replace(window=50), {}),
    "mixed_both_ways": (MIXED.replace(window=(40, 9), causal=False, page_size=8), {}),
    "mixed_cap": (MIXED.replace(window=(60, 0), soft_cap=20.0, sinks=1), {"min_tiles_per_split": 1}),
    "mixed_cap_float16": (MIXED.replace(soft_cap=20.0, dtype="float16"), {}),
    "mixed_everything": (MIXED.replace(window=(60, 0), soft_cap=20.0, sinks=1, return_lse=True), {}),
    "mixed_forced_splits": (MIXED.replace(return_lse=True), {"num_par_softmax_segments": 3}),
    "long_pages": (MIXED.replace(page_size=64, kv_layout="PHTD"), {}),
    "heads_outside": (MIXED.replace(kv_layout="HPTD", dtype="float16", spare_pages=30), {}),
    "groups_of_three": (MIXED.replace(num_q_heads=6, kv_scale="head"), {}),
    "narrow_heads": (MIXED.replace(head_dim=40), {"num_par_softmax_segments": 3}),
    "narrow_heads_outside": (MIXED.replace(head_dim=56, kv_layout="HPTD", window=50), {}),
    "prompt": (PROMPT, {}),
    "prompt_cap": (PROMPT.replace(soft_cap=50.0, sinks=1), {}),
    "prompt_far_below_cap": (PROMPT.replace(soft_cap=50.0, negative_logits=True), {}),
    "prompt_of_large_weights": (PROMPT.replace(soft_cap=50.0, query_gain=1000.0, sinks=1), {}),
    "prompt_at_cap": (PROMPT.replace(soft_cap=30.0, query_gain=1000.0), {}),
    "prompt_window": (PROMPT.replace(window=40, sinks=1), {"num_stages": 3}),
    "chunk_in_shares": (CHUNK.replace(return_lse=True), {"min_tiles_per_split": 1}),
}


def answer(call: Call, fields: dict[str, Any], num_sms: int, **how: Any) -> Result:
    """What the kernel answers, with tiles of 32 keys unless others are asked for."""
    from tests.gluon_interpreter import interpreted

    cfg = specialized(call.operation, **({"block_n": 32, "num_stages": 2} | fields))
    with target_device(dataclasses.replace(SMALL_DEVICE, num_sms=num_sms)), interpreted(**how):
        return kernel_of(call.operation)(call, cfg=cfg)


def check(name: str, **how: Any) -> None:
    """Holds the answer to float64, on a device of so many multiprocessors that long row tiles are cut."""
    case, fields = CASES[name]
    call, expected, bounds = judge.problem(case)
    bounds.check(answer(call, fields, num_sms=6, **how), expected)


@pytest.mark.parametrize("is_eager", [True, False], ids=["eager", "lazy"])
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str, is_eager: bool) -> None:
    check(name, is_eager=is_eager)


@st.composite
def served(draw: st.DrawFn) -> Case:
    """A case that the kernel serves."""
    operation = draw(st.sampled_from(("unified_attention", "unified_attention", "prefill_page_attention")))
    return draw(strategies.cases(operation)).replace(
        head_dim=draw(st.sampled_from((40, 48, 64))),
        value_head_dim=None,
        dtype=draw(st.sampled_from(("bfloat16", "float16"))),
        cache_dtype=None,
        kv_scale=draw(st.sampled_from(("none", "none", "head"))),
        page_size=draw(st.sampled_from((8, 16, 32, 64))),
        alibi=False,
        qq_bias=0,
    )


@given(
    case=served(),
    tile=st.fixed_dictionaries({"block_n": st.sampled_from((16, 32, 64)), "num_stages": st.integers(1, 4)}),
    shares=st.fixed_dictionaries({}, optional={"min_tiles_per_split": st.integers(1, 3)}),
    decode_block_m=st.sampled_from((None, 8, 32, 128)),
    forced=st.sampled_from((None, None, 2, 5)),
    num_sms=st.integers(1, 8),
    is_eager=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_problems_that_nobody_chose(
    case: Case,
    tile: dict[str, int],
    shares: dict[str, int],
    decode_block_m: int | None,
    forced: int | None,
    num_sms: int,
    is_eager: bool,
    seed: int,
) -> None:
    call = build(case, seed)
    expected = judge.truth(call)
    if case.operation == "unified_attention":
        fields = {"decode_block_m": decode_block_m, "num_par_softmax_segments": forced}
    else:
        fields = {"num_splits": forced}
    got = answer(call, tile | shares | fields, num_sms, is_eager=is_eager, seed=seed)
    tolerances.calibrate(call, expected).check(got, expected)


_FIRST_CLEAN = "clean(v_ring.index(slot), begin, key_begin, key_end, BOX)"
_LAST_CLEAN = "clean(v_ring.index(slot), begin + (num_tiles - 1) * block_n, key_begin, key_end, BOX)"
_SCORES = "products = warpgroup_mma_wait(2 if IS_BOUNDED else 1, deps=[products])"
_VALUES = "acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])\n    "
_BOUNDED_VALUES = "acc, row_sum, weights = warpgroup_mma_wait(0, deps=[acc, row_sum, weights])\n"
_LAST_SUMS = "row_sum = warpgroup_mma(weights, rings[2], row_sum, is_async=True)\n        first"
_GIVE_BACK = "mbarrier.arrive(v_empty.index(before), count=1)\n    "

BUGS: dict[str, tuple[str, str, str]] = {
    "values_behind_the_end_not_cleaned": ("mixed", _LAST_CLEAN, "pass"),
    "values_before_the_window_not_cleaned": ("mixed_window", _FIRST_CLEAN, "pass"),
    "keys_fetched_into_a_slot_in_use": ("mixed", "mbarrier.wait(k_empty.index(slot), parity ^ 1)", "pass"),
    "values_fetched_into_a_slot_in_use": ("mixed", "mbarrier.wait(v_empty.index(slot), parity ^ 1)", "pass"),
    "scores_of_keys_that_are_not_there": (
        "mixed",
        "mbarrier.wait(k_full.index(slot), parity)\n    await_turn",
        "await_turn",
    ),
    "values_used_that_are_not_there": (
        "mixed",
        "mbarrier.wait(v_full.index(before), parity_before)\n    acc",
        "acc",
    ),
    "scores_used_that_are_not_there": ("mixed", _SCORES, "pass"),
    "slot_given_back_before_its_values_are_used": ("mixed", _VALUES + _GIVE_BACK, _GIVE_BACK + _VALUES),
    "queries_of_the_part_before": ("prompt", "async_copy.wait_group(0)", "pass"),
    "part_announced_over_one_that_nobody_read": (
        "mixed_split_often",
        "mbarrier.wait(empty.index(slot), parity ^ 1)\n    for number",
        "for number",
    ),
    "tile_that_passes_not_given_back": (
        "mixed",
        "mbarrier.wait(k_full.index(slot), parity)\n    mbarrier.arrive(k_empty.index(slot), count=1)\n",
        "pass\n",
    ),
    "turn_that_never_ends": (
        "prompt",
        "end_turn(turns, GROUP)\n    products",
        "products",
    ),
    "bounded_scores_used_that_are_not_there": ("mixed_cap", "2 if IS_BOUNDED else 1", "3 if IS_BOUNDED else 1"),
    "slot_given_back_before_its_bounded_values_are_used": ("mixed_cap", _BOUNDED_VALUES + "    else", "pass\n    else"),
    "last_weights_not_summed": ("mixed_cap", _LAST_SUMS, "pass\n        first"),
    "bounded_scores_from_another_maximum": ("prompt_cap", "[ROWS], SCORING.bounded_max,", "[ROWS], 0.0,"),
    "row_tiles_cut_in_secret": ("mixed_split_often", "gl.store(tickets_ptr, 1, mask=num_splits > 1)", "pass"),
    "one_counter_for_both_kinds": ("mixed", "take_ticket(tickets_ptr + 2,", "take_ticket(tickets_ptr + 1,"),
    "partial_results_one_row_apart": ("mixed_split_often", "kv_head) * TILE.block_m\n", "kv_head)\n"),
    "keys_of_the_first_head": ("mixed", "k_token_stride // CACHE.head_dim)", "k_token_stride // CACHE.head_dim * 0)"),
    "queries_of_the_next_head": ("narrow_heads", " & (dims < CACHE.head_dim)[None, :]", ""),
    "whole_tiles_end_late": ("mixed", "gl.minimum(whole_end, key_end) - begin", "key_end - begin"),
    "parity_of_the_first_turn": ("mixed", "number // RING & 1", "number * 0"),
}
"""Case, and what is replaced by what in the kernel's modules."""


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug: str, tmp_path: Path) -> None:
    """By the answers where copies and products come at once, or by those where they come late, or nothing goes on."""
    from tests.gluon_interpreter import KERNELS, MODULES

    case, right, wrong = BUGS[bug]
    texts = {name: (KERNELS / f"{name}.py").read_text() for name in MODULES}
    assert sum(text.count(right) for text in texts.values()) == 1
    for name, text in texts.items():
        source = tmp_path / f"{name}.py"
        source.write_text(text.replace(right, wrong))
        compile(source.read_text(), str(source), "exec")  # no failure that anything would pass for

    def is_wrong(**how: Any) -> bool:
        try:
            check(case, folder=tmp_path, **how)
        except (AssertionError, jax.errors.JaxRuntimeError):
            return True
        return False

    assert any(is_wrong(is_eager=is_eager, seed=seed) for seed in range(3) for is_eager in (True, False))
