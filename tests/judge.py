"""The verdict on an answer: the float64 truth of a call and the bounds around it."""

from __future__ import annotations

import functools
from typing import Any

from tests import dense_form, oracle, tolerances
from tests.cases import Case
from tests.dense_form import Result
from tests.implementations import rows_of
from tests.inputs import Call, build

HINTS = frozenset({"num_splits", "max_context_len", "dtype"})
"""Options that the oracle is not given: they cannot change a result, or the inputs have that dtype already."""


def oracle_result(call: Call) -> Result:
    """What `oracle` answers, as rows. Slow: plain loops."""
    keywords: dict[str, Any] = {name: value for name, value in call.options.items() if name not in HINTS}
    keywords |= {name: value for name, value in call.keyword_arrays().items() if not name.endswith("segment_ids")}
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
