"""Every argument that is wrong is refused, by type and in words: operation, argument, expected, got."""

import dataclasses
import inspect
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge.registry import OPERATIONS as OBJECTS
from tests.implementations import HAS_KERNEL
from tests.small_calls import (
    ATTENDING,
    HKV,
    HQ,
    KEYS,
    MP,
    OPERATIONS,
    PAGED,
    PS,
    QUERIES,
    TOKENS,
    D,
    P,
    S,
    arguments,
    optional_arrays,
    parameters,
    run,
)

QUERY = {"unified_attention": "queries"}
SCALE = {"page_attention": "attn_scale"}
CAP = {"page_attention": "attn_logits_soft_cap", "prefill_page_attention": "attn_logits_soft_cap"}


def query(operation: str) -> str:
    return QUERY.get(operation, "query")


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def wrong(operation: str, argument: str, value: Any, error: type[Exception], *fragments: str) -> Any:
    """A test parameter: the call with one argument changed must raise, naming operation, argument and the fragments."""
    label = f"{operation}-{argument}-{'-'.join(fragments)}"
    return pytest.param(operation, {argument: value}, error, fragments, id=re.sub(r"[^\w.]+", "_", label))


class NoMask:
    """What stands for a `mask_info` without a mask."""

    def get_or_compute_attention_mask(self) -> None:
        return None


