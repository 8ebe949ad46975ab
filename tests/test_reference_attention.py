"""The pure-jnp `attention` against the float64 oracle and JAX."""

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
    assert_close,
    compiled,
    device,
    normal,
)


def dense(seed: int = 0, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        normal(rng, 2, 5, 6, 16, dtype=dtype),
        normal(rng, 2, 8, 2, 16, dtype=dtype),
        normal(rng, 2, 8, 2, 12, dtype=dtype),
    )


DENSE_RNG = np.random.default_rng(5)
DENSE_BIAS = 2 * normal(DENSE_RNG, 2, 6, 5, 8)
DENSE_MASK = DENSE_RNG.random((2, 1, 5, 8)) < 0.5
DENSE_MASK[1, :, 2] = False
DENSE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.6},
    "causal": {"causal": True},
    "window": {"sliding_window": 2},
    "window-tuple": {"sliding_window": (1, 3)},
    "window-causal": {"sliding_window": 2, "causal": True},
    "cap": {"logits_soft_cap": 0.3},
    "cap-overflow": {"logits_soft_cap": 1e-3, "softmax_scale": 50.0},
    "bias": {"bias": DENSE_BIAS},
    "bias-cap": {"bias": DENSE_BIAS, "logits_soft_cap": 0.5},
    "bias-small": {"bias": DENSE_BIAS[0, 0]},
    "bias-half": {"bias": DENSE_BIAS[:1, :, :1].astype(ml_dtypes.bfloat16)},
    "bias-hides": {"bias": np.where(DENSE_MASK, 0.5, -np.inf).astype(np.float32)},
    "mask": {"mask": DENSE_MASK},
    "mask-heads": {"mask": DENSE_RNG.random((2, 6, 5, 8)) < 0.5},
    "mask-bias": {"mask": DENSE_MASK, "bias": DENSE_BIAS},
    "sinks-one-a-head": {"softmax_aux": np.linspace(-1, 3, 6, dtype=np.float32)},
    "sinks-shared": {"softmax_aux": np.array([0.5, 1.5], np.float32)},
    "sinks-per-head": {"softmax_aux": normal(DENSE_RNG, 6, 3)},
    "sinks-mask": {"softmax_aux": normal(DENSE_RNG, 6, 3), "mask": DENSE_MASK},
    "all": {
        "softmax_aux": normal(DENSE_RNG, 6, 3),
        "mask": DENSE_MASK,
        "bias": DENSE_BIAS,
        "causal": True,
        "sliding_window": (3, 3),
        "logits_soft_cap": 1.0,
        "softmax_scale": 0.5,
    },
}


def attention(inputs: tuple[Any, ...], options: dict[str, Any], **more: Any) -> Any:
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    bias, sinks = options.pop("bias", None), options.pop("softmax_aux", None)
    data = {"mask": options.pop("mask")} if "mask" in options else {}
    if isinstance(inputs[0], np.ndarray):
        return compiled("attention", **options, **more)(*device(inputs), bias, None, sinks, **data)
    return reference.attention(*inputs, bias, None, sinks, **data, **options, **more)


def expected_attention(inputs: tuple[Any, ...], options: dict[str, Any], **more: Any) -> Any:
    options = dict(options)
    bias, sinks = options.pop("bias", None), options.pop("softmax_aux", None)
    query, key, value = inputs
    return oracle.attention(query, key, value, bias, None, sinks, **options, **more)


