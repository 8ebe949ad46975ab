"""The peer's process without its GPU: arguments by the registered schemas, and a stand-in that computes by them."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import peers
from bench.cases import AttentionCase, parse_case
from bench.jax_paged import BLOCK_PAGES, K_SPLITS, jax_paged_attention
from bench.torch_peers import Fa3Masks, fa3_forward_arguments, fa3_metadata_arguments, flashinfer_plan_arguments
from bench.unified import main
from jax_bridge import page_attention
from tests.test_bench_unified import OPTIONS, QUICK, SIZES, freeze_times

# The arguments of vLLM's build of FlashAttention-3, in the order of its registered schemas.
FORWARD_SCHEMA = re.findall(
    r"\w+",
    """
    q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k
    page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale softmax_scale
    is_causal window_size_left window_size_right softcap is_rotary_interleaved scheduler_metadata num_splits pack_gqa
    sm_margin s_aux cp_world_size cp_rank cp_tot_seqused_k
    """,
)
METADATA_SCHEMA = re.findall(
    r"\w+",
    """
    batch_size max_seqlen_q max_seqlen_k num_heads num_heads_k headdim headdim_v qkv_dtype seqused_k cu_seqlens_q
    cu_seqlens_k cu_seqlens_k_new seqused_q leftpad_k page_size max_seqlen_k_new is_causal window_size_left
    window_size_right has_softcap num_splits pack_gqa sm_margin
    """,
)


class Tensor(np.ndarray[Any, Any]):
    """An array with the few tensor methods that the peer's process calls."""

    def to(self, *target: Any) -> Any:
        return self.astype(target[-1]) if target[-1] != "cuda" else self

    def fill_(self, value: float) -> None:
        self[...] = value

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        return np.asarray(self)


