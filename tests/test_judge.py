"""The judge is right and can say no: two truths agree, bounds are tight, every feature of every case counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import dense_form, judge, tolerances
from tests.cases import CASES, QUANTISED_CASES, Case, matrix
from tests.inputs import Call, build


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{case.operation}-{case.name}") for case in (*CASES, *QUANTISED_CASES)]
)
def test_dense_form_is_the_oracle(case: Case) -> None:
    """What the matrix compares with is what the independent loops of the oracle compute."""
    call = build(case)
    mine, theirs = judge.truth(call), judge.oracle_result(call)
    size = max(1.0, np.abs(mine.out).max(initial=0.0))
    tolerances.Bound(1e-12 * size, np.inf).check("out", mine.out, theirs.out)
    if mine.lse is not None and theirs.lse is not None:
        tolerances.Bound(1e-10, np.inf).check("lse", mine.lse, theirs.lse)
    if mine.weights is not None and theirs.weights is not None:
        tolerances.Bound(1e-12, np.inf).check("weights", mine.weights, theirs.weights)


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.operation}-{case.name}") for case in matrix(full=True)])
def test_bounds_are_tight(case: Case) -> None:
    """A bound that lets half an ordinary value pass would judge nothing."""
    call, expected, bounds = judge.problem(case)
    values = max(
        [float(np.abs(s.value * s.v_scale[:, None]).max(initial=0.0)) for s in dense_form.sequences(call)], default=0.0
    )
    assert bounds.out.largest <= (0.5 if case.negative_logits else 0.1) * values
    assert np.abs(expected.out).max(initial=0.0) > bounds.out.largest or not expected.out.any()


SWITCHES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "attn_logits_soft_cap": ({"soft_cap": None}, ()),
    "logits_soft_cap": ({"soft_cap": None}, ()),
    "sliding_window": ({"window": None}, ()),
    "causal": ({"causal": True}, ()),
    "attention_sink": ({"sinks": 0}, ("attention_sink",)),
    "softmax_aux": ({"sinks": 0}, ("softmax_aux",)),
    "alibi_slopes": ({"alibi": False}, ("alibi_slopes",)),
    "qq_bias": ({"qq_bias": 0}, ("qq_bias",)),
    "bias": ({"bias": None}, ("bias",)),
    "mask_info": ({"mask": "none"}, ("mask",)),
    "k_scale": ({}, ("k_scale",)),
    "v_scale": ({}, ("v_scale",)),
}
"""What turns a feature off: fields of the case and arrays of the call."""


def _without(call: Call, feature: str) -> Call:
    fields, arrays = SWITCHES[feature]
    return Call(call.case.replace(**fields), {**call.arrays, **dict.fromkeys(arrays)}, call.options)


BEYOND = "cap_beyond_logits"


@pytest.mark.parametrize(
    ("case", "feature"),
    [
        pytest.param(case, feature, id=f"{case.operation}-{case.name}-{feature}")
        for case in (*CASES, *QUANTISED_CASES)
        for feature in sorted(case.features & SWITCHES.keys())
        if not (case.name == BEYOND and "soft_cap" in feature)
    ],
)
def test_feature_matters(case: Case, feature: str) -> None:
    """Ignoring any feature of any named case moves its answer out of bounds."""
    call = build(case, poisoned=False)
    expected = judge.truth(call)
    with pytest.raises(AssertionError):
        tolerances.calibrate(call, expected).check(judge.truth(_without(call, feature)), expected)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.operation) for case in CASES if case.name == BEYOND])
def test_cap_beyond_logits_is_no_cap(case: Case) -> None:
    """Those caps are there for what they round away in a kernel: they change no answer by more than bounds allow."""
    call = build(case, poisoned=False)
    expected = judge.truth(call)
    (feature,) = (name for name in case.features if "soft_cap" in name)
    tolerances.calibrate(call, expected).check(judge.truth(_without(call, feature)), expected)
