"""Peers on the inputs of `bench.decode_cases`, each timed in a process of its own.

PyTorch and JAX both want the device's memory, and vLLM's wheel registers a package called `triton_kernels`: the parent
starts `python -m bench.peers REQUEST.json`, which imports neither JAX nor this project's kernels.

FlashAttention-3 comes from the shared library that the environment variable `FA3_LIBRARY` names, the
`_vllm_fa3_C` extension of a vLLM wheel. Its calls are captured into one CUDA graph over a rotation of page tables; its
scheduler metadata is computed beforehand, outside the timed region, as vLLM does once for all layers of a step.
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

from bench.decode_cases import (
    KEY_SALT,
    VALUE_SALT,
    ArgumentSet,
    DecodeCase,
    argument_sets,
    num_pool_pages,
    scramble,
)

PEERS = ("fa3",)
FILL_PAGES = 1024  # pages built at a time: int64 temporaries of a larger piece would take gigabytes


@dataclass(frozen=True)
class PeerResult:
    """Seconds a call (median, 10th and 90th percentile) and the output for argument set 0, `[S, Hq, D]`."""

    median: float
    low: float
    high: float
    output: NDArray[np.float32]


@dataclass(frozen=True)
class PeerReport:
    """What one peer answered: results by case, errors by case, and facts about the peer itself."""

    name: str
    facts: dict[str, str]
    results: dict[str, PeerResult]
    errors: dict[str, str]


def run_peer(
    name: str,
    cases: Sequence[DecodeCase],
    pool_bytes: float,
    *,
    max_calls: int = 64,
    repeats: int = 20,
    sample_seconds: float = 0.03,
    timeout: float = 300.0,
) -> PeerReport:
    """Time one peer in a process of its own; a failure is reported in `errors`, never raised.

    Args:
        name: one of `PEERS`.
        cases: decode cases of one page geometry.
        pool_bytes: size of the peer's cache, K and V together.
        max_calls: calls of one group of argument sets at most, as in the JAX program.
        repeats: timed samples.
        sample_seconds: aimed length of a sample.
        timeout: seconds after which the process is stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "peer": name,
            "cases": [case.to_json() for case in cases],
            "pool_bytes": pool_bytes,
            "max_calls": max_calls,
            "repeats": repeats,
            "sample_seconds": sample_seconds,
        }
        (path := Path(folder, "request.json")).write_text(json.dumps(request))
        try:
            process = subprocess.run(
                [sys.executable, "-m", "bench.peers", str(path)],
                stderr=subprocess.PIPE,
                text=True,
                timeout=timeout,
                check=False,
            )
            failure = "" if process.returncode == 0 else f"exit {process.returncode}: {process.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            failure = f"no answer within {timeout:g} s"
        # The answer is rewritten after every case, so that what was measured before a failure is kept.
        answer_path = path.with_name("answer.json")
        answer = json.loads(answer_path.read_text()) if answer_path.exists() else {}
        results = {
            case: PeerResult(**timing, output=np.load(path.with_name(f"{case}.npy")))
            for case, timing in answer.get("timings", {}).items()
        }
    errors = dict(answer.get("errors", {}))
    for case in cases:
        if failure and case.name not in results:
            errors.setdefault(case.name, failure)
    return PeerReport(name, answer.get("facts", {}), results, errors)


def fa3_forward_arguments(
    query: Any,  # [S, Hq, D]
    key_cache: Any,  # [P, ps, Hkv, D]
    value_cache: Any,  # [P, ps, Hkv, D]
    out: Any,  # [S, Hq, D]
    cu_seqlens_q: Any,  # int32 [S + 1]
    lengths: Any,  # int32 [S]
    max_length: int,
    block_tables: Any,  # int32 [S, MP]
    scheduler_metadata: Any,
) -> tuple[Any, ...]:
    """The positional arguments of `torch.ops._vllm_fa3_C.fwd` for one decode step."""
    new_keys = (None, None, None)  # k_new, v_new, q_v
    seqlens = (cu_seqlens_q, None, None, None, lengths, 1, max_length)  # ..., cu_k, cu_k_new, used_q, used_k, maxima
    paging = (block_tables, None, None)  # page_table, kv_batch_idx, leftpad_k
    rotary_and_descale = (None,) * 6  # rotary cos, sin, seqlens; q, k, v descale
    scores = (query.shape[-1] ** -0.5, True, -1, -1, 0.0, True)  # scale, causal, window, soft cap, rotary interleaved
    schedule = (scheduler_metadata, 0, None, 0)  # num_splits 0 chooses; pack_gqa, sm_margin
    context_parallel = (None, 1, 0, None)  # sinks; world size, rank, total seqused_k
    return (
        *(query, key_cache, value_cache, *new_keys, out),
        *(*seqlens, *paging, *rotary_and_descale, *scores, *schedule, *context_parallel),
    )