class Graph:
    """Calls that were made while it was captured."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextlib.contextmanager
def capture(graph: Graph, stream: Any) -> Iterator[None]:
    del stream
    Graph.capturing = graph
    yield
    Graph.capturing = None


def forward(*arguments: Any) -> None:
    """`fwd`, which a graph that is being captured only remembers, as on a GPU."""
    if Graph.capturing:
        Graph.capturing.calls.append(lambda: attend(*arguments))


def attend(*arguments: Any) -> None:
    """Attention as the schema says, in loops."""
    given = SimpleNamespace(**dict(zip(FORWARD_SCHEMA, arguments, strict=True)))
    assert given.is_causal
    assert given.max_seqlen_q == np.diff(given.cu_seqlens_q).max()
    assert given.max_seqlen_k == given.seqused_k.max()
    for sequence, keys in enumerate(given.seqused_k):
        pages = given.page_table[sequence]
        cache = [x[pages].reshape(-1, *x.shape[2:])[:keys].astype(np.float32) for x in (given.k, given.v)]
        start, end = given.cu_seqlens_q[sequence : sequence + 2]
        for row in range(start, end):
            position = keys - (end - row)
            low = max(0, position - given.window_size_left) if given.window_size_left >= 0 else 0
            for head in range(given.q.shape[1]):
                seen_keys, seen_values = (x[low : position + 1, head * x.shape[1] // given.q.shape[1]] for x in cache)
                scores = seen_keys @ given.q[row, head].astype(np.float32) * given.softmax_scale
                if given.softcap:
                    scores = given.softcap * np.tanh(scores / given.softcap)
                weights = np.exp(scores - scores.max())
                given.out[row, head] = weights @ seen_values / weights.sum()


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for PyTorch and FlashAttention-3, and `subprocess.run` of a peer done in this process."""

    def create(array: Any) -> Tensor:
        return np.asarray(array).view(Tensor)

    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 30.0)
    torch = SimpleNamespace(
        __version__="fake",
        version=SimpleNamespace(cuda="none"),
        bfloat16=jnp.bfloat16.dtype,
        float32=np.float32,
        int16=np.int16,
        int32=np.int32,
        int64=np.int64,
        uint8=np.uint8,
        tensor=lambda values, dtype, device: create(np.array(values, dtype)),
        from_numpy=create,
        empty=lambda shape, dtype, device: create(np.zeros(shape, dtype)),
        empty_like=lambda array: create(np.full_like(array, np.nan)),
        arange=lambda *limits, dtype, device: create(np.arange(*limits, dtype=dtype)),
        cuda=SimpleNamespace(
            synchronize=lambda: None,
            empty_cache=lambda: None,
            get_device_name=lambda: "none",
            Stream=lambda: None,
            stream=contextlib.nullcontext,
            CUDAGraph=Graph,
            graph=capture,
            Event=lambda enable_timing: event,
        ),
        ops=SimpleNamespace(
            load_library=lambda path: None,
            _vllm_fa3_C=SimpleNamespace(
                fwd=forward, get_scheduler_metadata=lambda *arguments: zip(METADATA_SCHEMA, arguments, strict=True)
            ),
        ),
    )

    freeze_times(monkeypatch)
    serve_in_this_process(monkeypatch)
    (library := tmp_path / "fa3.so").touch()
    monkeypatch.setenv("FA3_LIBRARY", str(library))
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def serve_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`subprocess.run` of a peer calls it here."""

    start = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if "bench.peers" not in command:
            return start(command, **options)
        try:
            peers._serve(Path(command[-1]))
        except SystemExit as refusal:
            return SimpleNamespace(returncode=1, stderr=str(refusal))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)


SHORT = ("--repeats=2", "--sample-ms=1")


def named(schema: list[str], arguments: tuple[Any, ...]) -> dict[str, Any]:
    return {name: value for name, value in zip(schema, arguments, strict=True) if value is not None}


def test_fa3_arguments_follow_its_schemas() -> None:
    case = parse_case("1x5+2x3of9-window4-cap30", **SIZES)
    query = np.zeros((case.num_tokens, 4, 16))
    masks = Fa3Masks.of(case)
    arguments = fa3_forward_arguments(query, "k", "v", "out", "cu", "lengths", 3, 9, "tables", masks, "metadata")
    given = named(FORWARD_SCHEMA, arguments)
    assert given.pop("q") is query
    assert given == {
        "k": "k",
        "v": "v",
        "out": "out",
        "cu_seqlens_q": "cu",
        "seqused_k": "lengths",
        "max_seqlen_q": 3,
        "max_seqlen_k": 9,
        "page_table": "tables",
        "softmax_scale": 0.25,
        "is_causal": True,
        "window_size_left": 3,
        "window_size_right": 0,
        "softcap": 30.0,
        "is_rotary_interleaved": True,
        "scheduler_metadata": "metadata",
        "num_splits": 0,
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
    }
    assert named(METADATA_SCHEMA, fa3_metadata_arguments(case, masks, "dtype", "lengths", "cu")) == {
        "batch_size": 3,
        "max_seqlen_q": 3,
        "max_seqlen_k": 9,
        "num_heads": 4,
        "num_heads_k": 2,
        "headdim": 16,
        "headdim_v": 16,
        "qkv_dtype": "dtype",
        "seqused_k": "lengths",
        "cu_seqlens_q": "cu",
        "page_size": 4,
        "max_seqlen_k_new": 0,
        "is_causal": True,
        "window_size_left": 3,
        "window_size_right": 0,
        "has_softcap": True,
        "num_splits": 0,
        "sm_margin": 0,
    }


def test_no_window_and_no_cap_are_off() -> None:
    assert Fa3Masks.of(AttentionCase("1x9", (9,))) == Fa3Masks(True, -1, -1, 0.0)


@pytest.mark.usefixtures("fake_torch")
def test_peer_computes_the_same_on_its_own_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    cases = "2x9+1x3of7,1x6of6-window3-cap2,2x5-d32,1x6-sinks"
    assert main(["--cases", cases, "--peers=fa3", *OPTIONS, *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "fa3 / ours: geometric mean" in printed
    assert "over 3 cases" in printed  # sinks are ours alone


def test_peer_that_disagrees_is_named(
    fake_torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def attend_sharply(*arguments: Any) -> None:
        forward(*(2 * x if name == "softmax_scale" else x for name, x in zip(FORWARD_SCHEMA, arguments, strict=True)))

    monkeypatch.setattr(fake_torch.ops._vllm_fa3_C, "fwd", attend_sharply)
    assert main(["--cases", "2x9", "--peers=fa3", *OPTIONS, *QUICK]) == 1
    assert "peers disagree: fa3 on 2x9" in capsys.readouterr().out


class FlashInferWrapper:
    """A stand-in for FlashInfer's wrapper, which attends as the stand-in for FlashAttention-3 does."""

    def __init__(self, workspace: Any, kv_layout: str) -> None:
        assert workspace.dtype == np.uint8
        assert kv_layout == "NHD"

    def plan(self, **given: Any) -> None:
        self.given = SimpleNamespace(**given)

    def run(self, query: Any, caches: tuple[Any, Any], *, out: Any) -> None:
        given = self.given
        counts = np.diff(given.paged_kv_indptr)
        tables = np.zeros((len(counts), counts.max()), np.int32)
        tables[np.arange(counts.max()) < counts[:, None]] = given.paged_kv_indices
        lengths = (counts - 1) * given.page_size + given.paged_kv_last_page_len
        assert query.shape[1:] == (given.num_qo_heads, given.head_dim_qk)
        maxima = (np.diff(given.qo_indptr).max(), lengths.max())
        masks = Fa3Masks(given.causal, given.window_left, 0, given.logits_soft_cap)
        forward(*fa3_forward_arguments(query, *caches, out, given.qo_indptr, lengths, *maxima, tables, masks, None))


