"""Biases, sinks and caps near the ends of float32 are finite numbers, and no kernel makes NaN of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jax_bridge import unified_attention
from tests.implementations import MARKS, Implementation, implementations_of

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]

LARGEST = float(np.finfo(np.float32).max)
SMALLEST_HELD = 2.3e38  # kernels count in base 2, where logits end earlier

on_every_platform = pytest.mark.parametrize("implementation", implementations_of("unified_attention"), ids=str)


def attend(implementation: Implementation, kv_len: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two rows over the first tokens of a page, all of score 0, with values 1, 2, 3, 4: `[2]` outputs and LSEs."""
    values = np.repeat(np.arange(1.0, 5.0, dtype=np.float32), 16).reshape(1, 4, 1, 16)
    arrays = (np.zeros((2, 1, 16), np.float32), np.zeros_like(values), values)
    indices = (np.array([kv_len]), np.zeros((1, 1), np.int32), np.array([0, 2]))
    answers = unified_attention(*arrays, *indices, platform=implementation.platform, return_lse=True, **options)
    out, lse = (np.asarray(answer) for answer in answers)
    return out[:, 0, 0], lse[:, 0]


@on_every_platform
@pytest.mark.parametrize("bias", [-LARGEST, -2.4e38, -1e30, 1e30, 2.4e38, LARGEST])
def test_biases_are_finite(implementation: Implementation, bias: float) -> None:
    out, lse = attend(implementation, 2, qq_bias=np.full((2, 2), bias, np.float32))
    np.testing.assert_array_equal(out, [1.0, 1.5])
    assert np.isfinite(lse).all()
    assert (lse * np.sign(bias) >= min(SMALLEST_HELD, 0.99 * abs(bias))).all()


@on_every_platform
@pytest.mark.parametrize("sink", [-LARGEST, -2.4e38, -1e30])
def test_sinks_far_below_every_score_are_off(implementation: Implementation, sink: float) -> None:
    sinks = np.full(1, sink, np.float32)
    out, lse = attend(implementation, 2, attention_sink=sinks)
    np.testing.assert_array_equal(out, [1.0, 1.5])
    np.testing.assert_allclose(lse, np.log([1.0, 2.0]), atol=1e-6)
    out, lse = attend(implementation, 0, attention_sink=sinks)  # no keys, but a sink: not the LSE of an empty row
    np.testing.assert_array_equal(out, 0.0)
    assert np.isfinite(lse).all()
    assert (lse <= max(-SMALLEST_HELD, 0.99 * sink)).all()


@on_every_platform
@pytest.mark.parametrize("kv_len", [0, 2])
@pytest.mark.parametrize("sink", [1e30, 2.4e38, LARGEST])
def test_sinks_far_above_every_score_take_all(implementation: Implementation, sink: float, kv_len: int) -> None:
    out, lse = attend(implementation, kv_len, attention_sink=np.full(1, sink, np.float32))
    np.testing.assert_array_equal(out, 0.0)
    assert np.isfinite(lse).all()
    assert (lse >= min(SMALLEST_HELD, 0.99 * sink)).all()


@on_every_platform
@pytest.mark.parametrize(("cap", "of_largest"), [(1e20, 0.5), (1e30, 0.5), (9e35, 0.5), (None, 0.0)])
def test_caps_hold_whatever_their_size(implementation: Implementation, cap: float | None, of_largest: float) -> None:
    """Scores of 6.4e37 and 3.2e37 are the same under a cap, and 2^124 apart without one."""
    query = np.full((1, 1, 16), 2e18, np.float32)
    keys, values = np.empty((2, 1, 2, 1, 16), np.float32)
    keys[0, :, 0], values[0, :, 0] = [[2e18], [1e18]], [[0.0], [1.0]]
    arrays = (query, keys, values, np.array([2]), np.zeros((1, 1), np.int32), np.array([0, 1]))
    options = {"softmax_scale": 1.0, "logits_soft_cap": cap, "platform": implementation.platform}
    out = np.asarray(unified_attention(*arrays, **options))
    np.testing.assert_allclose(out, of_largest, rtol=1e-6)
