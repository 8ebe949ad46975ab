"""The pure-jnp `merge_attention_states` against the float64 oracle."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.test_util import check_grads

import reference
from tests import oracle
from tests.reference_problems import (
    Paged,
    assert_close,
    compiled,
    device,
    normal,
)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merge(dtype: Any) -> None:
    rng = np.random.default_rng(7)
    out_a, out_b = normal(rng, 6, 3, 8, dtype=dtype), normal(rng, 6, 3, 8, dtype=dtype)
    lse_a, lse_b = 40 * normal(rng, 6, 3), 40 * normal(rng, 6, 3)
    lse_a[0], lse_b[1] = -np.inf, -np.inf
    lse_a[2], lse_b[2] = -np.inf, -np.inf
    out_a[0], out_b[1], out_a[2], out_b[2] = np.nan, np.nan, np.nan, np.nan
    arrays = (out_a, lse_a, out_b, lse_b)
    got = reference.merge_attention_states(*device(arrays))
    assert got[0].dtype == dtype
    assert not np.any(got[0][2])
    assert_close(got[0], oracle.merge_attention_states(*arrays)[0])
    assert_close(got[1], oracle.merge_attention_states(*arrays)[1], 1e-6)


def test_merge_of_halves_is_the_whole() -> None:
    problem = Paged((1, 1, 1), (20, 9, 0))
    query, key_cache, value_cache, lengths, table = device(problem.page())
    run = compiled("page_attention", kv_layout="PTHD", return_lse=True)
    sinks = jnp.arange(6.0)
    first = run(query, key_cache, value_cache, jnp.minimum(lengths, 8), table, attention_sink=sinks)
    rest = run(query, key_cache, value_cache, jnp.maximum(lengths - 8, 0), table[:, 2:])
    whole = run(query, key_cache, value_cache, lengths, table, attention_sink=sinks)
    merged = reference.merge_attention_states(*first, *rest)
    assert_close(merged, tuple(np.asarray(x) for x in whole))


def test_merge_gradients() -> None:
    rng = np.random.default_rng(8)
    arrays = [jnp.asarray(normal(rng, *shape)) for shape in ((4, 2, 8), (4, 2), (4, 2, 8), (4, 2))]
    check_grads(reference.merge_attention_states, arrays, order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)
    arrays[1] = arrays[1].at[:2].set(-jnp.inf)
    arrays[3] = arrays[3].at[1:3].set(-jnp.inf)
    gradients = jax.grad(lambda *x: jnp.sum(reference.merge_attention_states(*x)[0]), (0, 1, 2, 3))(*arrays)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
