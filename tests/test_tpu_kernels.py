"""The Pallas TPU kernels in the interpreter: what they copy, hints, transformations, and bugs that must show."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests import judge, small_calls, tpu_interpreter
from tests.cases import CASES, Case
from tests.implementations import ON_GPU, Implementation, implementations_of
from tests.inputs import Call, build, visible_range

if ON_GPU:
    pytest.skip("interpreted on a CPU", allow_module_level=True)

ROWS = {row.operation: row for row in implementations_of() if row.platform == "pallas"}
each_row = pytest.mark.parametrize("implementation", ROWS.values(), ids=str)


# Copies


@contextlib.contextmanager
def recorded_copies() -> Iterator[list[int]]:
    """The bytes of every copy that a kernel makes inside."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    copies: list[int] = []
    read = interpreter.DMA.execute_read

    def recording(copy: Any) -> None:
        before = copy.data
        read(copy)
        if before is None and copy.data is not None:
            copies.append(copy.data.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.DMA, "execute_read", recording)
        yield copies


COPIED: dict[str, dict[str, Any]] = {
    "page_attention": {"query_lens": (1, 1, 1, 1), "kv_lens": (300, 257, 16, 129)},
    "page_attention-window": {"query_lens": (1, 1, 1), "kv_lens": (300, 257, 190), "window": 90},
    "unified_attention": {"query_lens": (1, 1, 1, 1), "kv_lens": (300, 257, 16, 129)},
    "unified_attention-hptd": {"query_lens": (1, 1, 1), "kv_lens": (300, 257, 190), "kv_layout": "HPTD"},
    "ragged_decode_attention": {"query_lens": (1, 1, 1), "kv_lens": (300, 257, 16), "dense_len": 512, "causal": False},
    "prefill_page_attention": {"query_lens": (16,), "kv_lens": (300,), "window": 90},
}
MOST_COPIED = 1.1