RANKS = [
    wrong(
        operation,
        name,
        array[None] if array.ndim < 4 or name != "query" else array[0, 0],
        ValueError,
        f", expected {array.ndim} ax",
    )
    for operation in OPERATIONS
    for name, array in arguments(operation).items()
    if (operation, name) not in {("ragged_decode_attention", "query"), ("prefill_page_attention", "context_len")}
]
NOT_ARRAYS = [
    wrong(operation, name, array.tolist(), TypeError, "list", "an array")
    for operation in OPERATIONS
    for name, array in arguments(operation).items()
]
INDEX_DTYPES = [
    wrong(operation, name, array.astype(dtype), TypeError, f"dtype {np.dtype(dtype)}", "an integer dtype")
    for operation in OPERATIONS
    for name, array in arguments(operation).items()
    if array.dtype == np.int32
    for dtype in (np.float32, np.bool_)
]
FLOAT_DTYPES = [
    wrong(operation, name, array.astype(np.int32), TypeError, "dtype int32")
    for operation in OPERATIONS
    for name, array in arguments(operation).items()
    if array.dtype == np.float32
]
OPTIONAL_ARRAYS = [
    param
    for operation in OPERATIONS
    for name, array in optional_arrays(operation).items()
    for param in (
        wrong(operation, name, array.astype(bool), TypeError, "dtype bool", "floating"),
        wrong(operation, name, np.concatenate([array, array[:1]]), ValueError, "has shape", "expected"),
        wrong(operation, name, "on", TypeError, "'on'", "expected"),
    )
    if not (operation == "page_attention" and name == "qq_bias")
]
SIZES = [
    wrong(
        "page_attention", "query", zeros(S, HQ, D + 1), ValueError, f"key_cache has shape {(P, HKV, PS, D)}", "D = 17"
    ),
    wrong("page_attention", "query", zeros(S, 3, D), ValueError, "3 heads", "2 KV heads"),
    wrong("page_attention", "value_cache", zeros(P, HKV, PS, 8), ValueError, "(6, 2, 4, 8)", "Dv = D = 16"),
    wrong("page_attention", "value_cache", zeros(P + 1, HKV, PS, D), ValueError, "(7, 2, 4, 16)", "P = 6"),
    wrong("page_attention", "context_lens", zeros(S + 1, dtype=np.int32), ValueError, "(3,)", "S = 2"),
    wrong("page_attention", "block_tables", zeros(S + 1, MP, dtype=np.int32), ValueError, "(3, 3)", "S = 2"),
    wrong("prefill_page_attention", "value_cache", zeros(HKV, P, PS, 8), ValueError, "(2, 6, 4, 8)", "Dv = D = 16"),
    wrong("prefill_page_attention", "query", zeros(QUERIES, 5, D), ValueError, "5 heads", "2 KV heads"),
    *(
        wrong("prefill_page_attention", "context_len", zeros(*shape, dtype=np.int32), ValueError, message)
        for shape in ((2,), (0,), (1, 1))
        for message in (f"context_len has shape {shape}, expected a scalar or [1]",)
    ),
    wrong("prefill_page_attention", "context_len", True, TypeError, "True", "array: a scalar or [1]"),
    wrong("prefill_page_attention", "context_len", 7.0, TypeError, "7.0", "array: a scalar or [1]"),
    *(
        wrong(operation, "softmax_aux", value, error, got, "expected", "[n] or [Hq, n]")
        for operation in ("attention", "ragged_decode_attention")
        for value, error, got in (
            (zeros(), ValueError, "has shape ()"),
            (zeros(1, HQ, 2), ValueError, "has shape (1, 4, 2)"),
            (0.5, TypeError, "is 0.5 of type float"),
        )
    ),
    wrong("unified_attention", "query_start_loc", zeros(S, dtype=np.int32), ValueError, "(2,)", "S + 1 = 3"),
    wrong("unified_attention", "kv_lens", zeros(S + 1, dtype=np.int32), ValueError, "block_tables", "S = 3"),
    wrong("unified_attention", "qq_bias", zeros(3, 4), ValueError, "(3, 4)", "[Q, Q]", "Q = 3"),
    wrong("unified_attention", "queries", zeros(5, 0, D), ValueError, "0 heads", "2 KV heads"),
    wrong("ragged_decode_attention", "query", zeros(S, 2, HQ, D), ValueError, "(2, 2, 4, 16)", "[B, 1, Hq, D]"),
    wrong("ragged_decode_attention", "value", zeros(S, KEYS, HKV, 8), ValueError, "(2, 8, 2, 8)", "Dv = D = 16"),
    wrong("ragged_decode_attention", "key", zeros(S + 1, KEYS, HKV, D), ValueError, "(3, 8, 2, 16)", "B = 2"),
    wrong("ragged_decode_attention", "sequence_end", zeros(1, dtype=np.int32), ValueError, "(1,)", "B = 2"),
    wrong("ragged_decode_attention", "query", zeros(S, HQ), ValueError, "(2, 4)", "[B, Hq, D]"),
    wrong("attention", "query", zeros(S, QUERIES, 5, D), ValueError, "5 heads", "2 KV heads"),
    wrong("attention", "value", zeros(S, KEYS + 1, HKV, D), ValueError, "(2, 9, 2, 16)", "K = 8"),
    wrong("attention", "bias", zeros(S, 2, QUERIES, KEYS), ValueError, "(2, 2, 3, 8)", "(2, 4, 3, 8)"),
    wrong("attention", "bias", zeros(1, S, HQ, QUERIES, KEYS), ValueError, "(1, 2, 4, 3, 8)", "broadcastable"),
    wrong("write_kv_pages", "slot_mapping", zeros(4, dtype=np.int32), ValueError, "(4,)", "T = 5"),
    wrong("write_kv_pages", "value_cache", zeros(P, PS, HKV, 8), ValueError, "(6, 4, 2, 8)", "Dv = 16"),
    wrong("merge_attention_states", "lse_b", zeros(5, 3), ValueError, "(5, 3)", "Hq = 4"),
    wrong("merge_attention_states", "out_b", zeros(5, HQ, 8), ValueError, "(5, 4, 8)", "D = 16"),
]
EMPTY_AXES = [
    wrong("page_attention", "value_cache", zeros(P, HKV, PS, 0), ValueError, "expected"),
    wrong("unified_attention", "value_cache", zeros(P, PS, HKV, 0), ValueError, "Dv = 0 in [P, ps, Hkv, Dv]"),
]
# Axes that several arrays share: the changed arrays, and the message.
EMPTY_SHARED_AXES = [
    (
        "page_attention",
        {"query": zeros(S, HQ, 0), "key_cache": zeros(P, HKV, PS, 0), "value_cache": zeros(P, HKV, PS, 0)},
        "query has D = 0 in [S, Hq, D], expected D >= 1",
    ),
    (
        "prefill_page_attention",
        {"key_cache": zeros(0, P, PS, D), "value_cache": zeros(0, P, PS, D)},
        "key_cache has Hkv = 0 in [Hkv, P, ps, D], expected Hkv >= 1",
    ),
    (
        "unified_attention",
        {"key_cache": zeros(P, 0, HKV, D), "value_cache": zeros(P, 0, HKV, D)},
        "key_cache has ps = 0 in [P, ps, Hkv, D], expected ps >= 1",
    ),
    (
        "write_kv_pages",
        {"key": zeros(TOKENS, HKV, 0), "key_cache": zeros(P, PS, HKV, 0)},
        "key has D = 0 in [T, Hkv, D], expected D >= 1",
    ),
    (
        "ragged_decode_attention",
        {"query": zeros(S, HQ, 0), "key": zeros(S, KEYS, HKV, 0), "value": zeros(S, KEYS, HKV, 0)},
        "query has D = 0 in [B, Hq, D], expected D >= 1",
    ),
    (
        "attention",
        {"query": zeros(S, QUERIES, HQ, 0), "key": zeros(S, KEYS, HKV, 0)},
        "query has D = 0 in [B, Q, Hq, D], expected D >= 1",
    ),
]
MIXED_DTYPES = [
    *(
        wrong(operation, "value_cache", arguments(operation)["value_cache"].astype(np.float16), ValueError, "float16")
        for operation in (*PAGED, "write_kv_pages")
    ),
    *(
        wrong(operation, query(operation), arguments(operation)[query(operation)].astype(np.float16), ValueError, "key")
        for operation in (*PAGED, "ragged_decode_attention")
    ),
    wrong("merge_attention_states", "out_b", zeros(5, HQ, D, dtype=np.float16), ValueError, "float16", "float32"),
]
STATIC_NUMBERS = [
    param
    for operation in ATTENDING
    for argument, error_value in (
        (SCALE.get(operation, "softmax_scale"), float("nan")),
        (CAP.get(operation, "logits_soft_cap"), -1.0),
    )
    for param in (
        wrong(operation, argument, error_value, ValueError, str(error_value), "a finite number"),
        wrong(operation, argument, float("inf"), ValueError, "inf", "a finite number"),
        wrong(operation, argument, np.float32([0.5]), TypeError, "an array of shape (1,)", "Python number", "static"),
        wrong(operation, argument, True, TypeError, "True", "Python number"),
        wrong(operation, argument, "1", TypeError, "'1'", "Python number"),
    )
]
WINDOWS = [
    param
    for operation in ATTENDING
    for param in (
        wrong(operation, "sliding_window", 0, ValueError, "is 0", ">= 1"),
        wrong(operation, "sliding_window", -3, ValueError, "is -3", ">= 1"),
        wrong(operation, "sliding_window", (2, -1), ValueError, "sliding_window[1] is -1", ">= 0"),
        wrong(operation, "sliding_window", (1, 2, 3), ValueError, "(1, 2, 3)", "a pair"),
        wrong(operation, "sliding_window", 2.0, TypeError, "2.0", "integer"),
        wrong(operation, "sliding_window", True, TypeError, "True", "integer"),
        wrong(operation, "sliding_window", "8", TypeError, "'8'", "integer"),
        wrong(operation, "sliding_window", np.asarray(8), TypeError, "an array", "static"),
    )
]
CHOICES = [
    *(
        wrong(operation, "kv_layout", layout, ValueError, repr(layout), "PTHD, PHTD, HPTD")
        for operation in (*PAGED, "write_kv_pages")
        for layout in ("THPD", None)
    ),
    *(wrong(operation, "platform", "rocm", ValueError, "'rocm'", "triton, pallas, xla") for operation in OPERATIONS),
    *(wrong(operation, "platform", 3, ValueError, "is 3", "triton, pallas, xla") for operation in OPERATIONS),
    *(
        wrong(operation, "return_lse", 1, TypeError, "is 1", "bool")
        for operation in ATTENDING
        if operation != "attention"
    ),
    *(
        wrong(operation, "cfg", {"num_warps": 4}, TypeError, "num_warps", OBJECTS[operation].config_type.__name__)
        for operation in ATTENDING
    ),
    wrong("page_attention", "megacore_mode", "both", ValueError, "'both'", "kv_head, batch"),
    wrong("page_attention", "pages_per_compute_block", 0, ValueError, "is 0", ">= 1"),
    wrong("page_attention", "inline_seq_dim", 0, TypeError, "is 0", "bool"),
    wrong("page_attention", "num_splits", -1, ValueError, "is -1", ">= 0"),
    wrong("page_attention", "num_splits", 2.0, TypeError, "2.0", "integer"),
    wrong("page_attention", "max_context_len", -1, ValueError, "is -1", ">= 0"),
    wrong("page_attention", "max_context_len", np.asarray(4), TypeError, "an array", "static"),
    wrong("page_attention", "mask_value", None, TypeError, "None", "number"),
    wrong("prefill_page_attention", "mask_value", "low", TypeError, "'low'", "number"),
    wrong("unified_attention", "causal", None, TypeError, "None", "bool"),
    wrong("attention", "causal", 1, TypeError, "is 1", "bool"),
    wrong("attention", "deterministic", None, TypeError, "None", "bool"),
    wrong("attention", "return_weights", "yes", TypeError, "'yes'", "bool"),
    wrong("attention", "dropout_prob", 1.0, ValueError, "1.0", "< 1"),
    wrong("attention", "dropout_prob", -0.1, ValueError, "-0.1", ">= 0"),
    wrong("attention", "dropout_prob", np.asarray(0.1), TypeError, "an array", "static"),
    wrong("attention", "dropout_rng", 7, TypeError, "7", "random key"),
    wrong("attention", "dropout_rng", np.zeros(3, np.uint32), TypeError, "shape (3,)", "random key"),
    wrong("attention", "mask_info", NoMask(), TypeError, "answers None", "boolean mask"),
    *(
        wrong(operation, name, value, TypeError, fragment)
        for operation in OPERATIONS
        for name, array in itertools.islice(arguments(operation).items(), 1)
        for value, fragment in (
            (jax.random.key(0), "has dtype key<fry>"),
            (jax.ShapeDtypeStruct(array.shape, array.dtype), "is ShapeDtypeStruct"),
        )
    ),
    wrong("attention", "dtype", jnp.int8, TypeError, "int8", "float32, float16, bfloat16"),
    wrong("attention", "dtype", "wide", TypeError, "'wide'", "float32, float16, bfloat16"),
    wrong("attention", "softmax_dtype", jnp.int32, TypeError, "int32", "float32, float16, bfloat16"),
    wrong("attention", "mask_info", zeros(S, 1, 3, 8), TypeError, "array", "get_or_compute_attention_mask"),
    wrong("attention", "init_bias", 3, TypeError, "is 3", "a function"),
    wrong("attention", "init_bias", lambda: zeros(3), ValueError, "init_bias() has shape (3,)", "broadcastable"),
]


