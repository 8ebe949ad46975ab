"""`tune` and the policy `autotune`: which candidate wins, what is left out, and that tracing is never timed.

Kernels run in Triton's interpreter here, whose times mean nothing; most tests put a stand-in in the kernel's place.
"""

import dataclasses
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge import timing, tuned_configs, tuning
from jax_bridge.command_line import SIZES, explain_command, tune_command
from jax_bridge.operation import Implementation
from jax_bridge.page_attention import PageAttention
from jax_bridge.registry import OPERATIONS as OBJECTS
from tests.small_calls import OPERATIONS, arguments, assert_close, call, run

pytest.importorskip("triton")

BASE: dict[str, Any] = {
    "num_warps": 4,
    "num_stages": 1,
    "block_m": 16,
    "programs_per_sm": 4,
    "min_tiles_per_split": 2,
    "skip_masks": False,
}
CANDIDATES = tuple(jax_bridge.PageAttentionConfig(block_n=block_n, **BASE) for block_n in (16, 32, 64))
FIRST, SECOND, THIRD = CANDIDATES


def shapes(operation: str = "page_attention") -> list[Any]:
    return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arguments(operation).values()]


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(tuned_configs.DIRECTORY_VARIABLE, str(tmp_path))
    for memory in ("_remembered", "_read"):
        monkeypatch.setattr(tuned_configs, memory, {})
    monkeypatch.setattr(tuned_configs, "_absent", set())


Behaviours = dict[int, Callable[[Any], Any]]


@pytest.fixture
def behaviours(monkeypatch: pytest.MonkeyPatch) -> Behaviours:
    """What a stand-in for the kernel does to the right answer, by the `block_n` of its configuration.

    The right answer is what a stand-in for `xla` says, that compiles quickly.
    """
    chosen: Behaviours = {}

    def right(invocation: Any, cfg: Any, device: Any) -> Any:
        del cfg, device
        return 2 * invocation.arrays["query"]

    def kernel(invocation: Any, cfg: Any, device: Any) -> Any:
        return chosen.get(cfg.block_n, lambda answer: answer)(right(invocation, cfg, device))

    row = Implementation(
        "triton",
        kernel,
        heuristic_cfg=lambda invocation, device: FIRST,
        candidate_cfgs=lambda invocation, device: CANDIDATES,
    )
    monkeypatch.setattr(PageAttention, "implementations", (row, Implementation("xla", right)))
    return chosen


def branch(cfg: Any = None) -> Any:
    operation = PageAttention()
    (only,) = operation.branches(operation.invocation(*shapes()), "triton", cfg)
    return only


