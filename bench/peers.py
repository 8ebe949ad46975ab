"""Peers on the inputs of `bench.cases`, each timed in a process of its own.

PyTorch and JAX both want the device's memory, and vLLM's wheel registers a package called `triton_kernels`: the parent
starts `python -m bench.peers REQUEST.json`, which imports neither JAX nor this project's kernels.

FlashAttention-3 comes from the shared library that the environment variable `FA3_LIBRARY` names, the
`_vllm_fa3_C` extension of a vLLM wheel. Its calls are captured into one CUDA graph over a rotation of page tables; its
scheduler metadata is computed beforehand, outside the timed region, as vLLM does once for all layers of a step. Causal
masks are aligned at the bottom right, as ours are. Cases with sinks are left out.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cases import (
    KEY_SALT,
    VALUE_SALT,
    ArgumentSet,
    AttentionCase,
    argument_sets,
    by_geometry,
    num_pool_pages,
    scramble,
)

PEERS = ("fa3",)
FILL_ELEMENTS = 1 << 24  # of a cache, built at a time: int64 temporaries of a larger piece would take gigabytes
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
        cases: what to time; those with sinks are left out.
        pool_bytes: size of the peer's cache, K and V together; each page geometry has its own in turn.
        max_calls: calls of one group of argument sets at most, as in the JAX program.
        repeats: timed samples.
        sample_seconds: aimed length of a sample.
        time_limit: seconds after which no further case starts; some time later the process is stopped.
    """
    cases = [case for case in cases if not case.sinks]
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
class Fa3Masks:
    """What FlashAttention-3 calls the causal mask, the window and the soft cap of a case."""

    is_causal: bool
    window_left: int
    window_right: int
    soft_cap: float

    @classmethod
    def of(cls, case: AttentionCase) -> Fa3Masks:
        left, right = (-1, -1) if case.window is None else (case.window - 1, 0)
        return cls(True, left, right, case.soft_cap or 0.0)


def fa3_forward_arguments(
    query: Any,  # [T, Hq, D]
    key_cache: Any,  # [P, ps, Hkv, D]
    value_cache: Any,  # [P, ps, Hkv, D]
    out: Any,  # [T, Hq, D]
    cu_seqlens_q: Any,  # int32 [S + 1]
    lengths: Any,  # int32 [S]
    max_query_len: int,
    max_length: int,
    block_tables: Any,  # int32 [S, MP]
    masks: Fa3Masks,
    scheduler_metadata: Any,
) -> tuple[Any, ...]:
    """The positional arguments of `torch.ops._vllm_fa3_C.fwd` for one step over a paged cache."""
    new_keys = (None, None, None)  # k_new, v_new, q_v
    seqlens = (cu_seqlens_q, None, None, None, lengths, max_query_len, max_length)  # ..., cu_k, cu_k_new, used_q, ...
    paging = (block_tables, None, None)  # page_table, kv_batch_idx, leftpad_k
    rotary_and_descale = (None,) * 6  # rotary cos, sin, seqlens; q, k, v descale
    scores = (query.shape[-1] ** -0.5, masks.is_causal, masks.window_left, masks.window_right, masks.soft_cap, True)
    schedule = (scheduler_metadata, 0, None, 0)  # num_splits 0 chooses; pack_gqa, sm_margin
    context_parallel = (None, 1, 0, None)  # sinks; world size, rank, total seqused_k
    return (
        *(query, key_cache, value_cache, *new_keys, out),
        *(*seqlens, *paging, *rotary_and_descale, *scores, *schedule, *context_parallel),
    )


def fa3_metadata_arguments(
    case: AttentionCase,
    masks: Fa3Masks,
    dtype: Any,
    lengths: Any,  # int32 [S]
    cu_seqlens_q: Any,  # int32 [S + 1]
) -> tuple[Any, ...]:
    """The positional arguments of `torch.ops._vllm_fa3_C.get_scheduler_metadata` for the same step."""
    return (
        *(case.num_seqs, max(case.query_lens), max(case.lengths)),
        *(case.num_q_heads, case.num_kv_heads, case.head_dim, case.head_dim),
        *(dtype, lengths, cu_seqlens_q, None, None, None, None, case.page_size, 0),  # ..., no new keys
        *(masks.is_causal, masks.window_left, masks.window_right, masks.soft_cap > 0),
        *(0, None, 0),  # num_splits, pack_gqa, sm_margin
    )


