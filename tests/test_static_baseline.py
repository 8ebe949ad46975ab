"""No kernel compiles to something worse than what the stored baseline says; `make baseline` stores a new one."""

from __future__ import annotations

import pytest

import jax_bridge
from bench import static

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
@pytest.mark.parametrize("call", static.CALLS)
def test_kernels_got_no_worse(call: str, architecture: str) -> None:
    name = f"{call}-{architecture}"
    worse = static.regressions(name, static.compile_call(call, architecture), static.read_baseline()[name])
    assert not worse, "\n".join(["worse than bench/baselines/static.json (make baseline accepts it):", *worse])


@pytest.mark.parametrize(
    ("call", "fields", "figure"),
    [
        ("prompt-int8", {"num_stages": 1}, "depth"),
        ("prompt-int8", {"skip_masks": False}, "skipping_loops"),
        ("prompt-int8", {"num_warps": 4}, "registers"),
        ("prompt", {"warp_specialized": True, "num_stages": 1}, "depth"),
        ("prompt", {"warp_specialized": False}, "launches"),
    ],
    ids=str,
)
def test_a_planted_slowdown_is_noticed(call: str, fields: dict[str, int], figure: str) -> None:
    """One pipeline stage, masks on every tile, half the warps, another kernel."""
    found = static.compile_call(call, "sm_90", jax_bridge.UnifiedAttentionConfig(**fields))
    worse = static.regressions(f"{call}-sm_90", found, static.read_baseline()[f"{call}-sm_90"])
    assert any(figure in line for line in worse)


def test_another_set_of_kernels_is_noticed() -> None:
    stored = static.read_baseline()["prompt-sm_90"]
    assert static.regressions("prompt", {}, stored)
    assert not static.regressions("prompt", stored, stored)


def test_a_new_figure_is_no_error() -> None:
    stored = static.read_baseline()["prompt-sm_90"]
    before = {name: {k: v for k, v in values.items() if k != "stack"} for name, values in stored.items()}
    (line,) = static.regressions("prompt", stored, before)
    assert line.endswith("the baseline has none")
