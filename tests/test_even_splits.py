"""Row tiles cut by themselves, as the kernel for Hopper has them: here by kernels that the interpreter knows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jax_bridge import paged_heuristics, paged_launch
from jax_bridge.device import target_device
from jax_bridge.paged_launch import RowClass, Work
from tests import judge
from tests.cases import Case
from tests.implementations import HAS_KERNEL, ON_GPU, SMALL_DEVICE, kernel_of, small_tiles

pytestmark = pytest.mark.skipif(
    ON_GPU or not HAS_KERNEL, reason="of the kernels on GPUs, only the one for Hopper cuts so: test_hopper.py"
)

OPERATION = "unified_attention"
DECODES = Case(
    name="even_splits",
    operation=OPERATION,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    dtype="float32",
    query_lens=(1,) * 5,
    kv_lens=(400, 33, 0, 130, 64),
    return_lse=True,
)
CASES = {
    "one_long": DECODES,
    "equal": DECODES.replace(kv_lens=(96,) * 5),
    "all_that_may_be_cut": DECODES.replace(query_lens=(1, 1), kv_lens=(48, 48)),  # three tiles in two, of four shares
    "many_small_tiles": DECODES.replace(dtype="bfloat16", num_kv_heads=1, query_lens=(1, 64), kv_lens=(1, 400)),
    "window": DECODES.replace(window=90),
    "sinks": DECODES.replace(sinks=1),
    "mixed": DECODES.replace(dtype="bfloat16", query_lens=(1, 40, 1, 2, 17), kv_lens=(300, 150, 20, 64, 17)),
    "padding": DECODES.replace(dtype="bfloat16", query_lens=(1, 40, 1), kv_lens=(300, 150, 20), leading_rows=3),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer does not depend on how the batch is cut, and here it is cut."""
    works: list[Work] = []
    classes_of, bounds_of = paged_heuristics.unified_attention_classes, paged_launch.work_bounds

    def cut_evenly(*arguments: Any) -> tuple[RowClass, ...]:
        """The classes, each row tile of which may be cut between any two KV tiles."""
        return tuple(
            dataclasses.replace(rows, even_splits=True, shares_per_program=0, min_tiles=1, num_splits=0)
            for rows in classes_of(*arguments)
        )

    def record(*arguments: Any) -> Work:
        works.append(bounds_of(*arguments))
        return works[-1]

    monkeypatch.setattr(paged_heuristics, "unified_attention_classes", cut_evenly)
    monkeypatch.setattr(paged_launch, "work_bounds", record)
    call, expected, bounds = judge.problem(CASES[name])
    with target_device(SMALL_DEVICE):  # with as few shares, most splits are of several KV tiles
        bounds.check(kernel_of(OPERATION)(call, cfg=small_tiles(OPERATION)), expected)
    assert all(work.even_shares > 0 and work.splits > 1 for work in works)
    assert len(works) == (1 if max(call.case.query_lens) == 1 else 2)
