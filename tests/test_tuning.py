"""`tune` on the device at hand; here that is Triton's interpreter, whose times mean nothing but whose results count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge import operation as operations
from jax_bridge import tuning
from jax_bridge.page_attention import PageAttention

SHAPES = [
    jax.ShapeDtypeStruct((2, 2, 16), jnp.float32),
    jax.ShapeDtypeStruct((6, 1, 16, 16), jnp.float32),
    jax.ShapeDtypeStruct((6, 1, 16, 16), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.int32),
    jax.ShapeDtypeStruct((2, 3), jnp.int32),
]
BASE: dict[str, Any] = {
    "num_warps": 4,
    "num_stages": 1,
    "block_m": 16,
    "programs_per_sm": 4,
    "min_tiles_per_split": 2,
    "skip_masks": False,
}
CANDIDATES = tuple(jax_bridge.PageAttentionConfig(block_n=block_n, **BASE) for block_n in (16, 32))


@pytest.fixture(autouse=True)
def two_quick_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_tuned", {})
    monkeypatch.setattr(tuning, "WARM_UP", 0)
    monkeypatch.setattr(tuning, "ITERATIONS", 5)
    monkeypatch.setattr(PageAttention, "candidate_cfgs", lambda self, invocation: CANDIDATES)


def chosen_block_n() -> int | None:
    operation = PageAttention()
    (branch,) = operation.branches(operation.invocation(*SHAPES), "triton", None)
    return branch.cfg.block_n  # type: ignore[attr-defined]


def test_the_fastest_candidate_serves_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr(tuning, "_median_seconds", lambda call: next(seconds))
    assert jax_bridge.tune("page_attention", *SHAPES) == CANDIDATES[1]
    assert chosen_block_n() == 32


def test_a_wrong_candidate_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([False, True])
    monkeypatch.setattr(tuning, "_agree", lambda results, expected: next(verdicts))
    with pytest.warns(RuntimeWarning, match="differs from that of the reference"):
        assert jax_bridge.tune(jax_bridge.page_attention, *SHAPES) == CANDIDATES[1]


def test_agreement_is_judged_on_values() -> None:
    right = jnp.ones((2, 3))
    assert tuning._agree(right, right)
    assert not tuning._agree(right * 1.01, right)


def test_arrays_are_timed_as_they_are() -> None:
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.normal(size=shape.shape), shape.dtype)
        if shape.dtype == jnp.float32
        else jnp.asarray(rng.integers(0, 6, shape.shape), shape.dtype)
        for shape in SHAPES
    ]
    assert jax_bridge.tune("page_attention", *arrays) in CANDIDATES


def test_operations_without_kernels_answer_the_heuristics() -> None:
    lse = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    out = jax.ShapeDtypeStruct((3, 2, 16), jnp.float32)
    assert jax_bridge.tune("merge_attention_states", out, lse, out, lse).platform == "auto"
