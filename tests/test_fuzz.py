"""Problems that nobody chose, on every implementation."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from tests import judge, strategies, tolerances
from tests.cases import OPERATIONS
from tests.implementations import FULL, MARKS, Implementation, implementations_of
from tests.inputs import build

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_implementations_match_the_oracle(operation: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(strategies.cases(operation))
    call = build(case, seed)
    truth = judge.oracle_result(call)
    largest = max(1.0, float(np.abs(truth.out).max(initial=0.0)))
    tolerances.Bound(1e-11 * largest, np.inf).check("dense form", judge.truth(call).out, truth.out)
    bounds = tolerances.calibrate(call, truth)
    for implementation in implementations_of(operation):
        if implementation.platform == "pallas" and seed % 3 and not FULL:
            continue  # every interpreted TPU kernel is a program of its own to compile
        note(str(implementation))
        _check(implementation, call, truth, bounds)
    if FULL:
        jax.clear_caches()  # the programs of hundreds of problems are more than a process can map into its memory


def _check(implementation: Implementation, call: judge.Call, truth: judge.Result, bounds: tolerances.Bounds) -> None:
    if missing := sorted(call.case.features & implementation.lacks):
        with pytest.raises(NotImplementedError, match="|".join(missing)):
            implementation(call)
        return
    bounds.check(implementation(call), truth)