def _fill_cache(torch: Any, case: AttentionCase, pages: int, salt: int) -> Any:
    """A cache `[P, ps, Hkv, D]` with the contents that `bench.runner` builds."""
    shape = (case.page_size, case.num_kv_heads, case.head_dim)
    cache = torch.empty((pages, *shape), dtype=torch.bfloat16, device="cuda")
    within = torch.arange(math.prod(shape), dtype=torch.int64, device="cuda").reshape(1, *shape)
    step = max(FILL_ELEMENTS // math.prod(shape), 1)
    for start in range(0, pages, step):
        ids = torch.arange(start, min(start + step, pages), dtype=torch.int64, device="cuda")
        values = scramble(ids.reshape(-1, 1, 1, 1), within, salt)
        cache[start : start + step] = (values - 128).to(torch.float32) / 64
    return cache


def _fa3_calls(
    torch: Any, case: AttentionCase, caches: tuple[Any, Any], sets: Sequence[ArgumentSet]
) -> tuple[Callable[[int], Any], list[Any]]:
    """A function that makes the call of argument set `index`, and the output of every set."""
    operations = torch.ops._vllm_fa3_C
    masks = Fa3Masks.of(case)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
    starts = torch.from_numpy(case.query_start_loc).to("cuda")
    metadata = operations.get_scheduler_metadata(*fa3_metadata_arguments(case, masks, torch.bfloat16, lengths, starts))
    maxima = (max(case.query_lens), max(case.lengths))
    outputs, arguments = [], []
    for argument_set in sets:
        query = torch.from_numpy(argument_set.query).to("cuda", torch.bfloat16)
        tables = torch.from_numpy(argument_set.block_tables).to("cuda")
        outputs.append(torch.empty_like(query))
        arguments.append(
            fa3_forward_arguments(query, *caches, outputs[-1], starts, lengths, *maxima, tables, masks, metadata)
        )

    def call(index: int) -> Any:
        return operations.fwd(*arguments[index])

    return call, outputs


def _time_graph(
    torch: Any, call: Callable[[int], Any], count: int, repeats: int, sample_seconds: float
) -> tuple[Any, list[float]]:
    """Capture `count` calls into one CUDA graph; the graph, and seconds a call over repeated replays."""
    torch.cuda.synchronize()  # the arguments were made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(count):
            call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(count):
            call(index)

    def replay(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    replay(2)
    times = max(math.ceil(sample_seconds / replay(1)), 1)
    replay(times)
    return graph, [replay(times) / (times * count) for _ in range(repeats)]


def _time_case(
    torch: Any, case: AttentionCase, caches: tuple[Any, Any], pages: int, request: dict[str, Any]
) -> tuple[list[float], NDArray[np.int16]]:
    """Seconds a call of every sample, and the bits of the output for argument set 0."""
    calls, chunks = case.rotation(request["max_calls"])
    count = calls * chunks
    call, outputs = _fa3_calls(torch, case, caches, argument_sets(case, pages, count))
    graph, samples = _time_graph(torch, call, count, request["repeats"], request["sample_seconds"])
    outputs[0].fill_(math.nan)
    graph.replay()
    return samples, outputs[0].view(torch.int16).cpu().numpy()


class _Answer:
    """What the process has to say so far, stored after every case: a later failure must not lose it."""

    def __init__(self, request_path: Path, facts: dict[str, str]) -> None:
        self._request_path = request_path
        self._content: dict[str, Any] = {"facts": facts, "timings": {}, "errors": {}}

    def add_error(self, case: AttentionCase, message: str) -> None:
        self._content["errors"][case.name] = message[:2000]
        self._store()

    def add_timing(self, case: AttentionCase, samples: Sequence[float], output_bits: NDArray[np.int16]) -> None:
        low, median, high = (float(x) for x in np.quantile(samples, (0.1, 0.5, 0.9)))
        np.save(self._request_path.with_name(f"{case.name}.npy"), output_bits)
        self._content["timings"][case.name] = {"median": median, "low": low, "high": high}
        self._store()

    def _store(self) -> None:
        (draft := self._request_path.with_name("answer.draft")).write_text(json.dumps(self._content))
        draft.replace(self._request_path.with_name("answer.json"))


def _time_cases(
    torch: Any, cases: Sequence[AttentionCase], request: dict[str, Any], deadline: float, answer: _Answer
) -> None:
    """Time cases of one geometry on a pool of their own."""
    caches: tuple[Any, Any] | None = None
    pages = num_pool_pages(cases, request["pool_bytes"])
    for case in cases:
        if time.monotonic() > deadline:
            answer.add_error(case, "time limit")
            continue
        try:
            if caches is None:
                caches = (_fill_cache(torch, case, pages, KEY_SALT), _fill_cache(torch, case, pages, VALUE_SALT))
            samples, output_bits = _time_case(torch, case, caches, pages, request)
        except Exception as error:  # reported by the parent; the other cases still run
            answer.add_error(case, f"{type(error).__name__}: {error}")
        else:
            answer.add_timing(case, samples, output_bits)


def _serve(request_path: Path) -> None:
    """Answer one request of `run_peer`, in the peer's process."""
    started = time.monotonic()
    request = json.loads(request_path.read_text())
    library = os.environ.get("FA3_LIBRARY")
    if not library:
        raise SystemExit("FA3_LIBRARY does not name the FlashAttention-3 extension")
    torch: Any = importlib.import_module("torch")
    torch.ops.load_library(library)
    digest = hashlib.sha256(Path(library).read_bytes()).hexdigest()[:12]
    facts = {
        "FlashAttention-3": f"_vllm_fa3_C, sha256 {digest}, num_splits=0, K/V [P, ps, Hkv, D], metadata not timed",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}",
    }
    answer = _Answer(request_path, facts)
    cases = [AttentionCase.from_json(fields) for fields in request["cases"]]
    for group in by_geometry(cases).values():
        _time_cases(torch, group, request, started + request["time_limit"], answer)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