def _fill_cache(torch: Any, case: DecodeCase, pages: int, salt: int) -> Any:
    """A cache `[P, ps, Hkv, D]` with the contents that `bench.decode` builds."""
    shape = (case.page_size, case.num_kv_heads, case.head_dim)
    cache = torch.empty((pages, *shape), dtype=torch.bfloat16, device="cuda")
    within = torch.arange(math.prod(shape), dtype=torch.int64, device="cuda").reshape(1, *shape)
    for start in range(0, pages, FILL_PAGES):
        ids = torch.arange(start, min(start + FILL_PAGES, pages), dtype=torch.int64, device="cuda")
        values = scramble(ids.reshape(-1, 1, 1, 1), within, salt)
        cache[start : start + FILL_PAGES] = (values - 128).to(torch.float32) / 64
    return cache


def _fa3_calls(
    torch: Any, case: DecodeCase, caches: tuple[Any, Any], sets: Sequence[ArgumentSet]
) -> tuple[Callable[[int], Any], list[Any]]:
    """A function that makes the call of argument set `index`, and the output of every set."""
    operations = torch.ops._vllm_fa3_C
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
    cu_seqlens_q = torch.arange(case.num_seqs + 1, dtype=torch.int32, device="cuda")
    max_length = max(case.lengths)
    metadata = operations.get_scheduler_metadata(
        *(case.num_seqs, 1, max_length, case.num_q_heads, case.num_kv_heads, case.head_dim, case.head_dim),
        *(torch.bfloat16, lengths, cu_seqlens_q, None, None, None, None, case.page_size, 0),
        *(True, -1, -1, False, 0, None, 0),  # causal, window, has soft cap, num_splits, pack_gqa, sm_margin
    )
    outputs, arguments = [], []
    for argument_set in sets:
        query = torch.from_numpy(argument_set.query).to("cuda", torch.bfloat16)
        tables = torch.from_numpy(argument_set.block_tables).to("cuda")
        outputs.append(torch.empty_like(query))
        arguments.append(
            fa3_forward_arguments(query, *caches, outputs[-1], cu_seqlens_q, lengths, max_length, tables, metadata)
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


def _serve(request_path: Path) -> None:
    """Answer one request of `run_peer`, in the peer's process."""
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
    answer: dict[str, Any] = {"facts": facts, "timings": {}, "errors": {}}
    cases = [DecodeCase.from_json(fields) for fields in request["cases"]]
    pages = num_pool_pages(cases, request["pool_bytes"])
    started = time.perf_counter()
    caches = (_fill_cache(torch, cases[0], pages, KEY_SALT), _fill_cache(torch, cases[0], pages, VALUE_SALT))
    torch.cuda.synchronize()
    facts["pool"] = f"{pages} pages, filled in {time.perf_counter() - started:.1f} s"
    for case in cases:
        try:
            calls, chunks = case.rotation(request["max_calls"])
            count = calls * chunks
            call, outputs = _fa3_calls(torch, case, caches, argument_sets(case, pages, count))
            graph, samples = _time_graph(torch, call, count, request["repeats"], request["sample_seconds"])
            outputs[0].fill_(math.nan)
            graph.replay()
            np.save(request_path.with_name(f"{case.name}.npy"), outputs[0].float().cpu().numpy())
        except Exception as error:  # reported by the parent; the other cases still run
            answer["errors"][case.name] = f"{type(error).__name__}: {error}"[:2000]
        else:
            low, median, high = (float(x) for x in np.quantile(samples, (0.1, 0.5, 0.9)))
            answer["timings"][case.name] = {"median": median, "low": low, "high": high}
        request_path.with_name("answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
