"""The pure-jnp operations over pages against the float64 oracle: what they share, one token, one chunk."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from tests.reference_problems import (
    BYTE_DTYPES,
    KV_LENS,
    QUERY_LENS,
    Paged,
    check,
    compiled,
    device,
    first_seen,
)


@pytest.mark.parametrize(
    ("name", "cache_dtype", "per_head"),
    [("unified_attention", dtype, per_head) for dtype in BYTE_DTYPES for per_head in (False, True)]
    + [("page_attention", jnp.int8, True), ("prefill_page_attention", jnp.float8_e4m3fn, True)],
)
def test_byte_caches(name: str, cache_dtype: Any, per_head: bool) -> None:
    if name == "unified_attention":
        problem = Paged(QUERY_LENS, KV_LENS, cache_dtype=cache_dtype, trailing=1)
        arrays = problem.unified()
    elif name == "page_attention":
        problem = Paged((1, 1), (9, 6), cache_dtype=cache_dtype)
        arrays = problem.page()
    else:
        problem = Paged((5,), (9,), cache_dtype=cache_dtype)
        arrays = problem.prefill()
    scales = {"k_scale": np.array([0.3, 0.05], np.float32), "v_scale": np.array([0.02, 1.7], np.float32)}
    if not per_head:
        scales = {key: scale[0] for key, scale in scales.items()}
    check(name, arrays, kv_layout="PTHD", **scales)


@pytest.mark.parametrize("scale", [np.float32(0.3), np.array([0.3], np.float32)])
def test_scales_of_one_element(scale: Any) -> None:
    check("prefill_page_attention", Paged((2,), (9,)).prefill(), kv_layout="PTHD", k_scale=scale, v_scale=2 * scale)


PAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"attn_scale": 0.9},
    "cap": {"attn_logits_soft_cap": 0.4},
    "window": {"sliding_window": 5},
    "window-tuple": {"sliding_window": (4, 9)},
    "all": {
        "attn_logits_soft_cap": 1.0,
        "sliding_window": 5,
        "attention_sink": np.linspace(-2, 3, 6, dtype=np.float32),
        "alibi_slopes": np.linspace(0.1, 1, 6, dtype=np.float32),
    },
}


@pytest.mark.parametrize(
    ("options", "kv_layout"), [*((name, "PHTD") for name in PAGE_OPTIONS), ("all", "PTHD"), ("all", "HPTD")]
)
def test_page(options: str, kv_layout: str) -> None:
    lengths = (1, 23, 0, 8, 5)
    left = 4 if "window" in options or options == "all" else 99
    seen = first_seen((1,) * 5, lengths, left)
    problem = Paged((1,) * 5, lengths, kv_layout=kv_layout, first_seen=seen)
    got = check("page_attention", problem.page(), kv_layout=kv_layout, **PAGE_OPTIONS[options])
    assert np.all(np.asarray(got[0])[2] == 0)


@pytest.mark.parametrize("context", [11, 4])
@pytest.mark.parametrize(
    ("options", "kv_layout"), [*((name, "HPTD") for name in PAGE_OPTIONS), ("all", "PTHD"), ("all", "PHTD")]
)
def test_prefill(options: str, kv_layout: str, context: int) -> None:
    keywords = dict(PAGE_OPTIONS[options])
    if "attn_scale" in keywords:
        keywords["softmax_scale"] = keywords.pop("attn_scale")
    left = 4 if "window" in options or options == "all" else 99
    problem = Paged((9,), (context,), kv_layout=kv_layout, first_seen=first_seen((9,), (context,), left))
    check("prefill_page_attention", problem.prefill(), kv_layout=kv_layout, **keywords)


def test_prefill_takes_a_scalar_length() -> None:
    query, key_cache, value_cache, lengths, table = device(Paged((3,), (8,)).prefill())
    run = functools.partial(reference.prefill_page_attention, query, key_cache, value_cache, kv_layout="PTHD")
    np.testing.assert_array_equal(run(lengths[0], table), run(lengths, table))


@pytest.mark.parametrize("return_lse", [False, True])
def test_empty_sizes(return_lse: bool) -> None:
    def shapes(result: Any) -> list[tuple[int, ...]]:
        return [x.shape for x in jax.tree.leaves(result)]

    cache = jnp.full((3, 4, 2, 16), jnp.nan)
    values = jnp.full((3, 4, 2, 24), jnp.nan)
    lens, table, starts = jnp.zeros(0, jnp.int32), jnp.zeros((0, 5), jnp.int32), jnp.zeros(1, jnp.int32)
    query = jnp.ones((4, 6, 16))
    unified = functools.partial(reference.unified_attention, return_lse=return_lse)
    assert shapes(unified(query, cache, values, lens, table, starts)) == [(4, 6, 24), (4, 6)][: 1 + return_lse]
    assert not np.any(unified(query, cache, values, lens, table, starts)[0])
    assert shapes(unified(query[:0], cache, values, lens, table, starts)) == [(0, 6, 24), (0, 6)][: 1 + return_lse]
    two = (jnp.array([3, 4]), jnp.zeros((2, 5), jnp.int32), jnp.zeros(3, jnp.int32))
    assert shapes(unified(query[:0], cache, values, *two)) == [(0, 6, 24), (0, 6)][: 1 + return_lse]
    nothing = (jnp.array([3, 4]), jnp.zeros((2, 0), jnp.int32), jnp.array([0, 2, 4]))
    assert not np.any(jax.tree.leaves(unified(query, cache, cache, *nothing))[0])
    assert not np.any(jax.tree.leaves(unified(query, cache[:0], cache[:0], *two[:2], nothing[2]))[0])
    page = reference.page_attention(query[:0], cache, cache, lens, table, kv_layout="PTHD", return_lse=return_lse)
    assert shapes(page) == [(0, 6, 16), (0, 6)][: 1 + return_lse]
    chunk = reference.prefill_page_attention(
        query[:0], cache, cache, jnp.array([3]), two[1][0], kv_layout="PTHD", return_lse=return_lse
    )
    assert shapes(chunk) == [(0, 6, 16), (0, 6)][: 1 + return_lse]
    dense = jnp.zeros((0, 9, 2, 16))
    ragged = reference.ragged_decode_attention(query[:0], dense, dense, lens, lens, return_lse=return_lse)
    assert shapes(ragged) == [(0, 6, 16), (0, 6)][: 1 + return_lse]
    short = reference.ragged_decode_attention(
        query,
        jnp.zeros((4, 0, 2, 16)),
        jnp.zeros((4, 0, 2, 16)),
        *(jnp.zeros(4, jnp.int32),) * 2,
        return_lse=return_lse,
    )
    assert not np.any(jax.tree.leaves(short)[0])


def test_one_token_is_the_same_in_every_paged_operation() -> None:
    problem = Paged((1,), (13,))
    query, key_cache, value_cache, lengths, table = device(problem.prefill())
    prefill = reference.prefill_page_attention(query, key_cache, value_cache, lengths, table, kv_layout="PTHD")
    page = reference.page_attention(query, key_cache, value_cache, lengths, table[None], kv_layout="PTHD")
    unified = compiled("unified_attention")(*device(problem.unified()))
    np.testing.assert_array_equal(prefill, page)
    np.testing.assert_array_equal(prefill, unified)