@pytest.mark.parametrize("name", COPIED)
def test_no_more_is_copied_than_is_needed(name: str) -> None:
    """Queries in, answers out, and once the keys and values that a row sees: of pages, the whole pages."""
    operation = name.partition("-")[0]
    case = Case(name=name, operation=operation, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16")
    case = case.replace(**COPIED[name])
    with recorded_copies() as copies:
        ROWS[operation](build(case), cfg=None)
    unit = 1 if operation == "ragged_decode_attention" else case.page_size
    keys = 0
    for query_len, kv_len in zip(case.query_lens, case.kv_lens, strict=True):
        begin, end = visible_range(case, query_len, kv_len)
        keys += -(-end // unit) * unit - begin // unit * unit
    rows = sum(case.query_lens)
    needed = 2 * case.head_dim * (2 * keys * case.num_kv_heads + 2 * rows * case.num_q_heads)
    print(f"{name}: {sum(copies)} bytes copied, {sum(copies) / needed:.3f} of what is needed")
    assert needed <= sum(copies) <= MOST_COPIED * needed


# Hints of page attention


def decoding(**changes: Any) -> Call:
    case = Case(name="hints", operation="page_attention", num_q_heads=6, num_kv_heads=2, sinks=1, return_lse=True)
    return build(case.replace(query_lens=(1,) * 5, kv_lens=(40, 0, 97, 16, 65), **changes))


HINTS: dict[str, dict[str, Any]] = {
    "one_page": {"pages_per_compute_block": 1},
    "more_pages_than_there_are": {"pages_per_compute_block": 100},
    "batch": {"megacore_mode": "batch"},
    "kv_head": {"megacore_mode": "kv_head"},
    "grid": {"inline_seq_dim": False},
    "grid_of_a_bound": {"inline_seq_dim": False, "max_context_len": 97},
    "batch_grid": {"megacore_mode": "batch", "inline_seq_dim": False, "pages_per_compute_block": 2},
    "kv_head_grid": {"megacore_mode": "kv_head", "inline_seq_dim": False, "pages_per_compute_block": 2},
}


@pytest.mark.parametrize("name", HINTS)
@pytest.mark.parametrize("features", [{}, {"window": 33, "alibi": True, "kv_scale": "head"}], ids=["plain", "features"])
def test_hints_change_how_and_not_what(name: str, features: dict[str, Any]) -> None:
    call = decoding(**features)
    judge.check(call, ROWS["page_attention"](call.with_options(**HINTS[name])))


@pytest.mark.parametrize("name", ["batch", "kv_head", "batch_grid"])
def test_two_cores_at_once(name: str) -> None:
    call = decoding()
    function = ROWS["page_attention"]
    for mode in tpu_interpreter.MODES:
        with tpu_interpreter.in_mode(mode, num_cores=2):
            judge.check(call, function(call.with_options(**HINTS[name])))


# Bounds and edges


@each_row
def test_lengths_beyond_everything_stay_inside(implementation: Implementation) -> None:
    """The interpreter raises where an access leaves an array: lengths, starts and page ids are clamped before."""
    named = small_calls.arguments(implementation.operation)
    rng = np.random.default_rng(2)
    for _ in range(3):
        wild = {
            name: rng.choice(np.array([-(2**31), -5, 0, 1, 7, 2**31 - 1]), array.shape).astype(np.int32)
            for name, array in named.items()
            if array.dtype == np.int32
        }
        with tpu_interpreter.strict("on_wait"):
            jax.block_until_ready(small_calls.run(implementation.operation, named | wild, platform="pallas"))


def test_no_sequences_and_no_pages() -> None:
    named = small_calls.arguments("unified_attention")
    empty = {"kv_lens": np.zeros(0, np.int32), "block_tables": np.zeros((0, 3), np.int32)}
    for changes in (
        empty | {"query_start_loc": np.zeros(1, np.int32)},
        {"block_tables": np.zeros((small_calls.S, 0), np.int32)},
        {name: named[name][:0] for name in ("key_cache", "value_cache")},
    ):
        out, lse = small_calls.run("unified_attention", named | changes, platform="pallas", return_lse=True)
        assert not np.any(out)
        assert np.all(np.isneginf(lse))


def test_bias_that_hides_and_bias_that_is_huge() -> None:
    """-inf hides a key, a row of nothing else is empty; the lowest finite number does not hide."""
    call = build(Case(name="bias", operation="unified_attention", query_lens=(4, 3), kv_lens=(4, 9), qq_bias=4))
    bias = call.array("qq_bias").copy()
    bias[1] = -np.inf
    bias[2, 0] = -np.inf
    bias[0] = np.finfo(np.float32).min
    changed = call.with_arrays(qq_bias=bias)
    judge.check(changed, ROWS["unified_attention"](changed))


# Transformations


@each_row
def test_transformations(implementation: Implementation) -> None:
    """`jit`, `scan` and `vmap` with everything traced, and two kernels in one program."""
    operation = implementation.operation
    inputs = [small_calls.arguments(operation, seed) | small_calls.optional_arrays(operation, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *inputs)

    def call(named: Any) -> Any:
        return small_calls.run(operation, named, platform="pallas")

    expected = [small_calls.run(operation, named, platform="xla") for named in inputs]
    both = jax.jit(lambda first, second: (call(first), call(second)))(*inputs)
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda carry, named: (carry, call(named)), 0, xs))(stacked)[1]
    mapped = jax.vmap(call)(stacked)
    for place, answer in enumerate(expected):
        small_calls.assert_close(both[place], answer)
        small_calls.assert_close(scanned[place], answer)
        small_calls.assert_close(mapped[place], answer)


def test_sharded_ragged_decode() -> None:
    named = small_calls.arguments("ragged_decode_attention")
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("batch", "heads"))
    query, dense, rows = (PartitionSpec(*axes) for axes in (("batch", "heads"), ("batch", None, "heads"), ("batch",)))
    specs = (query, dense, dense, rows, rows)
    options = {"mesh": mesh, "in_specs": specs, "out_specs": query, "platform": "pallas"}
    expected = small_calls.run("ragged_decode_attention", named)
    small_calls.assert_close(small_calls.run("ragged_decode_attention", named, **options), expected)


def test_users_shard_map() -> None:
    """With JAX's checks of the axes over which values vary."""
    named = small_calls.arguments("unified_attention")
    cache, rows = PartitionSpec(None, None, "heads"), PartitionSpec(None, "heads")
    specs = {name: PartitionSpec() for name in named} | {"key_cache": cache, "value_cache": cache, "queries": rows}
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("heads",))
    call = jax.shard_map(
        lambda named: small_calls.run("unified_attention", named, platform="pallas"),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=rows,
    )
    small_calls.assert_close(call(named), small_calls.run("unified_attention", named))


