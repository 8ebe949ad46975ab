"""The verdict on an answer: the float64 truth of a call and the bounds around it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tests import dense_form, oracle, tolerances
from tests.cases import Case
from tests.dense_form import Result
from tests.implementations import rows_of
from tests.inputs import Call, build
from tests.poison import Array

HINTS = frozenset({"num_splits", "max_context_len", "dtype"})
"""Options that the oracle is not given: they cannot change a result, or the inputs have that dtype already."""


def oracle_result(call: Call) -> Result:
    """What `oracle` answers, as rows. Slow: plain loops."""
    keywords: dict[str, Any] = {name: value for name, value in call.options.items() if name not in HINTS}
    masked_by = ("q_segment_ids", "kv_segment_ids", "key_lengths")  # the oracle is given the mask
    keywords |= {name: value for name, value in call.keyword_arrays().items() if name not in masked_by}
    answer = getattr(oracle, call.operation)(*call.positional(), **keywords)
    return rows_of(call, *(answer if isinstance(answer, tuple) else (answer,)))


def truth(call: Call) -> Result:
    """The dense form in float64, with the answers that the call asks for."""
    exact = dense_form.evaluate(call)
    return Result(exact.out, exact.lse if call.case.return_lse else None, exact.weights)


@functools.lru_cache(maxsize=256)
def problem(case: Case) -> tuple[Call, Result, tolerances.Bounds]:
    """Inputs, truth and bounds of a named case."""
    call = build(case)
    expected = truth(call)
    return call, expected, tolerances.calibrate(call, expected)


def check(call: Call, got: Result) -> None:
    """Raises AssertionError where an answer is further from the truth than its dtype excuses."""
    expected = truth(call)
    tolerances.calibrate(call, expected).check(got, expected)


def bits(answer: Any) -> list[Array]:
    """The parts of an answer as unsigned integers: NaN equals itself, -0 differs from 0."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    return [np.ascontiguousarray(part).view(f"uint{8 * np.asarray(part).itemsize}") for part in parts]


def same_bits(first: Any, second: Any) -> bool:
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(bits(first), bits(second), strict=True))


def check_close(call: Call, got: Result, expected: Result) -> None:
    """Two answers of the implementation to one call: each may be off by the bound."""
    bounds = tolerances.calibrate(call, truth(call))
    for name in ("out", "lse"):
        bound = getattr(bounds, name)
        mine, theirs = getattr(got, name), getattr(expected, name)
        if theirs is not None:
            tolerances.Bound(2 * bound.largest, np.inf).check(name, mine, theirs)