@pytest.mark.parametrize("case", DENSE_CASES)
def test_attention(case: str) -> None:
    inputs = dense()
    got = attention(inputs, DENSE_CASES[case], dtype=None, return_weights=True)
    assert_close(got, expected_attention(inputs, DENSE_CASES[case], return_weights=True))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_a_bias_hides_from_every_row_never_matters(poison: float) -> None:
    """A bias of -inf hides a key as a mask does; rows that it leaves none are zeros."""
    query, key, value = dense()
    bias = np.zeros((query.shape[0], 1, 1, key.shape[1]), np.float32)
    bias[0] = bias[1:, ..., 3] = -np.inf
    clean = attention((query, key, value), {"bias": bias}, dtype=None)
    key, value = key.copy(), value.copy()
    key[0] = value[0] = key[1:, 3] = value[1:, 3] = poison
    got = attention((query, key, value), {"bias": bias}, dtype=None)
    np.testing.assert_array_equal(got, clean)
    assert not np.any(got[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_attention_computes_and_answers_in_dtype(dtype: Any) -> None:
    inputs = dense()
    out, weights = attention(inputs, {"causal": True}, dtype=dtype, return_weights=True)
    assert out.dtype == weights.dtype == dtype
    assert_close((out, weights), expected_attention(inputs, {"causal": True}, dtype=dtype, return_weights=True))
    assert attention(inputs, {}).dtype == jnp.bfloat16
    assert attention(dense(dtype=np.float16), {}, dtype=None).dtype == jnp.float16


def test_attention_softmax_dtype() -> None:
    inputs = dense()
    low = attention(inputs, {}, dtype=jnp.float32, softmax_dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32
    error = np.abs(np.asarray(low) - expected_attention(inputs, {})).max()
    assert 1e-5 < error < 3e-2


def test_attention_in_float16_holds_logits_beyond_its_range() -> None:
    """Rows are shifted in float32: what counts of logits of 1e5 is how far they are apart; a bias of -1e30 is one."""
    query, key, value = dense()
    bias = np.full((1, 1, 1, key.shape[1]), -1e30, np.float32)
    for inputs, options in (((query * 1e3, key * 1e3, value), {}), ((query, key, value), {"bias": bias})):
        low = np.asarray(attention(inputs, options, dtype=jnp.float32, softmax_dtype=jnp.float16))
        np.testing.assert_allclose(low, expected_attention(inputs, options), atol=3e-3, rtol=3e-3)


def test_attention_keys_that_no_row_sees_never_matter() -> None:
    query, key, value = dense()
    query[1, 2] = np.nan
    key[0, 3], value[0, 3], key[:, 7], value[:, 7] = np.inf, np.nan, np.nan, np.inf
    mask = DENSE_MASK.copy()
    mask[0, :, :, 3] = False
    options = {"mask": mask, "sliding_window": (4, 2), "bias": DENSE_BIAS}
    assert_close(attention((query, key, value), options, dtype=None), expected_attention((query, key, value), options))


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_attention_empty_sizes(batch: int, rows: int, keys: int) -> None:
    out, weights = reference.attention(
        jnp.ones((batch, rows, 6, 16)),
        jnp.ones((batch, keys, 2, 16)),
        jnp.ones((batch, keys, 2, 12)),
        return_weights=True,
    )
    assert out.shape == (batch, rows, 6, 12)
    assert weights.shape == (batch, 6, rows, keys)
    assert not np.any(out)


def test_dropout() -> None:
    inputs = (jnp.zeros((3, 16, 4, 8)), jnp.zeros((3, 32, 2, 8)), jnp.ones((3, 32, 2, 8)))
    options = {"dropout_prob": 0.25, "dtype": None, "return_weights": True}

    def run(seed: int, **more: Any) -> Any:
        return reference.attention(*inputs, None, jax.random.key(seed), **options, **more)

    out, weights = run(0, deterministic=False)
    kept = np.asarray(weights) > 0
    np.testing.assert_allclose(np.asarray(weights)[kept], 1 / 32 / 0.75, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(out)[..., 0], np.asarray(weights).sum(-1).swapaxes(1, 2), rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.02
    flat = kept.reshape(12, -1)
    agreement = (flat[:, None] == flat[None]).mean(-1)[~np.eye(12, dtype=bool)]
    np.testing.assert_allclose(agreement, 0.75**2 + 0.25**2, atol=0.08)
    np.testing.assert_array_equal(run(0, deterministic=False)[1], weights)
    assert np.any(np.asarray(run(1, deterministic=False)[1] != weights))
    assert np.all(np.asarray(run(0)[1]) > 0)


OVERLAP: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bias": {"bias": DENSE_BIAS},
    "mask": {"mask": DENSE_MASK | np.eye(5, 8, dtype=bool)},
    "window": {"local_window_size": (2, 1)},
}
RENAMED = {"is_causal": "causal", "local_window_size": "sliding_window", "bias": "bias", "mask": "mask"}


@pytest.mark.parametrize("case", OVERLAP)
def test_attention_agrees_with_jax_in_value_and_gradient(case: str) -> None:
    query, key, value = dense()
    inputs = device((query, key, value[..., [*range(12), 0, 1, 2, 3]]))
    theirs = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in OVERLAP[case].items()}
    ours = {RENAMED[name]: x for name, x in OVERLAP[case].items()}
    weights = jnp.asarray(normal(np.random.default_rng(9), 2, 5, 6, 16))

    def our_loss(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(weights * attention(inputs, ours, dtype=None))

    def their_loss(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(weights * jax.nn.dot_product_attention(*inputs, **theirs))

    got = jax.value_and_grad(our_loss, (0, 1, 2))(*inputs)
    expected = jax.value_and_grad(their_loss, (0, 1, 2))(*inputs)
    for got_one, expected_one in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got_one, expected_one, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["mask", "bias-hides", "sinks-mask", "all", "cap"])
def test_attention_gradients(case: str) -> None:
    """Masked rows, capped scores and sinks included; rows without a key must not give NaN."""
    options = dict(DENSE_CASES[case])
    extra = {name: options.pop(name) for name in ("softmax_aux",) if name in options}
    sinks = jnp.asarray(extra["softmax_aux"]) if extra else jnp.zeros((6, 0))

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, sinks: jax.Array) -> jax.Array:
        return attention((query, key, value), {**options, "softmax_aux": sinks}, dtype=None)

    check_grads(loss, (*device(dense()), sinks), order=1, modes=["fwd", "rev"], eps=1e-2, atol=2e-2, rtol=2e-2)


def test_attention_gradients_of_unseen_poison_are_zero() -> None:
    query, key, value = dense()
    key[:, 7], value[:, 7], query[:, 4] = np.nan, np.nan, np.nan
    mask = np.ones((2, 1, 5, 8), bool)
    mask[..., 7], mask[:, :, 4] = False, False

    def loss(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attention(inputs, {"mask": mask}, dtype=None)))

    of_query, of_key, of_value = jax.grad(loss, (0, 1, 2))(*device((query, key, value)))
    assert not np.any(of_query[:, 4])
    assert not np.any(of_key[:, 7])
    assert not np.any(of_value[:, 7])
    for gradient in (of_query, of_key, of_value):
        assert np.isfinite(gradient).all()
        assert np.any(gradient)
