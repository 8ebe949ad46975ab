"""Operations under JAX's transformations; one program serves every value of lengths, tables and scales."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge.device import target_device
from jax_bridge.registry import OPERATIONS as OBJECTS
from tests.implementations import SMALL_DEVICE
from tests.new_process import run_python
from tests.small_calls import (
    ATTENDING,
    HQ,
    KEYS,
    MP,
    OPERATIONS,
    PAGED,
    PS,
    QUERIES,
    D,
    P,
    S,
    arguments,
    assert_close,
    optional_arrays,
    run,
)

RUNNABLE = ("xla", "triton")  # on the CPU, the latter in Triton's interpreter
CALLS = [
    (name, row.platform) for name in OPERATIONS for row in OBJECTS[name].implementations if row.platform in RUNNABLE
]

PER_HEAD = ("attention_sink", "alibi_slopes", "k_scale", "v_scale")


def every_array(operation: str, seed: int, platform: str = "xla") -> dict[str, Any]:
    """All arrays of a call that the platform takes, the optional ones too, on the device."""
    named = arguments(operation, seed) | optional_arrays(operation, seed)
    if platform == "triton":
        named.pop("bias", None)
    return jax.device_put(named)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that XLA compiles inside."""
    compiled: list[str] = []
    is_open = True

    def listen(event: str, duration: float, **_: Any) -> None:
        del duration
        if is_open and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    is_open = False


@pytest.mark.parametrize(("operation", "platform"), CALLS)
def test_one_program_serves_every_value(operation: str, platform: str) -> None:
    """Under `jit` with every array traced, and eagerly, calls that differ in values compile once and are right."""
    inputs = [every_array(operation, seed, platform) for seed in range(4)]

    @jax.jit
    def jitted(named: Mapping[str, Any]) -> Any:
        return run(operation, named, platform=platform)

    first = [
        jax.block_until_ready(call(inputs[0]))
        for call in (jitted, lambda named: run(operation, named, platform=platform))
    ]
    assert_close(*first)
    with compilations() as compiled:
        answers = [(jitted(named), run(operation, named, platform=platform)) for named in inputs[1:]]
        jax.block_until_ready(answers)
    assert not compiled
    assert any(
        np.any(np.asarray(left) != np.asarray(right))
        for left, right in zip(jax.tree.leaves(first[0]), jax.tree.leaves(answers[0][0]), strict=True)
    )
    for inside, outside in answers:
        assert_close(inside, outside)


@pytest.mark.parametrize(("operation", "platform"), [*CALLS, *((name, None) for name in OPERATIONS)])
def test_nothing_traced_outlives_its_trace(operation: str, platform: str | None) -> None:
    named = jax.device_put(arguments(operation))
    with jax.checking_leaks(), target_device(SMALL_DEVICE):
        jax.block_until_ready(jax.jit(lambda named: run(operation, named, platform=platform))(named))


@pytest.mark.parametrize("operation", ["attention", "unified_attention"])
def test_the_first_program_of_a_process_is_traced_once(operation: str) -> None:
    """What the first trace imports changes nothing by which JAX keeps programs."""
    program = (
        "import jax\n"
        "from tests.small_calls import arguments, run\n"
        f"named = {{name: jax.device_put(array) for name, array in arguments({operation!r}).items()}}\n"
        "traces = []\n"
        "@jax.jit\n"
        "def jitted(named):\n"
        "    traces.append(named)\n"
        f"    return run({operation!r}, named)\n"
        "jax.block_until_ready([jitted(named) for _ in range(2)])\n"
        "assert len(traces) == 1, f'traced {len(traces)} times'\n"
    )
    run_python(program, interprets=False)