def test_flashinfer_gets_the_same_problem(
    fake_torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FlashInferWrapper)
    )
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7")
    assert main(["--cases", "2x9+1x3of8,1x6of6-window3-cap2", "--peers=flashinfer", *OPTIONS, *QUICK]) == 0
    assert "over 2 cases" in capsys.readouterr().out
    case, tables = parse_case("2x9+1x3of8", **SIZES), np.arange(9, dtype=np.int32).reshape(3, 3)
    arguments = flashinfer_plan_arguments(fake_torch, case, Fa3Masks.of(case), tables)
    np.testing.assert_array_equal(arguments["paged_kv_indptr"], [0, 3, 6, 8])
    np.testing.assert_array_equal(arguments["paged_kv_indices"], range(8))
    np.testing.assert_array_equal(arguments["paged_kv_last_page_len"], [1, 1, 4])


@pytest.mark.usefixtures("fake_torch")
@pytest.mark.parametrize(
    ("peer", "words"), [("fa3", "FA3_LIBRARY does not name"), ("flashinfer", "FlashInfer is not installed")]
)
def test_a_missing_peer_is_named(
    peer: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FA3_LIBRARY")
    main(["--cases", "2x9", f"--peers={peer}", *OPTIONS, *QUICK])
    assert words in capsys.readouterr().out


def test_jax_paged_attention_takes_tables_of_any_width() -> None:
    """It takes whole blocks of pages for every split: tables wider than a block each are padded to such."""
    width = K_SPLITS * BLOCK_PAGES + 1
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (1, 2, 16))
    caches = tuple(jax.random.normal(key, (1, width, 16, 16)) for key in keys[1:])
    lens, tables = jnp.array([16 * width - 3]), jnp.arange(width)[None]
    expected = page_attention(query, *caches, lens, tables, kv_layout="HPTD", platform="xla")
    np.testing.assert_allclose(jax_paged_attention(query, *caches, lens, tables), expected, rtol=1e-5, atol=1e-6)


def test_jax_peers_compute_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """JAX's paged attention in the interpreter, and XLA in the place of cuDNN; what they do not do is named."""
    freeze_times(monkeypatch)
    serve_in_this_process(monkeypatch)
    cases = "2x64,2x33,1x40of40,2x8of24,2x9-window4,1x12-sinks"
    sizes = ("--num-q-heads=4", "--num-kv-heads=2", "--head-dim=32", "--page-size=16", "--platform=xla")
    assert main(["--cases", cases, "--peers=pallas,cudnn,xla", *sizes, "--pool-gb=2e-3", *QUICK, *SHORT]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"pallas / ours: .* over 2 cases", printed)
    assert re.search(r"cudnn / ours: .* over 3 cases", printed)
    assert re.search(r"xla / ours: .* over 6 cases", printed)
    assert "pallas on 1x40of40 and 1 more: pallas does not do several new tokens a sequence" in printed
    assert "cudnn on 2x8of24: cudnn does not do chunks behind a context" in printed
