"""Pallas's TPU interpreter at its strictest, and what it only prints as errors.

Reads out of bounds raise, memory starts as NaN, and races between copies and computing are looked for. The two ways to
run a copy, when it is started or when it is waited for, hide different mistakes: half of the calls run in either.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

from jax.experimental.pallas import tpu as pltpu

Mode = Literal["eager", "on_wait"]
MODES: tuple[Mode, Mode] = ("on_wait", "eager")


def mode_of(call: object) -> Mode:
    """One of the two, always the same for the same call."""
    return MODES[zlib.crc32(repr(call).encode()) % 2]


_chosen: ContextVar[dict[str, Any]] = ContextVar("chosen", default={})  # noqa: B039


def in_mode(mode: Mode, num_cores: int = 1) -> contextlib.AbstractContextManager[None]:
    """Calls inside run their copies when `mode` says, on so many cores at once."""
    return _choosing({"dma_execution_mode": mode, "num_cores_or_threads": num_cores})


@contextlib.contextmanager
def _choosing(parameters: dict[str, Any]) -> Iterator[None]:
    token = _chosen.set(parameters)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def strict(mode: Mode) -> Iterator[None]:
    """Kernels are interpreted strictly inside, one at a time: their answers must be ready when the context is left.

    Raises:
        AssertionError: a race, or a semaphore that was signalled and not waited for.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    parameters = pltpu.InterpretParams(
        detect_races=True,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
        **({"dma_execution_mode": mode} | _chosen.get()),
    )
    printed = io.StringIO()
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with pltpu.force_tpu_interpret_mode(parameters), contextlib.redirect_stdout(printed):
            yield
        if interpreter.races is not None and interpreter.races.races_found:
            raise AssertionError(f"a race: {printed.getvalue()}")
        if "non-zero count" in printed.getvalue():
            raise AssertionError(printed.getvalue())
    finally:
        pltpu.reset_tpu_interpret_mode_state()
