"""The pure-jnp `ragged_decode_attention` against the float64 oracle."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import reference
from tests.reference_problems import (
    check,
    normal,
)

RAGGED_SINKS: dict[str, np.ndarray | None] = {
    "none": None,
    "shared": np.array([0.5, 2.0, -1.0], np.float32),
    "shared-as-many-as-heads": np.linspace(-1, 2, 6, dtype=np.float32),
    "per-head": np.linspace(-2, 2, 12, dtype=np.float32).reshape(6, 2),
}


@pytest.mark.parametrize(
    ("window", "sinks", "length", "rank"),
    [(None, sinks, 17, 3) for sinks in RAGGED_SINKS]
    + [(window, "none", 64, 3) for window in (None, 4, (3, 0), (0, 2))]
    + [(None, "none", 17, 4), ((5, 1), "per-head", 32, 4)],
)
def test_ragged(window: Any, sinks: str, length: int, rank: int) -> None:
    rng = np.random.default_rng(1)
    starts = np.array([0, 5, 9, 3, -7, 12], np.int32)
    ends = np.array([length, 9, 9, 4, 30, 2**31 - 1], np.int32)
    query = normal(rng, 6, 6, 16)
    key, value = normal(rng, 6, length, 2, 16), normal(rng, 6, length, 2, 20)
    left = None if window is None else (window - 1 if isinstance(window, int) else window[0])
    for row, (start, end) in enumerate(zip(starts, np.minimum(ends, length), strict=True)):
        first = max(0, start) if left is None else max(0, start, end - 1 - left)
        unseen = np.ones(length, bool)
        unseen[first:end] = False
        key[row, unseen], value[row, unseen] = np.nan, np.inf
    arrays = (query if rank == 3 else query[:, None], key, value, starts, ends, RAGGED_SINKS[sinks])
    check("ragged_decode_attention", arrays, sliding_window=window)


def test_ragged_scale_and_cap() -> None:
    rng = np.random.default_rng(2)
    arrays = (
        normal(rng, 2, 3, 24),
        normal(rng, 2, 9, 3, 24),
        normal(rng, 2, 9, 3, 24),
        np.array([0, 2]),
        np.array([9, 7]),
    )
    check("ragged_decode_attention", arrays, softmax_scale=3.0, logits_soft_cap=1e-3)
    check("ragged_decode_attention", arrays, softmax_scale=0.4, logits_soft_cap=2.0)


def test_ragged_gradients() -> None:
    rng = np.random.default_rng(3)
    query = jnp.asarray(normal(rng, 3, 6, 16))
    key, value = jnp.asarray(normal(rng, 3, 7, 2, 16)), jnp.asarray(normal(rng, 3, 7, 2, 16))

    def ragged(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        bounds = jnp.array([0, 3, 2]), jnp.array([7, 3, 6])
        return reference.ragged_decode_attention(query, key, value, *bounds)

    check_grads(ragged, (query, key, value), order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)
