"""Peers on the inputs of `bench.cases`, each timed in a process of its own.

PyTorch and JAX both want the device's memory, and vLLM's wheel registers a package called `triton_kernels`: the parent
starts `python -m bench.peers REQUEST.json`, which imports what the peer needs and nothing else. Both sides make the
same bytes from the same seeds, and outputs are compared. A peer that is not installed, and a case that it does not do,
are named in the report. `bench.torch_peers` and `bench.jax_peers` say what the peers are.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cases import AttentionCase

PEERS = {
    "fa3": "bench.torch_peers",
    "flashinfer": "bench.torch_peers",
    "pallas": "bench.jax_peers",
    "cudnn": "bench.jax_peers",
    "xla": "bench.jax_peers",
}
"""By name, the modules that hold them. Each has `serve(request, answer)`, for the peer's own process."""

START_SECONDS = 60.0  # that a peer may take beyond its time limit, to start and to end its last case


@dataclass(frozen=True)
class PeerResult:
    """Seconds a call (median, 10th and 90th percentile) and the output for argument set 0."""

    median: float
    low: float
    high: float
    output_bits: NDArray[np.int16]
    """The bits of bfloat16 `[T, Hq, D]`."""


@dataclass(frozen=True)
class PeerReport:
    """What one peer answered: results by case, errors by case, and facts about the peer itself."""

    name: str
    facts: dict[str, str]
    results: dict[str, PeerResult]
    errors: dict[str, str]


def run_peer(
    name: str,
    cases: Sequence[AttentionCase],
    pool_bytes: float,
    *,
    max_calls: int = 64,
    repeats: int = 20,
    sample_seconds: float = 0.03,
    time_limit: float = 600.0,
) -> PeerReport:
    """Time one peer in a process of its own; a failure is reported in `errors`, never raised.

    Args:
        name: one of `PEERS`.
        cases: what to time.
        pool_bytes: size of the peer's cache, K and V together; each page geometry has its own in turn.
        max_calls: calls of one group of argument sets at most, as in the JAX program.
        repeats: timed samples.
        sample_seconds: aimed length of a sample.
        time_limit: seconds after which no further case starts; some time later the process is stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "peer": name,
            "cases": [case.to_json() for case in cases],
            "pool_bytes": pool_bytes,
            "max_calls": max_calls,
            "repeats": repeats,
            "sample_seconds": sample_seconds,
            "time_limit": time_limit,
        }
        (path := Path(folder, "request.json")).write_text(json.dumps(request))
        try:
            process = subprocess.run(
                [sys.executable, "-m", "bench.peers", str(path)],
                stderr=subprocess.PIPE,
                text=True,
                timeout=time_limit + START_SECONDS,
                check=False,
            )
            failure = "" if process.returncode == 0 else f"exit {process.returncode}: {process.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            failure = f"stopped {START_SECONDS:g} s after the time limit of {time_limit:g} s"
        # The answer is rewritten after every case, so that what was measured before a failure is kept.
        answer_path = path.with_name("answer.json")
        answer = json.loads(answer_path.read_text()) if answer_path.exists() else {}
        results = {
            case: PeerResult(**timing, output_bits=np.load(path.with_name(f"{case}.npy")))
            for case, timing in answer.get("timings", {}).items()
        }
    errors = dict(answer.get("errors", {}))
    for case in cases:
        if failure and case.name not in results:
            errors.setdefault(case.name, failure)
    return PeerReport(name, answer.get("facts", {}), results, errors)


@dataclass(frozen=True)
class Request:
    """What the peer's process is asked for."""

    peer: str
    cases: list[AttentionCase]
    pool_bytes: float
    max_calls: int
    repeats: int
    sample_seconds: float
    deadline: float
    """By `time.monotonic`."""

    @classmethod
    def read(cls, path: Path) -> Request:
        started = time.monotonic()
        fields = json.loads(path.read_text())
        cases = [AttentionCase.from_json(case) for case in fields.pop("cases")]
        return cls(cases=cases, deadline=started + fields.pop("time_limit"), **fields)


class Answer:
    """What the peer's process has to say so far, stored after every case: a later failure must not lose it."""

    def __init__(self, request_path: Path) -> None:
        self._request_path = request_path
        self._content: dict[str, Any] = {"facts": {}, "timings": {}, "errors": {}}

    def add_facts(self, **facts: str) -> None:
        self._content["facts"] |= facts

    def add_error(self, case: AttentionCase, message: str) -> None:
        self._content["errors"][case.name] = message[:2000]
        self._store()

    def add_timing(
        self, case: AttentionCase, low: float, median: float, high: float, output_bits: NDArray[np.int16]
    ) -> None:
        """Keep the quantiles of the seconds a call, and the bits of the bfloat16 output for argument set 0."""
        np.save(self._request_path.with_name(f"{case.name}.npy"), output_bits)
        self._content["timings"][case.name] = {"median": median, "low": low, "high": high}
        self._store()

    def _store(self) -> None:
        (draft := self._request_path.with_name("answer.draft")).write_text(json.dumps(self._content))
        draft.replace(self._request_path.with_name("answer.json"))


def _serve(path: Path) -> None:
    """Answer one request of `run_peer`, in the peer's process."""
    request = Request.read(path)
    importlib.import_module(PEERS[request.peer]).serve(request, Answer(path))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
