"""The pure-jnp `unified_attention` against the float64 oracle, sentence by sentence of the contract."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.test_util import check_grads

import reference
from reference.blocks import block_size, page_widths
from tests import oracle
from tests.reference_problems import (
    KV_LENS,
    QUERY_LENS,
    Paged,
    assert_close,
    check,
    compiled,
    device,
    fast_jit,
    first_seen,
    normal,
)

FEATURES: dict[str, Callable[[Paged], dict[str, Any]]] = {
    "plain": lambda p: {},
    "scale": lambda p: {"softmax_scale": 0.7},
    "cap": lambda p: {"logits_soft_cap": 0.5, "softmax_scale": 1.0},
    "cap-overflow": lambda p: {"logits_soft_cap": 0.01, "softmax_scale": 100.0},
    "cap-zero": lambda p: {"logits_soft_cap": 0.0},
    "sinks": lambda p: {"attention_sink": 3 * normal(p.rng, 6)},
    "sinks-half": lambda p: {"attention_sink": normal(p.rng, 6, dtype=ml_dtypes.bfloat16)},
    "sinks-huge": lambda p: {"attention_sink": 60 * normal(p.rng, 6)},
    "sinks-infinite": lambda p: {"attention_sink": np.array([-np.inf, 0, 1, -np.inf, 2, 3], np.float32)},
    "alibi": lambda p: {"alibi_slopes": 2.0 ** -np.arange(6, dtype=np.float32)},
    "alibi-sinks": lambda p: {
        "alibi_slopes": 2.0 ** -np.arange(6, dtype=np.float32),
        "attention_sink": normal(p.rng, 6),
    },
    "alibi-cap": lambda p: {"alibi_slopes": -0.3 * np.ones(6, np.float32), "logits_soft_cap": 0.5},
    "qq-bias": lambda p: {"qq_bias": 2 * normal(p.rng, 3, 3)},
    "qq-bias-wide": lambda p: {"qq_bias": 2 * normal(p.rng, 9, 9)},
    "qq-bias-hides": lambda p: {"qq_bias": np.where(np.eye(4, dtype=bool), 0, -np.inf).astype(np.float32)},
    "qq-bias-empty": lambda p: {"qq_bias": normal(p.rng, 0, 0)},
    "qq-bias-cap-alibi": lambda p: {
        "qq_bias": 2 * normal(p.rng, 5, 5),
        "logits_soft_cap": 1.5,
        "softmax_scale": 2.0,
        "alibi_slopes": normal(p.rng, 6),
        "attention_sink": normal(p.rng, 6),
    },
}


@pytest.mark.parametrize(
    ("feature", "causal"),
    [(name, True) for name in FEATURES] + [("plain", False), ("sinks", False), ("qq-bias-cap-alibi", False)],
)
def test_unified_features(feature: str, causal: bool) -> None:
    problem = Paged(QUERY_LENS, KV_LENS, value_dim=24, leading=2, trailing=3)
    check("unified_attention", problem.unified(), causal=causal, **FEATURES[feature](problem))


@pytest.mark.parametrize(
    ("window", "causal"),
    [
        *((window, True) for window in (1, 4, 2**31, (2, 1))),
        *((window, False) for window in (3, (2, 1), (0, 0), (5, 2**31 - 1), (0, 6))),
    ],
)
def test_unified_windows(window: Any, causal: bool) -> None:
    left = window - 1 if isinstance(window, int) else window[0]
    problem = Paged(QUERY_LENS, KV_LENS, page_size=3, first_seen=first_seen(QUERY_LENS, KV_LENS, left), trailing=2)
    check("unified_attention", problem.unified(), causal=causal, sliding_window=window)


def test_window_tuples_may_leave_a_side_open() -> None:
    arrays = Paged(QUERY_LENS, KV_LENS).unified()
    check("unified_attention", arrays, causal=False, sliding_window=(2, None))
    check("unified_attention", arrays, causal=False, sliding_window=(None, 1))


@pytest.mark.parametrize(("kv_layout", "page_size"), [("PTHD", 7), ("PHTD", 130), ("HPTD", 1)])
def test_unified_layouts_and_pages(kv_layout: str, page_size: int) -> None:
    problem = Paged(QUERY_LENS, KV_LENS, page_size=page_size, kv_layout=kv_layout)
    check("unified_attention", problem.unified(), kv_layout=kv_layout)


@pytest.mark.parametrize(("heads", "head_dim", "value_dim"), [((5, 1), 17, 33), ((21, 3), 40, 16), ((4, 4), 19, 19)])
def test_unified_sizes(heads: tuple[int, int], head_dim: int, value_dim: int) -> None:
    problem = Paged((3, 1), (11, 6), heads=heads, head_dim=head_dim, value_dim=value_dim)
    check("unified_attention", problem.unified())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision(dtype: Any) -> None:
    problem = Paged(QUERY_LENS, KV_LENS, dtype=dtype, trailing=1)
    check("unified_attention", problem.unified())


def test_long_tables_of_short_and_long_sequences() -> None:
    """More tokens than the narrowest step, so that several widths are compiled and chosen."""
    query_lens, kv_lens = (1, 40, 1), (5, 600, 290)
    assert len(page_widths(200, 4, 16, causal=True, window=(None, None))) > 2
    problem = Paged(query_lens, kv_lens, heads=(2, 1), spare_pages=50)
    check("unified_attention", problem.unified())
    problem = Paged(query_lens, kv_lens, heads=(2, 1), first_seen=first_seen(query_lens, kv_lens, 300), spare_pages=50)
    check("unified_attention", problem.unified(), sliding_window=301)


def test_steps_of_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is independent of how many blocks run together."""
    problem = Paged(QUERY_LENS, KV_LENS, leading=1, trailing=2)
    arrays = device(problem.unified())
    whole = compiled("unified_attention")(*arrays)
    monkeypatch.setattr("reference.blocks.STEP_ELEMENTS", 50_000)
    in_steps = fast_jit(inspect.unwrap(reference.unified_attention))
    assert "while" in in_steps.lower(*arrays).as_text()
    np.testing.assert_allclose(in_steps(*arrays), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "seqs", "expected"), [(4, 8, 1), (8, 8, 1), (9, 8, 2), (100, 3, 64), (24, 3, 8), (0, 0, 1)]
)
def test_block_size(rows: int, seqs: int, expected: int) -> None:
    assert block_size(rows, seqs) == expected