@pytest.mark.parametrize(("operation", "platform"), [call for call in CALLS if call[0] in PAGED])
def test_fifty_vectors_of_lengths_share_a_program(
    operation: str, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced once, compiled once, whatever the lengths, starts and tables, nonsense among them."""
    implementation = OBJECTS[operation].implementation(platform)
    assert implementation is not None
    traces: list[Any] = []
    call = implementation.call

    def counted(*arguments: Any) -> Any:
        traces.append(arguments)
        return call(*arguments)

    counting = dataclasses.replace(implementation, call=counted)
    monkeypatch.setattr(type(OBJECTS[operation]), "implementations", (counting,))
    rng = np.random.default_rng(3)
    named = every_array(operation, 0)
    named = {name: array[:, :1] if name in ("query", "queries") else array for name, array in named.items()}
    named = {name: array[:1] if name in PER_HEAD else array for name, array in named.items()}
    heads = {"page_attention": 1, "prefill_page_attention": 0, "unified_attention": 2}[operation]
    named |= {name: jnp.take(named[name], jnp.array([0]), axis=heads) for name in ("key_cache", "value_cache")}
    integers = [name for name, array in named.items() if array.dtype == np.int32]
    with target_device(SMALL_DEVICE):
        run(operation, named, platform=platform)
        with compilations() as compiled:
            for _ in range(50):
                changed = {name: rng.integers(-2, 12, named[name].shape, np.int32) for name in integers}
                jax.block_until_ready(run(operation, named | changed, platform=platform))
    assert not compiled
    assert len(traces) == 1


@pytest.mark.parametrize("scale", [np.int32(2), np.float32(2), np.asarray(2), jnp.asarray([2, 2]), jnp.asarray([2.0])])
def test_scales_of_any_real_type(scale: Any) -> None:
    named = arguments("page_attention")
    expected = run("page_attention", named, k_scale=2.0, v_scale=2.0)
    assert_close(run("page_attention", named, k_scale=scale, v_scale=scale), expected)


@pytest.mark.parametrize(
    ("operation", "argument"), [("prefill_page_attention", "context_len"), ("page_attention", "k_scale")]
)
def test_python_numbers_that_are_data_compile_nothing_new(operation: str, argument: str) -> None:
    named = jax.device_put(arguments(operation))
    convert = int if argument == "context_len" else float
    before = run(operation, named, **{argument: convert(3)})
    with compilations() as compiled:
        after = run(operation, named, **{argument: convert(7)})
    assert not compiled
    assert np.any(before != after)
    assert_close(
        after, run(operation, named, **{argument: np.asarray([7], np.int32 if convert is int else np.float32)})
    )


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "no dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "64 bits": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("operation", "platform"), [*CALLS, ("unified_attention", "pallas"), ("unified_attention", "auto")]
)
def test_callers_may_forbid_things_in_code_of_their_own(operation: str, platform: str, setting: str) -> None:
    named = every_array(operation, 0, platform)
    expected = run(operation, named, platform=platform)
    with SETTINGS[setting]():
        answers = run(operation, named, platform=platform)
    assert jax.tree.map(lambda a: a.dtype, answers) == jax.tree.map(lambda a: a.dtype, expected)
    assert_close(answers, expected)


@pytest.mark.parametrize(("operation", "platform"), CALLS)
def test_scan(operation: str, platform: str) -> None:
    inputs = [every_array(operation, seed, platform) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *inputs)
    _, answers = jax.jit(
        lambda xs: jax.lax.scan(lambda c, named: (c, run(operation, named, platform=platform)), 0, xs)
    )(stacked)
    for place, named in enumerate(inputs):
        assert_close(jax.tree.map(lambda a, place=place: a[place], answers), run(operation, named, platform=platform))


@pytest.mark.parametrize(("operation", "platform"), CALLS)
@pytest.mark.parametrize("shared", [(), ("key_cache", "value_cache", "key", "value", "lse_a")], ids=["all", "some"])
def test_vmap(operation: str, platform: str, shared: tuple[str, ...]) -> None:
    """Every array mapped, and with arrays that all members share."""
    inputs = [every_array(operation, seed, platform) for seed in range(2)]
    inputs[1] |= {name: inputs[0][name] for name in shared if name in inputs[0]}
    stacked = {
        name: array if name in shared else jnp.stack([named[name] for named in inputs])
        for name, array in inputs[0].items()
    }
    axes = {name: None if name in shared else 0 for name in stacked}
    answers = jax.vmap(lambda named: run(operation, named, platform=platform), in_axes=(axes,))(stacked)
    for place, named in enumerate(inputs):
        assert_close(jax.tree.map(lambda a, place=place: a[place], answers), run(operation, named, platform=platform))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_export_round_trip(operation: str) -> None:
    named = every_array(operation, 0)
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in named.items()}
    jitted = jax.jit(lambda named: run(operation, named, platform="xla"))
    exported = jax.export.export(jitted, platforms=["cpu", "cuda", "tpu"])(shapes)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(every_array(operation, 1)), run(operation, every_array(operation, 1), platform="xla"))


INDEXED = [name for name in OPERATIONS if any(array.dtype == np.int32 for array in arguments(name).values())]

SYMBOLIC = {
    "page_attention": {
        "query": "S, 4, 16",
        **dict.fromkeys(("key_cache", "value_cache"), "P, 2, 4, 16"),
        "context_lens": "S",
        "block_tables": "S, M",
    },
    "prefill_page_attention": {
        "query": "C, 4, 16",
        **dict.fromkeys(("key_cache", "value_cache"), "2, P, 4, 16"),
        "page_indices": "M",
    },
    "unified_attention": {
        "queries": "T, 4, 16",
        **dict.fromkeys(("key_cache", "value_cache"), "P, 4, 2, 16"),
        "kv_lens": "S",
        "block_tables": "S, M",
        "query_start_loc": "S + 1",
    },
    "ragged_decode_attention": {
        "query": "B, 4, 16",
        **dict.fromkeys(("key", "value"), "B, L, 2, 16"),
        **dict.fromkeys(("sequence_start", "sequence_end"), "B"),
    },
    "attention": {"query": "B, Q, 4, 16", **dict.fromkeys(("key", "value"), "B, K, 2, 16")},
    "write_kv_pages": {
        **dict.fromkeys(("key", "value"), "T, 2, 16"),
        **dict.fromkeys(("key_cache", "value_cache"), "P, 4, 2, 16"),
        "slot_mapping": "T",
    },
    "merge_attention_states": {
        **dict.fromkeys(("out_a", "out_b"), "T, 4, 16"),
        **dict.fromkeys(("lse_a", "lse_b"), "T, 4"),
    },
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_sizes_may_be_symbolic_without_a_kernel(operation: str) -> None:
    """One exported program serves any sizes of what a batch holds; kernels refuse that, and `"auto"` takes `xla`."""
    named, scope = arguments(operation), jax.export.SymbolicScope()
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in named.items()}
    for name, shape in SYMBOLIC[operation].items():
        shapes[name] = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), named[name].dtype)
    options = {"sliding_window": 3} if operation in ATTENDING else {}
    exported = jax.export.export(jax.jit(lambda named: run(operation, named, **options)))(shapes)
    assert_close(exported.call(named), run(operation, named, platform="xla", **options))
    with pytest.raises(NotImplementedError, match=rf'{operation}\[triton\] .* symbolic sizes.*; use platform="xla"'):
        jax.export.export(jax.jit(lambda named: run(operation, named, platform="triton")))(shapes)


@pytest.mark.parametrize("operation", INDEXED)
@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.int64, np.uint64])
def test_index_dtypes(operation: str, dtype: Any) -> None:
    """Any integer dtype; what int32 cannot hold stays out of range instead of wrapping round."""
    named = arguments(operation)
    indices = {name: array.clip(0, 100) for name, array in named.items() if array.dtype == np.int32}
    converted = {name: array.astype(dtype) for name, array in indices.items()}
    if operation == "write_kv_pages" and dtype == np.int64:
        converted["slot_mapping"][0] = indices["slot_mapping"][0] = 2**31 - 1
        converted["slot_mapping"][0] = 2**32 + 1
    assert_close(run(operation, named | converted), run(operation, named | indices))


@pytest.mark.parametrize(
    ("operation", "argument", "shape"),
    [
        ("page_attention", "query", (0, HQ, D)),
        ("prefill_page_attention", "query", (0, HQ, D)),
        ("unified_attention", "queries", (0, HQ, D)),
        ("ragged_decode_attention", "query", (0, HQ, D)),
        ("attention", "query", (S, 0, HQ, D)),
    ],
)
def test_empty_calls(operation: str, argument: str, shape: tuple[int, ...]) -> None:
    named = arguments(operation) | {argument: np.zeros(shape, np.float32)}
    if operation in ("page_attention", "ragged_decode_attention"):
        rows = {"context_lens", "block_tables", "key", "value", "sequence_start", "sequence_end"}
        named |= {name: named[name][:0] for name in rows & named.keys()}
    second = {"return_weights": True} if operation == "attention" else {"return_lse": True}
    out, extra = run(operation, named, **second)
    assert out.shape == shape
    assert extra.shape == ((S, HQ, 0, KEYS) if operation == "attention" else shape[:-1])


def test_rows_of_no_sequence_have_an_lse() -> None:
    """On every platform that `"auto"` may lower for, as a pair of the same kind."""
    empty = {"kv_lens": np.zeros(0, np.int32), "block_tables": np.zeros((0, MP), np.int32)}
    named = arguments("unified_attention") | empty | {"query_start_loc": np.zeros(1, np.int32)}
    answers = jax.jit(lambda named: run("unified_attention", named, return_lse=True))(named)
    assert type(answers) is type(run("unified_attention", named, return_lse=True)) is tuple
    np.testing.assert_array_equal(answers[0], 0)
    np.testing.assert_array_equal(answers[1], -np.inf)


def test_four_axes_of_a_ragged_query() -> None:
    named = arguments("ragged_decode_attention")
    flat = run("ragged_decode_attention", named, return_lse=True)
    out, lse = run("ragged_decode_attention", named | {"query": named["query"][:, None]}, return_lse=True)
    assert out.shape == (S, 1, HQ, D)
    assert lse.shape == (S, 1, HQ)
    assert_close((out[:, 0], lse[:, 0]), flat)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_on_xla(operation: str) -> None:
    """Against central differences, along a random direction, with everything that must not matter poisoned."""
    named = poisoned(operation)
    extra = {"dtype": jnp.float32} if operation == "attention" else {}
    wanted = [name for name, array in named.items() if array.dtype == np.float32]
    rng = np.random.default_rng(5)

    def loss(floats: Mapping[str, Any]) -> jax.Array:
        answers = jax.tree.leaves(run(operation, {**named, **floats}, platform="xla", **extra))
        return jnp.sum(jnp.stack([jnp.sum(jnp.sin(jnp.nan_to_num(answer))) for answer in answers]))

    floats = {name: jnp.asarray(named[name]) for name in wanted}
    gradients = jax.jit(jax.grad(loss))(floats)
    direction = {
        name: np.where(np.isnan(a), 0, rng.normal(size=a.shape)).astype(np.float32) for name, a in floats.items()
    }
    step = 1e-2
    ahead, behind = (loss({n: a + sign * step * direction[n] for n, a in floats.items()}) for sign in (1, -1))
    expected = float(ahead - behind) / (2 * step)
    got = sum(float(jnp.sum(gradients[name] * direction[name])) for name in wanted)
    assert got == pytest.approx(expected, rel=2e-2, abs=2e-2)


PAGED_ARRAYS = {
    "page_attention": ("context_lens", "block_tables", (0, 2)),
    "prefill_page_attention": ("context_len", "page_indices", (1, 2)),
    "unified_attention": ("kv_lens", "block_tables", (0, 1)),
}
"""Names of lengths and tables, and the axes of pages and of tokens in a cache."""


def poisoned(operation: str) -> dict[str, Any]:
    """NaN in what no length covers; of several sequences one without keys."""
    named = arguments(operation)
    if operation in PAGED:
        lens, tables, axes = PAGED_ARRAYS[operation]
        if len(named[lens]) > 1:
            named[lens][1] = 0
        length, table = named[lens][0], named[tables].reshape(-1, MP)[0]
        used = {(table[token // PS], token % PS) for token in range(length)}
        for page, slot in set(itertools.product(range(P), range(PS))) - used:
            for cache in ("key_cache", "value_cache"):
                np.moveaxis(named[cache], axes, (0, 1))[page, slot] = np.nan
    if operation == "ragged_decode_attention":
        named["sequence_end"] = np.asarray([6, 2], np.int32)
        for dense in ("key", "value"):
            named[dense][0, 6:] = np.nan
            named[dense][1] = np.nan
    return named


def test_caches_are_written_in_place_under_donation() -> None:
    # Copies of JAX's own: memory borrowed from numpy cannot be donated.
    named = {name: jnp.array(array) for name, array in arguments("write_kv_pages").items()}
    expected = run("write_kv_pages", named)
    write = jax.jit(jax_bridge.write_kv_pages, donate_argnums=(2, 3))
    pointers = [named[name].unsafe_buffer_pointer() for name in ("key_cache", "value_cache")]
    written = write(*named.values())
    assert [array.unsafe_buffer_pointer() for array in written] == pointers
    assert named["key_cache"].is_deleted()
    assert_close(written, expected)


def test_mask_info_is_a_pytree() -> None:
    info = jax_bridge.MaskInfo.from_segments(np.asarray([[0, 0, 1]]), np.asarray([[0, 1, 1, -1]]))
    mask = jax.jit(lambda info: info.get_or_compute_attention_mask())(info)
    expected = [[True, False, False, False], [True, False, False, False], [False, True, True, False]]
    np.testing.assert_array_equal(mask[0, 0], expected)
    padded = jax_bridge.MaskInfo.from_segments(np.full((1, QUERIES), -1), np.full((1, KEYS), -1))
    assert not np.any(padded.get_or_compute_attention_mask())
    named = {name: array[:1] for name, array in arguments("attention").items()}
    assert not np.any(run("attention", named, mask_info=padded))
