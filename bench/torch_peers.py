"""Peers that are called from PyTorch, in the process of `bench.peers`: FlashAttention-3 and FlashInfer.

FlashAttention-3 comes from the shared library that the environment variable `FA3_LIBRARY` names, the `_vllm_fa3_C`
extension of a vLLM wheel; its scheduler metadata is computed beforehand, outside the timed region, as vLLM does once
for all layers of a step. FlashInfer is what is installed; its `plan`, which reads the lengths on the host, is not timed
either. Calls over a rotation of page tables are captured into one CUDA graph. Causal masks are aligned at the bottom
right, as ours are.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import math
import os
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
from bench.peers import Answer, Request

FILL_ELEMENTS = 1 << 24  # of a cache, built at a time: int64 temporaries of a larger piece would take gigabytes
WORKSPACE_BYTES = 256 << 20  # that FlashInfer's documentation suggests, and twice that

Calls = tuple[Callable[[int], Any], list[Any]]
"""A function that makes the call of argument set `index`, and the output of every set."""


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


def _fa3_calls(torch: Any, case: AttentionCase, caches: tuple[Any, Any], sets: Sequence[ArgumentSet]) -> Calls:
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


def flashinfer_plan_arguments(
    torch: Any, case: AttentionCase, masks: Fa3Masks, tables: NDArray[np.int32]
) -> dict[str, Any]:
    """The arguments of `BatchPrefillWithPagedKVCacheWrapper.plan` (FlashInfer 0.7) for one step."""
    used = np.arange(case.table_width) < np.array(case.pages)[:, None]
    page_starts = np.concatenate([[0], np.cumsum(case.pages)]).astype(np.int32)
    last_page_lens = (np.array(case.lengths, np.int32) - 1) % case.page_size + 1

    def indices(array: NDArray[np.int32]) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to("cuda")

    return {
        "qo_indptr": indices(case.query_start_loc),
        "paged_kv_indptr": indices(page_starts),
        "paged_kv_indices": indices(tables[used]),
        "paged_kv_last_page_len": indices(last_page_lens),
        "num_qo_heads": case.num_q_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim_qk": case.head_dim,
        "page_size": case.page_size,
        "causal": masks.is_causal,
        "window_left": masks.window_left,
        "logits_soft_cap": masks.soft_cap,
        "q_data_type": torch.bfloat16,
        "kv_data_type": torch.bfloat16,
    }


def _flashinfer_calls(torch: Any, case: AttentionCase, caches: tuple[Any, Any], sets: Sequence[ArgumentSet]) -> Calls:
    flashinfer: Any = importlib.import_module("flashinfer")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    masks = Fa3Masks.of(case)
    wrappers, queries, outputs = [], [], []
    for argument_set in sets:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(**flashinfer_plan_arguments(torch, case, masks, argument_set.block_tables))
        wrappers.append(wrapper)
        queries.append(torch.from_numpy(argument_set.query).to("cuda", torch.bfloat16))
        outputs.append(torch.empty_like(queries[-1]))

    def call(index: int) -> Any:
        return wrappers[index].run(queries[index], caches, out=outputs[index])

    return call, outputs


def _load_fa3(torch: Any) -> dict[str, str]:
    library = os.environ.get("FA3_LIBRARY")
    if not library:
        raise SystemExit("FA3_LIBRARY does not name the FlashAttention-3 extension")
    torch.ops.load_library(library)
    digest = hashlib.sha256(Path(library).read_bytes()).hexdigest()[:12]
    return {
        "FlashAttention-3": f"_vllm_fa3_C, sha256 {digest}, num_splits=0, K/V [P, ps, Hkv, D], metadata not timed",
    }


def _load_flashinfer(torch: Any) -> dict[str, str]:
    del torch
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("FlashInfer is not installed: pip install flashinfer-python") from None
    return {"FlashInfer": f"{version}, BatchPrefillWithPagedKVCacheWrapper, K/V [P, ps, Hkv, D], plan not timed"}


@dataclass(frozen=True)
class _Peer:
    load: Callable[[Any], dict[str, str]]
    """Loads it, given PyTorch; answers facts about it, or raises SystemExit where it is missing."""
    calls: Callable[[Any, AttentionCase, tuple[Any, Any], Sequence[ArgumentSet]], Calls]


_PEERS = {"fa3": _Peer(_load_fa3, _fa3_calls), "flashinfer": _Peer(_load_flashinfer, _flashinfer_calls)}


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


def serve(request: Request, answer: Answer) -> None:
    """Time the cases of a request; cases with sinks, which neither peer does here, are named."""
    try:
        torch: Any = importlib.import_module("torch")
    except ModuleNotFoundError:
        raise SystemExit("PyTorch is not installed") from None
    peer = _PEERS[request.peer]
    answer.add_facts(**peer.load(torch))
    answer.add_facts(torch=f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
    for group in by_geometry(request.cases).values():
        _time_group(torch, peer, group, request, answer)
        torch.cuda.empty_cache()


def _time_group(torch: Any, peer: _Peer, cases: Sequence[AttentionCase], request: Request, answer: Answer) -> None:
    """Time cases of one geometry on a pool of their own."""
    caches: tuple[Any, Any] | None = None
    pages = num_pool_pages(cases, request.pool_bytes)
    for case in cases:
        if case.sinks:
            answer.add_error(case, f"{request.peer} does no sinks here")
            continue
        if time.monotonic() > request.deadline:
            answer.add_error(case, "time limit")
            continue
        try:
            if caches is None:
                caches = (_fill_cache(torch, case, pages, KEY_SALT), _fill_cache(torch, case, pages, VALUE_SALT))
            calls, chunks = case.rotation(request.max_calls)
            count = calls * chunks
            call, outputs = peer.calls(torch, case, caches, argument_sets(case, pages, count))
            graph, samples = _time_graph(torch, call, count, request.repeats, request.sample_seconds)
            outputs[0].fill_(math.nan)
            graph.replay()
        except Exception as error:  # reported by the parent; the other cases still run
            answer.add_error(case, f"{type(error).__name__}: {error}")
        else:
            low, median, high = (float(x) for x in np.quantile(samples, (0.1, 0.5, 0.9)))
            answer.add_timing(case, low, median, high, outputs[0].view(torch.int16).cpu().numpy())