def test_ragged_rows_of_one_token_start_anywhere() -> None:
    problem = Paged((1, 0, 1, 1, 0, 0), (4, 3, 7, 0, 0, 2), leading=1, trailing=1)
    check("unified_attention", problem.unified(), attention_sink=np.arange(6, dtype=np.float32))


@pytest.mark.parametrize("index_dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_index_dtypes(index_dtype: Any) -> None:
    problem = Paged(QUERY_LENS, KV_LENS)
    queries, key_cache, value_cache, kv_lens, table, row_starts = problem.unified()
    table = np.where((table < 0) | (table > 100), 0, table)
    indices = tuple(x.astype(index_dtype) for x in (kv_lens, table, row_starts))
    check("unified_attention", (queries, key_cache, value_cache, *indices))


def test_shared_and_duplicate_pages() -> None:
    problem = Paged((2, 1), (8, 8))
    queries, key_cache, value_cache, kv_lens, table, row_starts = problem.unified()
    table[1, :2] = table[0, 1], table[0, 1]
    check("unified_attention", (queries, key_cache, value_cache, kv_lens, table, row_starts))


def test_wild_values_stay_in_their_sequence() -> None:
    """Lengths beyond the table and page ids beyond the cache spoil no other sequence."""
    problem = Paged((2, 3, 1), (8, 9, 5))
    queries, key_cache, value_cache, kv_lens, table, row_starts = problem.unified()
    clean = oracle.unified_attention(*problem.unified())
    kv_lens[1] = 2**31 - 1
    table[1] = 10**6
    got = np.asarray(
        compiled("unified_attention")(*device((queries, key_cache, value_cache, kv_lens, table, row_starts)))
    )
    np.testing.assert_allclose(got[[0, 1, 5]], clean[[0, 1, 5]], atol=4e-6)


def test_nan_in_a_seen_key_stays_in_its_sequence() -> None:
    problem = Paged((4, 4), (8, 9))
    clean = oracle.unified_attention(*problem.unified())
    page = problem.table[0, 1]
    problem.key_cache[page], problem.value_cache[page] = np.nan, np.nan
    got = np.asarray(compiled("unified_attention")(*device(problem.unified())))
    np.testing.assert_allclose(got[4:], clean[4:], atol=4e-6)
    assert np.isnan(got[3]).all()


@pytest.mark.parametrize("poisoned", [False, True])
def test_unified_gradients(poisoned: bool) -> None:
    problem = Paged((3, 1, 0, 4), (6, 9, 3, 2), leading=1, trailing=1)
    queries, key_cache, value_cache, *indices = device(problem.unified())
    sinks, slopes = jnp.linspace(-1, 1, 6), jnp.linspace(0.1, 0.5, 6)
    indices = list(indices)

    def loss(queries: jax.Array, key_cache: jax.Array, value_cache: jax.Array, sinks: jax.Array) -> Any:
        return reference.unified_attention(
            queries,
            key_cache,
            value_cache,
            *indices,
            attention_sink=sinks,
            alibi_slopes=slopes,
            logits_soft_cap=2.0,
            sliding_window=5,
            return_lse=True,
        )

    if not poisoned:
        clean = tuple(jnp.nan_to_num(x) for x in (queries, key_cache, value_cache))
        check_grads(loss, (*clean, sinks), order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)
        return
    gradients = jax.grad(lambda *x: jnp.sum(jnp.square(loss(*x)[0])), (0, 1, 2, 3))(
        queries, key_cache, value_cache, sinks
    )
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.any(gradient)
    assert not np.any(np.asarray(gradients[1])[np.isnan(np.asarray(key_cache))])


def test_gradients_of_sinks_that_are_off_are_zero() -> None:
    """Also through the LSE, of rows with keys, without any, and of no sequence."""
    problem = Paged((3, 1), (6, 0), trailing=1)
    arrays = [jnp.nan_to_num(x) for x in device(problem.unified())]

    def total(sinks: jax.Array) -> jax.Array:
        _, lse = reference.unified_attention(*arrays, attention_sink=sinks, return_lse=True)
        return jnp.sum(jnp.where(lse == -jnp.inf, 0.0, lse))

    off = jnp.array([True, False, True, False, True, True])
    sinks = jnp.where(off, -jnp.inf, 0.5)
    gradients = np.asarray(jax.grad(total)(sinks))
    np.testing.assert_array_equal(gradients[off], 0.0)
    assert (gradients[~off] > 0).all()
    np.testing.assert_allclose(gradients, jax.jacfwd(total)(sinks), rtol=1e-6)


def test_one_program_serves_all_values() -> None:
    traces = []

    @jax.jit
    def run(*arrays: jax.Array, **scales: jax.Array) -> Any:
        traces.append(1)
        return reference.unified_attention(*arrays, **scales, return_lse=True)

    for seed, (query_lens, kv_lens) in enumerate([((3, 2, 1), (9, 8, 7)), ((0, 5, 1), (2, 9, 0))]):
        problem = Paged(query_lens, kv_lens, spare_pages=1, seed=seed)
        problem.table = np.resize(problem.table, (3, 4))
        scales = {"k_scale": np.float32(0.5 + seed), "v_scale": np.float32(2 - seed)}
        padded = [np.concatenate([x, x])[:10] for x in (problem.key_cache, problem.value_cache)]
        arrays = (problem.queries, *padded, *problem.unified()[3:])
        assert_close(run(*device(arrays), **scales), oracle.unified_attention(*arrays, **scales, return_lse=True))
    assert len(traces) == 1


def test_under_vmap_scan_shard_map_and_export() -> None:
    problem = Paged((3, 2), (9, 6))
    arrays = device(problem.unified())
    expected = np.asarray(compiled("unified_attention")(*arrays))
    twice = jax.vmap(lambda q: reference.unified_attention(q, *arrays[1:]))(jnp.stack([arrays[0], arrays[0]]))
    np.testing.assert_allclose(twice[1], expected, atol=1e-6)
    _, scanned = jax.lax.scan(
        lambda carry, q: (carry, reference.unified_attention(q, *arrays[1:])), 0, jnp.stack([arrays[0], arrays[0]])
    )
    np.testing.assert_array_equal(scanned[1], expected)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    cache_spec = spec(None, None, "heads", None)
    sharded = jax.shard_map(
        reference.unified_attention,
        mesh=mesh,
        in_specs=(spec(None, "heads", None), cache_spec, cache_spec, spec(), spec(), spec()),
        out_specs=spec(None, "heads", None),
    )
    np.testing.assert_allclose(jax.jit(sharded)(*arrays), expected, atol=1e-6)
    exported = jax.export.export(jax.jit(lambda *a: reference.unified_attention(*a)), platforms=("cpu", "cuda"))(
        *arrays
    )
    np.testing.assert_array_equal(exported.call(*arrays), expected)


def test_memory_does_not_grow_with_rows_times_keys() -> None:
    """A prefill of 1024 rows over 4096 keys must not gather the keys once a row."""
    cache = jax.ShapeDtypeStruct((300, 16, 2, 64), jnp.bfloat16)
    program = (
        compiled("unified_attention")
        .lower(
            jax.ShapeDtypeStruct((1024, 8, 64), jnp.bfloat16),
            cache,
            cache,
            jax.ShapeDtypeStruct((8,), jnp.int32),
            jax.ShapeDtypeStruct((8, 256), jnp.int32),
            jax.ShapeDtypeStruct((9,), jnp.int32),
        )
        .compile()
    )
    assert program.memory_analysis().temp_size_in_bytes < 300e6


def test_twice_the_same_bits() -> None:
    arrays = device(Paged(QUERY_LENS, KV_LENS).unified())
    np.testing.assert_array_equal(compiled("unified_attention")(*arrays), compiled("unified_attention")(*arrays))
