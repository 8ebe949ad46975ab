"""Every named case, in every dtype, on every implementation, against float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from tests import judge, oracle, tolerances
from tests.cases import FLOATS, LAYOUTS, OPERATIONS, QUANTISED, Case, matrix
from tests.implementations import (
    CACHE_WRITERS,
    FULL,
    IMPLEMENTATIONS,
    MARKS,
    MERGERS,
    Implementation,
    arguments,
    implementations_of,
    to_device,
)
from tests.inputs import build
from tests.poison import Array, numpy_dtype, poison_like

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


@pytest.mark.parametrize("implementation", implementations_of("page_attention"), ids=str)
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


def _tokens(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.standard_normal(shape) * 3.0).astype(np.float32)


@pytest.mark.parametrize("platform", CACHE_WRITERS)
@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("cache_dtype", [*FLOATS, *QUANTISED])
def test_write_kv_pages(platform: str, kv_layout: str, cache_dtype: str) -> None:
    """Slots are written once, rounded and saturated; everything else keeps its bits, NaN included."""
    rng = np.random.default_rng(7)
    pages, size, heads, head_dim, value_dim = 5, 3, 2, 8, 12
    slots = np.array([14, -1, 3, 0, 15, 7, -100, 2**31 - 1, 8], np.int32)
    axes = ["PTHD".index(axis) for axis in kv_layout]
    dtype = numpy_dtype(cache_dtype)
    caches = [
        np.ascontiguousarray(poison_like((pages, size, heads, dim), dtype).transpose(axes))
        for dim in (head_dim, value_dim)
    ]
    scales: dict[str, Array] = {}
    token_dtype = dtype
    if cache_dtype in QUANTISED:
        token_dtype = np.dtype(np.float32)
        scales = {"k_scale": np.array([0.01, 0.4], np.float32), "v_scale": np.array(0.07, np.float32)}
    key = _tokens(rng, len(slots), heads, head_dim).astype(token_dtype)
    value = _tokens(rng, len(slots), heads, value_dim).astype(token_dtype)
    key[0, 0, 0] = 1000.0
    got = jax_bridge.write_kv_pages(
        *map(to_device, (key, value, *caches, slots)),
        **{name: to_device(scale) for name, scale in scales.items()},
        kv_layout=kv_layout,
        platform=platform,
    )
    expected = oracle.write_kv_pages(key, value, caches[0], caches[1], slots, **scales, kv_layout=kv_layout)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(_bits(np.asarray(mine)), _bits(theirs))


def _bits(array: Array) -> Array:
    return array.view(f"uint{8 * array.dtype.itemsize}")


@pytest.mark.parametrize("platform", MERGERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_attention_states(platform: str, dtype: str) -> None:
    """Full with full, full with empty, empty with empty, one far above the other."""
    rng = np.random.default_rng(8)
    rows, heads, head_dim = 7, 3, 20
    outs = rng.standard_normal((2, rows, heads, head_dim)).astype(numpy_dtype(dtype))
    lses = rng.normal(0.0, 3.0, (2, rows, heads)).astype(np.float32)
    lses[0, 1], lses[1, 2], lses[:, 3], lses[0, 4], lses[0, 5] = -np.inf, -np.inf, -np.inf, 500.0, -500.0
    outs[:, 3] = 0.0
    out, lse = jax_bridge.merge_attention_states(
        *map(to_device, (outs[0], lses[0], outs[1], lses[1])), platform=platform
    )
    expected_out, expected_lse = oracle.merge_attention_states(outs[0], lses[0], outs[1], lses[1])
    assert out.dtype == outs.dtype
    assert lse.dtype == np.float32
    epsilon = float(jnp.finfo(dtype).eps)
    tolerances.Bound(8 * epsilon, np.inf).check("out", np.asarray(out).astype(np.float64), expected_out)
    tolerances.Bound(1e-4, np.inf).check("lse", np.asarray(lse).astype(np.float64), expected_lse)
