"""The matrix can fail: every planted bug moves the answer of some named case out of bounds."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from tests import judge, planted_reference
from tests.cases import OPERATIONS, Case, matrix
from tests.dense_form import Result
from tests.implementations import ON_GPU, Implementation, implementations_of
from tests.planted import WRONG_CALLS, WRONG_MATHEMATICS, cases_showing, wrong_call, wrong_mathematics

if ON_GPU:
    pytest.skip("planted bugs say nothing about a GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("small_device")

MATRIX = matrix()


def _of(operation: str) -> tuple[Case, ...]:
    return tuple(case for case in MATRIX if case.operation == operation)


def _served_by(implementation: Implementation) -> tuple[Case, ...]:
    return tuple(case for case in _of(implementation.operation) if not case.features & implementation.lacks)


def _is_caught(case: Case, got: Result) -> bool:
    _, expected, bounds = judge.problem(case)
    try:
        bounds.check(got, expected)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    ("operation", "bug"),
    [
        pytest.param(operation, bug, id=f"{operation}-{bug}")
        for operation in OPERATIONS
        for bug in WRONG_MATHEMATICS
        if cases_showing(WRONG_MATHEMATICS, bug, _of(operation))
    ],
)
def test_wrong_mathematics_is_caught(operation: str, bug: str) -> None:
    cases = cases_showing(WRONG_MATHEMATICS, bug, _of(operation))
    assert any(_is_caught(case, _answers(case, bug)) for case in cases)


def _answers(case: Case, bug: str) -> Result:
    got = wrong_mathematics(judge.problem(case)[0], bug)
    return Result(got.out, got.lse if case.return_lse else None, got.weights)


@pytest.mark.parametrize(
    ("implementation", "bug"),
    [
        pytest.param(implementation, bug, id=f"{implementation.name}-{bug}")
        for implementation in implementations_of("page_attention", "unified_attention", "attention")
        for bug in WRONG_CALLS
        if (implementation.operation != "unified_attention" or bug.startswith("qq_bias"))
        and cases_showing(WRONG_CALLS, bug, _served_by(implementation))
    ],
)
def test_wrong_call_is_caught(implementation: Implementation, bug: str) -> None:
    """An implementation that ignores or bends an argument fails in the first case that has it."""
    cases = cases_showing(WRONG_CALLS, bug, _served_by(implementation))
    smallest = min(cases, key=lambda case: (case.dtype != "float32", case.num_q_heads * case.head_dim))
    call, _, _ = judge.problem(smallest)
    assert _is_caught(smallest, implementation(wrong_call(call, bug)))


def _cases(operation: str, *names: str) -> list[Case]:
    """Named cases in float32."""
    return [case for name in names for case in _of(operation) if case.name in (f"{name}-float32", name)]


def _fails_somewhere(implementation: Implementation, cases: list[Case]) -> bool:
    return any(_is_caught(case, implementation(judge.problem(case)[0])) for case in cases)


@pytest.fixture
def fresh_traces() -> Iterator[None]:
    """Nothing traced before a bug was planted, or with it, is used again."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("fresh_traces")
@pytest.mark.parametrize("bug", planted_reference.REFERENCE_BUGS)
def test_bug_in_the_reference_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong = planted_reference.REFERENCE_BUGS[bug]
    monkeypatch.setattr(module, name, wrong)
    operation = "unified_attention" if bug == "qq_bias_transposed" else "page_attention"
    (implementation,) = (row for row in implementations_of(operation) if row.platform == "xla")
    case = {"scale_of_wrong_head": "head_scale", "cap_through_exp": "cap_huge_logits"}.get(bug, "everything")
    assert _fails_somewhere(implementation, _cases(operation, case))


KERNELS: Any = importlib.import_module("tests.planted_kernels") if importlib.util.find_spec("triton") else None
KERNEL_BUGS: dict[str, Any] = KERNELS.KERNEL_BUGS if KERNELS else {}
KERNEL_ROWS = {row.operation: row for row in implementations_of() if row.interpreted}


def _is_wrong(bug: Any) -> bool:
    return _is_caught(bug.case, KERNEL_ROWS[bug.operation](judge.problem(bug.case)[0], cfg=bug.cfg))


@pytest.mark.parametrize("name", KERNEL_BUGS)
def test_bug_in_a_kernel_is_caught(name: str, tmp_path: Path) -> None:
    with KERNELS.planted(KERNEL_BUGS[name], tmp_path):
        assert _is_wrong(KERNEL_BUGS[name])


def _distinct_problems() -> list[Any]:
    """One bug of each case and configuration."""
    return list({(bug.case, bug.cfg): bug for bug in KERNEL_BUGS.values()}.values())


@pytest.mark.parametrize("bug", _distinct_problems(), ids=lambda bug: f"{bug.operation}-{bug.case_name}-{bug.dtype}")
def test_nothing_planted_nothing_caught_in_a_kernel(bug: Any) -> None:
    assert not _is_wrong(bug)


@pytest.mark.parametrize("implementation", implementations_of("unified_attention"), ids=str)
def test_nothing_planted_nothing_caught(implementation: Implementation) -> None:
    assert not _fails_somewhere(implementation, _cases(implementation.operation, "everything"))