# Planted bugs

BUGS: dict[str, tuple[str, str, str, str, str]] = {
    "keys_not_awaited": ("fetch", "lambda copy: copy.wait()", "lambda copy: None", "page_attention", "page_odd"),
    "answers_not_awaited": (
        "attention",
        "    def answer() -> None:\n        fetch.wait_for_answers(refs, spec)\n",
        "    def answer() -> None:\n",
        "page_attention",
        "shared_pages",
    ),
    "next_block_over_this_one": (
        "fetch",
        "cache.at[source], buffer.at[slot, room]",
        "cache.at[source], buffer.at[0, room]",
        "page_attention",
        "shared_pages",
    ),
    "queries_overwritten": (
        "attention",
        "fetch.start_queries(next_item, refs, spec)",
        "fetch.start_queries(item, refs, spec)",
        "page_attention",
        "shared_pages",
    ),
    "missing_rescale": ("attend", "* rescale + added", "+ added", "page_attention", "peaked"),
    "mask_one_key_too_far": ("scores", "keys >= end", "keys > end", "page_attention", "page_odd"),
    "values_not_masked": (
        "attend",
        "values = jnp.where(is_seen, values, jnp.zeros_like(values))",
        "values = values",
        "page_attention",
        "page_odd",
    ),
    "sinks_not_counted": (
        "attend",
        "jnp.where(sinks == -jnp.inf, 0.0, 1.0)",
        "0.0 * sinks",
        "unified_attention",
        "alibi_sinks",
    ),
    "cap_ignored": ("scores", "cap * jnp.tanh(scores / cap)", "scores", "prefill_page_attention", "cap_alibi"),
    "window_of_the_first_row": (
        "schedule",
        "last + (scoring.window_right + 1)",
        "first + (scoring.window_right + 1)",
        "prefill_page_attention",
        "one_shot",
    ),
    "page_of_the_sequence_before": (
        "fetch",
        "sequence * pages.table_width",
        "(sequence - 1) * pages.table_width",
        "unified_attention",
        "page_odd",
    ),
    "rows_without_heads": ("attend", "first + m, first + m + 1", "first, first + 1", "unified_attention", "head_scale"),
    "range_of_the_first_row": (
        "schedule",
        "scalars.key_starts[sequence]",
        "scalars.key_starts[0]",
        "ragged_decode_attention",
        "rank_four",
    ),
}


@contextlib.contextmanager
def planted(module_name: str, right: str, wrong: str) -> Iterator[None]:
    """A line of a module of `pallas_tpu` written wrongly."""
    modules = [importlib.import_module(f"pallas_tpu.{name}") for name in
               ("attend", "attention", "fetch", "online_softmax", "schedule", "scores")]  # fmt: skip
    (module,) = (module for module in modules if module.__name__ == f"pallas_tpu.{module_name}")
    source = inspect.getsource(module)
    if source.count(right) != 1:
        raise AssertionError(f"{module_name}.py holds {source.count(right)} times, expected once: {right!r}")
    changed: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source.replace(right, wrong), str(module.__file__), "exec"), changed)
    functions = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
    changed |= {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            for user in modules:
                if vars(user).get(name) is function:
                    patch.setattr(user, name, changed[name])
        jax.clear_caches()
        yield
    jax.clear_caches()


def _is_wrong(operation: str, name: str, mode: tpu_interpreter.Mode) -> bool:
    (case,) = (case for case in CASES if (case.operation, case.name) == (operation, name))
    call, expected, bounds = judge.problem(case)
    try:
        with tpu_interpreter.in_mode(mode):
            bounds.check(ROWS[operation](call), expected)
    except (AssertionError, jax.errors.JaxRuntimeError):
        return True
    return False


@pytest.mark.parametrize("bug", BUGS)
def test_bug_in_a_kernel_is_caught(bug: str) -> None:
    module, right, wrong, operation, case = BUGS[bug]
    with planted(module, right, wrong):
        assert any(_is_wrong(operation, case, mode) for mode in tpu_interpreter.MODES)


@pytest.mark.parametrize(("operation", "case"), sorted({bug[3:] for bug in BUGS.values()}))
def test_nothing_planted_nothing_caught(operation: str, case: str) -> None:
    assert not any(_is_wrong(operation, case, mode) for mode in tpu_interpreter.MODES)
