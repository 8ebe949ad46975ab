"""Every named case, in every dtype, on every implementation, against float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from tests import judge
from tests.cache_problems import MergeCase, WriteCase
from tests.cases import FLOATS, LAYOUTS, OPERATIONS, QUANTISED, Case, matrix
from tests.implementations import (
    CACHE_PLATFORMS,
    FULL,
    IMPLEMENTATIONS,
    MARKS,
    Implementation,
    arguments,
    implementations_of,
)
from tests.inputs import build

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param(implementation, case, id=f"{implementation.name}-{case.name}")
        for case in matrix(FULL)
        for implementation in implementations_of(case.operation)
    ],
)
def test_matches_float64(implementation: Implementation, case: Case) -> None:
    call, expected, bounds = judge.problem(case)
    if missing := sorted(case.features & implementation.lacks):
        with pytest.raises(NotImplementedError, match="|".join(missing)):
            implementation(call)
        return
    bounds.check(implementation(call), expected)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("platform", ["triton", "pallas", "cuda"])
def test_platforms_without_a_row_refuse(operation: str, platform: str) -> None:
    if any((row.operation, row.platform) == (operation, platform) for row in IMPLEMENTATIONS):
        pytest.skip("the platform has a row")
    call = build(Case(name="refused", operation=operation))
    arrays, keywords = arguments(call)
    with pytest.raises(NotImplementedError, match=rf"{operation}\[{platform}\] does not support"):
        getattr(jax_bridge, operation)(*arrays, **keywords, platform=platform)


@pytest.mark.parametrize(
    "implementation", [row for row in implementations_of("page_attention") if row.platform != "pallas"], ids=str
)
@pytest.mark.parametrize(
    "hint",
    [{"pages_per_compute_block": 2}, {"megacore_mode": "batch"}, {"inline_seq_dim": False}],
    ids=lambda h: next(iter(h)),
)
def test_hints_of_the_tpu_are_refused(implementation: Implementation, hint: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(hint))):
        implementation.raw(build(Case(name="refused", operation="page_attention")), **hint)


@pytest.mark.parametrize("implementation", implementations_of("page_attention", "prefill_page_attention"), ids=str)
def test_mask_value_changes_no_bits(implementation: Implementation) -> None:
    call = build(Case(name="masked", operation=implementation.operation, kv_lens=(20,)))
    first, second = implementation.raw(call), implementation.raw(call, mask_value=-1.0)
    assert np.array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("implementation", implementations_of("attention"), ids=str)
def test_attention_computes_in_the_dtype_asked_for(implementation: Implementation) -> None:
    call = build(Case(name="dtypes", operation="attention", query_lens=(5,), kv_lens=(12,)))
    rounded = build(Case(name="dtypes", operation="attention", query_lens=(5,), kv_lens=(12,), dtype="bfloat16"))
    default = implementation.raw(call.with_options(dtype=jnp.bfloat16))
    assert default.dtype == jnp.bfloat16
    # Two programs, which XLA may fuse differently: one unit in the last place of bfloat16.
    expected = np.asarray(implementation.raw(rounded), np.float32)
    np.testing.assert_allclose(np.asarray(default, np.float32), expected, rtol=2.0**-7, atol=0)
    judge.check(call, implementation(call.with_options(dtype=None)))


@pytest.mark.parametrize("platform", CACHE_PLATFORMS)
@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("cache_dtype", [*FLOATS, *QUANTISED])
def test_write_kv_pages(platform: str, kv_layout: str, cache_dtype: str) -> None:
    """Slots are written once, rounded and saturated; everything else keeps its bits, NaN included."""
    quantised = {"scale": "head"} if cache_dtype in QUANTISED else {"dtype": cache_dtype}
    WriteCase(cache_dtype=cache_dtype, kv_layout=kv_layout, **quantised).check(platform)


@pytest.mark.parametrize("platform", CACHE_PLATFORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_attention_states(platform: str, dtype: str) -> None:
    """Full with full, full with empty, empty with empty, one far above the other."""
    MergeCase(dtype=dtype).check(platform)