@pytest.mark.parametrize(
    ("operation", "changes", "error", "fragments"),
    RANKS
    + NOT_ARRAYS
    + INDEX_DTYPES
    + FLOAT_DTYPES
    + OPTIONAL_ARRAYS
    + SIZES
    + EMPTY_AXES
    + MIXED_DTYPES
    + STATIC_NUMBERS
    + WINDOWS
    + CHOICES,
)
def test_wrong_argument(
    operation: str, changes: dict[str, Any], error: type[Exception], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(error) as raised:
        run(operation, arguments(operation), **changes)
    message = str(raised.value)
    missing = [part for part in (f"{operation}: ", "expected", *fragments) if part not in message]
    assert not missing, message
    # A size may be reported where it is found to disagree, so the argument is named by itself or as the source.
    assert any(name in message for name in changes), message


@pytest.mark.parametrize(("operation", "changes", "message"), EMPTY_SHARED_AXES)
def test_empty_axis_is_named_with_the_axes_of_its_argument(
    operation: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{operation}: {message}")):
        run(operation, arguments(operation), **changes)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_error_comes_while_tracing(operation: str) -> None:
    named = arguments(operation)
    name = next(iter(named))
    with pytest.raises(ValueError, match=f"{operation}: {name} has shape"):
        jax.eval_shape(lambda array: run(operation, named, **{name: array}), named[name][None, None])


STATIC = {"softmax_scale", "logits_soft_cap", "sliding_window", "max_context_len", "dropout_prob"}
STATIC |= {*SCALE.values(), *CAP.values()}


@pytest.mark.parametrize(
    ("operation", "argument"),
    [(operation, argument) for operation in ATTENDING for argument in sorted(STATIC & parameters(operation).keys())],
)
def test_static_arguments_refuse_tracers(operation: str, argument: str) -> None:
    value = 2 if argument in ("sliding_window", "max_context_len") else 0.5
    pattern = rf"{operation}: {argument} is a traced value .*expected .*it is static"
    with pytest.raises(TypeError, match=pattern):
        jax.jit(lambda number: run(operation, arguments(operation), **{argument: number}))(value)


@pytest.mark.parametrize("operation", ATTENDING)
def test_window_pair_refuses_tracers(operation: str) -> None:
    with pytest.raises(TypeError, match=rf"{operation}: sliding_window\[0\] is a traced value"):
        jax.jit(lambda left: run(operation, arguments(operation), sliding_window=(left, 0)))(2)


def test_dropout_needs_a_key() -> None:
    with pytest.raises(ValueError, match="attention: dropout_rng is None, expected a random key"):
        run("attention", arguments("attention"), deterministic=False, dropout_prob=0.5)


@pytest.mark.parametrize(
    ("operation", "platform"),
    [
        (operation, platform)
        for operation in OPERATIONS
        for platform in ("triton", "pallas", "cuda")
        if OBJECTS[operation].implementation(platform) is None
    ],
)
def test_absent_platform_is_refused(operation: str, platform: str) -> None:
    pattern = rf'{operation}\[{platform}\] does not support this operation; use platform="xla"'
    with pytest.raises(NotImplementedError, match=pattern):
        run(operation, arguments(operation), platform=platform)


@pytest.mark.parametrize("platform", [None, "auto", "xla", "triton"])
@pytest.mark.parametrize(
    "hint", [{"pages_per_compute_block": 2}, {"megacore_mode": "batch"}, {"inline_seq_dim": False}], ids=str
)
def test_tpu_hints_are_refused_elsewhere(platform: str | None, hint: dict[str, Any]) -> None:
    named = f"{platform if platform == 'triton' else 'xla'}"
    (name,) = hint
    pattern = rf'page_attention\[{named}\] does not support {name}.*belongs to platform="pallas"'
    with pytest.raises(NotImplementedError, match=pattern):
        run("page_attention", arguments("page_attention"), platform=platform, **hint)


@pytest.mark.parametrize("operation", ["page_attention", "attention"])
def test_platform_argument_before_configuration(operation: str) -> None:
    config_type: Any = OBJECTS[operation].config_type
    unsupported = "cuda" if operation == "page_attention" else "pallas"
    with pytest.raises(NotImplementedError, match=rf"{operation}\[{unsupported}\]"):
        run(operation, arguments(operation), cfg=config_type(platform=unsupported))
    run(operation, arguments(operation), cfg=config_type(platform=unsupported), platform="xla")
    with pytest.raises(ValueError, match=r"cfg\.backend is 'tpu', expected any or gpu"):
        run(operation, arguments(operation), cfg=config_type(backend="tpu"), platform="triton")


@pytest.mark.parametrize(
    "config_type",
    [
        jax_bridge.PageAttentionConfig,
        jax_bridge.PrefillPageAttentionConfig,
        jax_bridge.UnifiedAttentionConfig,
        jax_bridge.FwdParams,
        jax_bridge.AttentionConfig,
        jax_bridge.RaggedDecodeAttentionConfig,
    ],
)
def test_configurations_check_their_fields(config_type: Any) -> None:
    bad = {
        "num_warps": (3, 64, 0),
        "num_stages": (0, 33),
        "num_splits": (-1,),
        "block_m": (48,),
        "block_q": (0,),
        "block_n": (8, 24),
        "decode_block_n": (8,),
        "platform": ("rocm",),
        "backend": ("cuda",),
        "num_key_splits": (-1,),
        "kv_blocksize": (24,),
    }
    fields = {field.name for field in dataclasses.fields(config_type)}
    for name, values in bad.items():
        for value in values if name in fields else ():
            with pytest.raises(ValueError, match=rf"{config_type.__name__}: {name} is {value!r}, expected"):
                config_type(**{name: value})
    for name in fields - {"platform", "backend"}:
        with pytest.raises(TypeError, match=rf"{config_type.__name__}: {name} is '4', expected"):
            config_type(**{name: "4"})
    assert hash(config_type()) == hash(config_type())


TOO_LARGE = {
    "page_attention": jax_bridge.PageAttentionConfig(block_n=1 << 40),
    "prefill_page_attention": jax_bridge.PrefillPageAttentionConfig(block_m=1 << 21),
    "unified_attention": jax_bridge.UnifiedAttentionConfig(decode_block_m=1 << 25),
    "ragged_decode_attention": jax_bridge.RaggedDecodeAttentionConfig(jax_bridge.FwdParams(kv_blocksize=1 << 25)),
    "attention": jax_bridge.AttentionConfig(block_q=1 << 25),
}


@pytest.mark.skipif(not HAS_KERNEL, reason="no Triton")
@pytest.mark.parametrize("operation", TOO_LARGE)
def test_tiles_beyond_what_triton_holds_are_refused(operation: str) -> None:
    with pytest.raises(ValueError, match=rf"{operation}: cfg asks for tiles of .* elements, expected at most 1048576"):
        run(operation, arguments(operation), platform="triton", cfg=TOO_LARGE[operation])


MASK_ERRORS = [
    (lambda: jax_bridge.MaskInfo.from_attention_mask(zeros(S, 1, 3, 8)), TypeError, "mask has dtype float32.*bool"),
    (lambda: jax_bridge.MaskInfo.from_attention_mask(zeros(3, 8, dtype=bool)), ValueError, r"mask has shape \(3, 8\)"),
    (lambda: jax_bridge.MaskInfo.from_segments(zeros(S, 3), zeros(S, 8)), TypeError, "q_segment_ids has dtype float32"),
    (
        lambda: jax_bridge.MaskInfo.from_segments(zeros(2, 3, dtype=int), zeros(1, 8, dtype=int)),
        ValueError,
        r"kv_segment_ids has shape \(1, 8\), expected .*B = 2",
    ),
    (lambda: jax_bridge.MaskInfo().get_or_compute_attention_mask(), ValueError, "attention_mask is None"),
]


@pytest.mark.parametrize(("make", "error", "pattern"), MASK_ERRORS)
def test_mask_errors(make: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        make()


@pytest.mark.parametrize("heads", [2, 3])
def test_mask_of_another_shape_is_refused(heads: int) -> None:
    info = jax_bridge.MaskInfo.from_attention_mask(np.ones((S, heads, QUERIES, KEYS), bool))
    with pytest.raises(ValueError, match=rf"attention: mask_info has shape \(2, {heads}, 3, 8\), expected .*Hq = 4"):
        run("attention", arguments("attention"), mask_info=info)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_object_and_function_agree(operation: str) -> None:
    """The object's `invocation` has the function's arguments, in order, with the same defaults and kinds."""
    outside = {"platform", "cfg", "mesh", "in_specs", "out_specs"}
    public = {name: (p.kind, p.default) for name, p in parameters(operation).items() if name not in outside}
    own = {name: (p.kind, p.default) for name, p in inspect.signature(OBJECTS[operation].invocation).parameters.items()}
    assert own == public
