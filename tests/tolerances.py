"""What an implementation may differ by: no more than the same mathematics in the input's dtype differs from the truth.

`max|out - truth| <= 2 max|low - truth| + 2 max|round(truth + 0.3 - 0.3) - truth|`, the last two operations in the
output's dtype, and the mean error likewise. `low` rounds every intermediate to that dtype. For float32, where `low` is
as exact as the result, the bound is a small multiple of `eps (sqrt(keys) + max|score|) max|value|`: sums over keys grow
like the root of their number, and the exponential turns the rounding of a score into a relative error of its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests import dense_form
from tests.dense_form import Result
from tests.inputs import Call
from tests.poison import Array, numpy_dtype

FLOAT32_MULTIPLE = 4.0
LSE_ABSOLUTE = 1e-5


@dataclass(frozen=True)
class Bound:
    """Largest and mean absolute difference allowed."""

    largest: float
    mean: float

    def check(self, name: str, got: Array, expected: Array) -> None:
        """Raises AssertionError where `got` is further from `expected` than allowed; equal infinities agree."""
        if got.shape != expected.shape:
            raise AssertionError(f"{name}: shape {got.shape}, expected {expected.shape}")
        if got.size == 0:
            return
        if np.isnan(got).any():
            where = np.argwhere(np.isnan(got))
            raise AssertionError(f"{name}: {len(where)} of {got.size} values are NaN, the first at {tuple(where[0])}")
        if not np.array_equal(np.isinf(got), np.isinf(expected)):
            where = np.argwhere(np.isinf(got) != np.isinf(expected))[0]
            raise AssertionError(f"{name}: {got[tuple(where)]} at {tuple(where)}, expected {expected[tuple(where)]}")
        with np.errstate(invalid="ignore"):
            error = np.where(got == expected, 0.0, np.abs(got - expected))
        worst = np.unravel_index(error.argmax(), error.shape)
        if error[worst] > self.largest:
            raise AssertionError(
                f"{name}: largest error {error[worst]:.3g} > {self.largest:.3g} at {tuple(map(int, worst))}: "
                f"{got[worst]:.6g}, expected {expected[worst]:.6g}"
            )
        if error.mean() > self.mean:
            raise AssertionError(f"{name}: mean error {error.mean():.3g} > {self.mean:.3g}")


@dataclass(frozen=True)
class Bounds:
    """Bounds for each answer of a call."""

    out: Bound
    lse: Bound
    weights: Bound

    def check(self, got: Result, expected: Result) -> None:
        self.out.check("out", got.out, expected.out)
        for name, bound in (("lse", self.lse), ("weights", self.weights)):
            theirs, ours = getattr(got, name), getattr(expected, name)
            if (theirs is None) != (ours is None):
                raise AssertionError(f"{name}: {'absent' if theirs is None else 'present'}, expected the opposite")
            if ours is not None:
                bound.check(name, theirs, ours)


def rounding_floor(expected: Array, dtype: str) -> Array:
    """How much the output's dtype alone may move each value: rounded after a trip through a neighbouring binade."""
    target = numpy_dtype(dtype)
    shift = np.asarray(0.3, target)
    there_and_back = (expected.astype(target) + shift).astype(target) - shift
    return np.abs(there_and_back.astype(np.float64) - expected)


def calibrate(call: Call, expected: Result) -> Bounds:
    """The bounds of a call whose exact answer is `expected`."""
    if call.case.dtype == "float32":
        return _float32_bounds(call)
    low = dense_form.evaluate(call, dense_form.rounding_to(call.case.dtype))
    lse_error = 0.0
    if low.lse is not None and expected.lse is not None:
        lse_error = _largest(np.abs(_finite(low.lse) - _finite(expected.lse)))
    return Bounds(
        out=_low_bound(low.out, expected.out, call.case.dtype),
        lse=Bound(2 * lse_error + LSE_ABSOLUTE, np.inf),
        weights=_low_bound(low.weights, expected.weights, call.case.dtype),
    )


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)


def _largest(values: Array) -> float:
    return float(values.max(initial=0.0))


def _low_bound(low: Array | None, expected: Array | None, dtype: str) -> Bound:
    if low is None or expected is None or expected.size == 0:
        return Bound(0.0, 0.0)
    error, floor = np.abs(low - expected), rounding_floor(expected, dtype)
    return Bound(2 * _largest(error) + 2 * _largest(floor), 2 * float(error.mean()) + 2 * float(floor.mean()))


def _float32_bounds(call: Call) -> Bounds:
    epsilon = float(np.finfo(np.float32).eps)
    largest_score, largest_value, largest_lse, most_keys = 0.0, 0.0, 0.0, 0
    for sequence in dense_form.sequences(call):
        logits = dense_form.scores(sequence)
        largest_score = max(largest_score, _largest(np.abs(_finite(logits))), _score_before_cap(sequence))
        largest_value = max(largest_value, _largest(np.abs(sequence.value * sequence.v_scale[:, None])))
        largest_lse = max(largest_lse, _largest(np.abs(_finite(dense_form.softmax(logits, sequence.sinks)[1]))))
        most_keys = max(most_keys, len(sequence.key))
    relative = FLOAT32_MULTIPLE * epsilon * (np.sqrt(most_keys) + largest_score)
    out = relative * largest_value
    lse = LSE_ABSOLUTE + FLOAT32_MULTIPLE * epsilon * (largest_score + largest_lse)
    return Bounds(Bound(out, out), Bound(lse, lse), Bound(relative, relative))


def _score_before_cap(sequence: dense_form.Sequence) -> float:
    """The largest logit that a cap flattens: its rounding passes through the cap where the slope is near one."""
    if sequence.soft_cap is None:
        return 0.0
    lengths = np.abs(sequence.query).max(initial=0.0) * np.abs(sequence.key * sequence.k_scale[:, None]).max(
        initial=0.0
    )
    return float(sequence.softmax_scale * lengths * np.sqrt(sequence.query.shape[-1]))