def times(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    answers = iter(seconds)
    monkeypatch.setattr(tuning, "_seconds", lambda program, is_interpreted: next(answers))


class Clock:
    """Stands in for the module `time` where what a busy machine measures in so short a time may be anything."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def fails(answer: Any) -> Any:
    raise RuntimeError("out of shared memory\nand more lines")


@pytest.mark.parametrize("op", ["page_attention", jax_bridge.page_attention, PageAttention()])
def test_the_fastest_candidate_serves_later_calls(
    op: Any, behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(monkeypatch, 3.0, 1.0, 2.0)
    assert branch().cfg == FIRST
    assert jax_bridge.tune(op, *shapes()) == SECOND
    assert branch().cfg == SECOND
    tuned_configs.forget()
    assert branch().cfg == SECOND  # from the file


def test_selection_order(behaviours: Behaviours) -> None:
    """Explicit before memory before disk before heuristics, and `explain` says which it was."""
    operation = PageAttention()
    invocation = operation.invocation(*shapes())
    device = branch().device

    def explained(**options: Any) -> str:
        return str(jax_bridge.explain("page_attention", *shapes(), platform="triton", **options))

    assert "by heuristics for NVIDIA" in explained()
    path = tuned_configs.store(invocation, "triton", device, SECOND)
    tuned_configs.forget()
    assert branch().cfg == SECOND
    assert f"by {path}" in explained()
    tuned_configs.remember(invocation, "triton", device, tuned_configs.Choice(THIRD, "tuning in this process"))
    assert branch().cfg == THIRD
    assert "by tuning in this process" in explained()
    given = jax_bridge.PageAttentionConfig(block_n=128)
    assert branch(given).cfg == dataclasses.replace(THIRD, block_n=128)
    assert "given fields, the others by tuning" in explained(cfg=given)
    assert "given fields" not in explained(cfg=jax_bridge.PageAttentionConfig(platform="triton"))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"query": (3, 4, 16), "context_lens": (3,), "block_tables": (3, 3)}, {}),
        ({"key_cache": (7, 2, 4, 16), "value_cache": (7, 2, 4, 16)}, {}),
        ({}, {"sliding_window": 5}),
        ({}, {"attn_scale": 0.3}),
        ({}, {"attention_sink": jax.ShapeDtypeStruct((4,), jnp.float32)}),
    ],
)
def test_other_calls_are_not_served(
    change: dict[str, Any], options: dict[str, Any], behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(monkeypatch, 3.0, 1.0, 2.0)
    jax_bridge.tune("page_attention", *shapes())
    named = dict(zip(arguments("page_attention"), shapes(), strict=True))
    named |= {name: jax.ShapeDtypeStruct(shape, named[name].dtype) for name, shape in change.items()}
    explanation = jax_bridge.explain("page_attention", **named, **options, platform="triton")
    assert explanation.cfg == FIRST


@pytest.mark.parametrize("fact", ["device", "versions"])
def test_another_gpu_or_version_misses(fact: str, behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 3.0, 1.0, 2.0)
    jax_bridge.tune("page_attention", *shapes())
    tuned_configs.forget()
    if fact == "device":
        monkeypatch.setenv("JAX_BRIDGE_TARGET", "a100")
    else:
        monkeypatch.setattr(tuned_configs, "versions", lambda: {"triton": "2.0"})
    assert branch().cfg == FIRST


def test_a_wrong_candidate_cannot_win(behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 1.0, 2.0)
    behaviours[FIRST.block_n or 0] = lambda answer: 1.01 * answer
    with pytest.warns(RuntimeWarning, match="differs from that of the reference"):
        assert jax_bridge.tune("page_attention", *shapes()) == SECOND


def test_a_failing_candidate_is_left_out_and_reported(
    behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times(monkeypatch, 2.0, 1e-6)
    behaviours[SECOND.block_n or 0] = fails
    with caplog.at_level(logging.INFO, "jax_bridge.tuning"):
        report = tuning.tuned("page_attention", *shapes())
    assert report.best == THIRD
    lines = str(report).splitlines()
    assert lines[0].endswith("2 of 3 candidates run")
    assert lines[2].split() == ["1.00", "block_n=64", "<-", "taken"]
    assert lines[4].split() == ["left", "out", "block_n=32:", "RuntimeError:", "out", "of", "shared", "memory"]
    assert str(report) in caplog.text


def test_no_candidate_that_runs_is_an_error(behaviours: Behaviours) -> None:
    behaviours.update({cfg.block_n or 0: fails for cfg in CANDIDATES})
    with pytest.raises(ValueError, match=r"none of the 3 candidates .* runs right here.*shared memory"):
        jax_bridge.tune("page_attention", *shapes())
    assert branch().cfg == FIRST


def test_arrays_are_timed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real kernel, in the interpreter."""
    monkeypatch.setattr(PageAttention, "candidate_cfgs", lambda self, invocation: CANDIDATES[:2])
    named = arguments("page_attention")
    given: list[Any] = []
    made_up = tuning.made_up
    monkeypatch.setattr(tuning, "made_up", lambda invocation: given.append(made_up(invocation)) or given[0])
    assert jax_bridge.tune("page_attention", **named) in CANDIDATES[:2]
    assert all(given[0][name] is array for name, array in named.items())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_tuned_from_shapes(operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On `xla`, which has one candidate."""
    monkeypatch.setattr(tuning, "_CALLS_PER_PROGRAM", 1)
    monkeypatch.setattr(tuning, "ITERATIONS", 2)
    cfg = jax_bridge.tune(operation, *shapes(operation), platform="xla")
    assert cfg == OBJECTS[operation].config_type()
    assert [path.name for path in tmp_path.glob("*/*.json")] == [f"{operation}.json"]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16"])
def test_written_caches_are_compared_exactly(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_CALLS_PER_PROGRAM", 1)
    monkeypatch.setattr(tuning, "ITERATIONS", 2)
    named = dict(zip(arguments("write_kv_pages"), shapes("write_kv_pages"), strict=True))
    caches = {n: jax.ShapeDtypeStruct(named[n].shape, jnp.dtype(dtype)) for n in ("key_cache", "value_cache")}
    tokens = {n: jax.ShapeDtypeStruct(named[n].shape, jnp.bfloat16) for n in ("key", "value")}
    assert jax_bridge.tune("write_kv_pages", *{**named, **tokens, **caches}.values()) is not None
    one = jnp.ones(4, dtype)
    assert tuning._agree(one, one)
    if one.dtype.itemsize == 1:
        assert not tuning._agree(one, one.at[0].set(jnp.asarray(1.125 if dtype != "int8" else 2, dtype)))


def test_a_time_lost_in_noise_does_not_win(behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 3.0, -1.0, 2.0)
    assert jax_bridge.tune("page_attention", *shapes()) == THIRD
    times(monkeypatch, -1.0, -1.0, -1.0)  # all are right, and the first is the one of the heuristics
    assert jax_bridge.tune("page_attention", *shapes()) == FIRST


def test_what_xla_cannot_hold_is_said(behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more lines")

    monkeypatch.setattr(tuning, "_call", full)
    with pytest.raises(ValueError, match=r'"xla" cannot compute what candidates of page_attention .*out of memory$'):
        jax_bridge.tune("page_attention", *shapes())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_candidates_begin_with_the_heuristics(operation: str) -> None:
    instance = OBJECTS[operation]
    invocation = call(instance.invocation, operation, dict(zip(arguments(operation), shapes(operation), strict=True)))
    candidates = instance.candidate_cfgs(invocation)
    assert candidates[0] == instance.heuristic_cfg(invocation)
    assert len(set(candidates)) == len(candidates) >= 1


def test_device_times(behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device: 5 warm-up runs, the median of 100, of programs of several calls over different memory."""
    asked: dict[str, Any] = {}
    measured: list[Any] = []

    def measure(enqueue: Any, **options: Any) -> timing.Timing:
        asked.update(options)
        measured.append(enqueue(0))
        return timing.Timing(1.0, 1.0, 1.0, 0.0)

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(tuning, "_LONG_SECONDS", 60.0)
    jax_bridge.tune("page_attention", *shapes(), platform="xla")
    assert (asked["warm_up"], asked["repeats"]) == (5, 100)
    assert asked["calls"] == len(measured[0]) == 10


def test_medians_are_of_what_more_executions_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant costs of a batch, such as a launch, cancel out."""
    clock, executions = Clock(), []
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(jax, "block_until_ready", lambda result: clock.sleep(0.05))

    def enqueue(index: int) -> None:
        executions.append(index)
        clock.sleep(0.002)

    timed = timing.measure(enqueue, repeats=5, sample_seconds=0.0, warm_up=3)
    assert executions == list(range(3 + 2 + 2 + 5 * 3))
    assert (timed.low, timed.median, timed.high) == pytest.approx((0.002, 0.002, 0.002))


def test_made_up_rows_all_belong_to_a_sequence() -> None:
    operation = OBJECTS["unified_attention"]
    for num_seqs, num_tokens in ((1, 7), (4, 4), (4, 9), (3, 300)):
        given = shapes("unified_attention")
        for place, shape in {0: (num_tokens, 4, 16), 3: (num_seqs,), 4: (num_seqs, 3), 5: (num_seqs + 1,)}.items():
            given[place] = jax.ShapeDtypeStruct(shape, given[place].dtype)
        made = tuning.made_up(operation.invocation(*given))
        starts = np.asarray(made["query_start_loc"])
        assert (starts[0], starts[-1]) == (0, num_tokens)
        assert np.all(np.diff(starts) >= 1)
        assert {name: (array.shape, array.dtype) for name, array in made.items() if array is not None} == {
            name: (shape.shape, shape.dtype) for name, shape in zip(arguments(operation.name), given, strict=True)
        }


def test_agreement_is_judged_on_values() -> None:
    right = jnp.ones((2, 3))
    assert tuning._agree(right, right)
    assert not tuning._agree(right * 1.01, right)
    assert tuning._agree(right.astype(jnp.bfloat16) * 1.01, right.astype(jnp.bfloat16))


def test_a_configuration_is_not_to_be_given() -> None:
    with pytest.raises(TypeError, match="page_attention got cfg, expected none"):
        jax_bridge.tune("page_attention", *shapes(), cfg=FIRST)


class TestAutotune:
    """`JAX_BRIDGE_AUTOTUNE=autotune`."""

    @pytest.fixture(autouse=True)
    def policy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(tuned_configs.POLICY_VARIABLE, "autotune")

    def test_never_ranks_by_tracing_time(self, behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
        """Inside a trace, a candidate that traces slowly and runs fast wins."""
        clock = Clock()
        monkeypatch.setattr(tuning, "time", clock)

        def runs_slowly(answer: Any) -> Any:
            def wait(answer: Any) -> Any:
                clock.sleep(0.1)
                return answer

            return jax.pure_callback(wait, jax.ShapeDtypeStruct(answer.shape, answer.dtype), answer)

        def traces_slowly(answer: Any) -> Any:
            clock.sleep(0.3)
            return answer

        behaviours.update(
            {FIRST.block_n or 0: runs_slowly, SECOND.block_n or 0: traces_slowly, THIRD.block_n or 0: runs_slowly}
        )
        named = arguments("page_attention")
        step = jax.jit(lambda named: run("page_attention", named, platform="triton"))
        assert_close(step(named), run("page_attention", named, platform="xla"))
        assert branch().cfg == SECOND
        assert branch().source == "tuning in this process"

    @pytest.mark.parametrize("around", ["eager", "jit", "vmap", "scan", "eval_shape", "shard_map"])
    def test_tunes_once_on_made_up_arrays(
        self, around: str, behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        times(monkeypatch, 3.0, 1.0, 2.0)  # a second tuning would find the iterator empty
        seen: list[Any] = []
        made_up = tuning.made_up
        monkeypatch.setattr(tuning, "made_up", lambda invocation: seen.append(invocation) or made_up(invocation))
        named = {name: jnp.asarray(array) for name, array in arguments("page_attention").items()}
        query, rest = named["query"], {name: array for name, array in named.items() if name != "query"}

        def step(query: Any) -> Any:
            return jax_bridge.page_attention(query, **rest, platform="triton")

        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
        transformed: dict[str, Callable[[Any], Any]] = {
            "eager": step,
            "jit": jax.jit(step),
            "vmap": lambda query: jax.vmap(step)(query[None])[0],
            "scan": lambda query: jax.lax.scan(lambda carry, _: (step(carry), None), query, length=1)[0],
            "eval_shape": lambda query: jax.eval_shape(step, query) and step(query),
            "shard_map": jax.shard_map(step, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=False),
        }
        expected = run("page_attention", named, platform="xla")
        for _ in range(2):
            assert_close(transformed[around](query), expected)
        assert branch().cfg == SECOND
        (invocation,) = seen
        assert all(isinstance(a, jax.ShapeDtypeStruct) for a in invocation.arrays.values() if a is not None)

    def test_what_is_known_is_not_tuned_again(self, behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither what a file holds, nor what the call says; a cfg that names the platform alone says nothing."""
        device = PageAttention().branches(PageAttention().invocation(*shapes()), "triton", FIRST)[0].device
        tuned_configs.store(PageAttention().invocation(*shapes()), "triton", device, THIRD)
        tuned_configs.forget()
        monkeypatch.setattr(tuning, "_measure", lambda *arguments: pytest.fail("tuned"))
        assert branch().cfg == THIRD
        window = PageAttention().invocation(*shapes(), sliding_window=3)
        assert PageAttention().branches(window, "triton", SECOND)[0].cfg == SECOND
        monkeypatch.undo()
        monkeypatch.setenv(tuned_configs.POLICY_VARIABLE, "autotune")
        assert jax_bridge.PageAttentionConfig(platform="triton").is_open
        assert jax_bridge.RaggedDecodeAttentionConfig(jax_bridge.FwdParams()).is_open
        assert not jax_bridge.RaggedDecodeAttentionConfig(jax_bridge.FwdParams(num_warps=4)).is_open

    def test_explaining_runs_nothing(self, behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuning, "_measure", lambda *arguments: pytest.fail("tuned"))
        text = str(jax_bridge.explain("page_attention", *shapes(), platform="triton"))
        assert "by heuristics" in text
        assert "JAX_BRIDGE_AUTOTUNE=autotune: such a call tunes first" in text

    def test_calls_survive_a_failure(self, behaviours: Behaviours) -> None:
        """Which is said once."""
        behaviours.update({cfg.block_n or 0: fails for cfg in CANDIDATES})
        with pytest.warns(RuntimeWarning, match="page_attention is not tuned, heuristics serve it: .*shared memory"):
            assert branch().cfg == FIRST
        assert branch().cfg == FIRST
        assert "as tuning failed" in branch().source

    def test_threads_wait_for_one_another(self, behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch) -> None:
        times(monkeypatch, 3.0, 1.0, 2.0)
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(branch().cfg)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [SECOND] * 3

    def test_where_the_kernel_does_not_run_heuristics_serve(
        self, behaviours: Behaviours, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when lowering for a GPU from a machine without it."""
        monkeypatch.setattr(tuning.launch, "interpreting", lambda: False)
        assert branch().cfg == FIRST


def test_an_unknown_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned_configs.POLICY_VARIABLE, "always")
    with pytest.raises(ValueError, match="JAX_BRIDGE_AUTOTUNE is 'always', expected heuristics or autotune"):
        run("page_attention", arguments("page_attention"))


class TestCommands:
    """`python -m jax_bridge.tune` and `python -m jax_bridge.explain`; as modules they are run in `test_packaging`."""

    SMALL = ("--shape", "S=2", "T=5,B=2,C=3,Q=3,K=8,L=8,MP=3", "ps=4", "Hq=4", "Hkv=2", "D=16", "--dtype", "float32")

    def test_tune(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuning, "_CALLS_PER_PROGRAM", 1)
        monkeypatch.setattr(tuning, "ITERATIONS", 2)
        options = ("--option", "sliding_window=3", "kv_layout=PTHD", "--array", "attention_sink")
        assert tune_command(["--op", "page_attention", *self.SMALL, *options, "--platform", "xla"]) == 0
        out = capsys.readouterr().out
        assert "page_attention[xla] on cpu: 1 of 1 candidates run" in out
        (path,) = tmp_path.glob("cpu/page_attention.json")
        assert str(path) in out
        (key,) = json.loads(path.read_text())["entries"]
        call = json.loads(key)
        assert (call["options"]["window"], call["options"]["kv_layout"]) == ([2, 0], "PTHD")
        assert call["arrays"]["key_cache"] == ["float32", 6, 4, 2, 16]
        assert call["arrays"]["attention_sink"] == ["float32", 4]

    def test_explain(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """Every operation, of the sizes of a usual model where none are given."""
        assert explain_command([]) == 0
        out = capsys.readouterr().out
        assert f"tuned configurations: {tmp_path} (none)" in out
        for operation in OPERATIONS:
            assert f"{operation}[xla]" in out

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_a_kernel_is_explained(self, operation: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert explain_command(["--op", operation, *self.SMALL, "--platform", "triton"]) == 0
        assert "configuration: by heuristics for NVIDIA H100" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            (("--shape", "X=2"), "--shape has X=2, expected S, T"),
            (("--shape", "S"), "--shape has 'S', expected NAME=VALUE"),
            (("--shape", "Hq=7"), "query has 7 heads, expected a multiple of the 8 KV heads"),
            (("--option", "sliding_window=0"), "sliding_window is 0"),
            (("--platform", "cuda"), "does not support this operation"),
        ],
    )
    def test_what_is_wrong_is_said(
        self, wrong: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tune_command(["--op", "page_attention", *wrong]) == 2
        assert words in capsys.readouterr().err
        assert set(SIZES) >= {"S", "Hq", "Hkv", "D", "ps", "MP"}

    def test_explain_says_what_is_wrong_with_the_environment(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(tuned_configs.POLICY_VARIABLE, "always")
        assert explain_command([]) == 2
        assert "JAX_BRIDGE_AUTOTUNE is 'always'" in capsys.readouterr().err

    def test_options_belong_to_an_operation(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            explain_command(["--option", "kv_layout=PTHD"])
        captured = capsys.readouterr()
        assert "expected --op" in captured.err
        assert not captured.out
