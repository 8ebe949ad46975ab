"""Programs around the kernels, compiled by XLA for an H100: what calls change in place stays what the program meant."""

from __future__ import annotations

import re

import pytest

from tests import gpu_xla
from tests.gpu_programs import PROGRAMS, UNGUARDED

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        not gpu_xla.is_available(), reason="needs jax-cuda13-pjrt, which `make set-up` installs on Linux x86_64"
    ),
]

IN_PLACE = [name for name, program in PROGRAMS.items() if program.cache_shape]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_fusion_swallows_what_a_launch_changes(name: str) -> None:
    """XLA fuses slices with calls, and such a fusion forgets that a call changes its operands in place."""
    compiled = gpu_xla.compiled(name)
    assert len(compiled.launches) == PROGRAMS[name].launches
    assert len(compiled.updating) == PROGRAMS[name].updating
    assert [launch.text for launch in compiled.fused_updating] == []


@pytest.mark.parametrize("name", UNGUARDED)
def test_such_fusions_are_there_without_barriers(name: str) -> None:
    compiled = gpu_xla.compiled(name, with_barriers=False)
    assert len(compiled.updating) >= PROGRAMS[name].updating  # XLA may launch one again, fused with another slice
    assert compiled.fused_updating, (
        "without barriers XLA no longer fuses slices with calls that change operands in place: if that is a new XLA, "
        "`_not_slices` of jax_bridge/launch.py can go, and these tests with it; else they no longer test anything"
    )


@pytest.mark.parametrize("name", IN_PLACE)
def test_donated_caches_are_written_in_place(name: str) -> None:
    """They are the program's results, and nothing makes another array of their shape."""
    compiled = gpu_xla.compiled(name)
    assert re.search(r"input_output_alias=\{ \{0\}: \(0, .*\{1\}: \(1, ", compiled.header)
    shape = PROGRAMS[name].cache_shape
    assert shape is not None
    assert compiled.makers(shape) == []
