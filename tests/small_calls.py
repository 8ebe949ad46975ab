"""One small valid call of every operation, as numpy arrays by argument name, for the tests of errors and of tracing."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import jax_bridge

Arguments = Mapping[str, Any]

S, HQ, HKV, D, P, PS, MP = 2, 4, 2, 16, 6, 4, 3
TOKENS, QUERIES, KEYS = 5, 3, 8

OPERATIONS = (
    "page_attention",
    "prefill_page_attention",
    "unified_attention",
    "ragged_decode_attention",
    "attention",
    "write_kv_pages",
    "merge_attention_states",
)
PAGED = ("page_attention", "prefill_page_attention", "unified_attention")
ATTENDING = (*PAGED, "ragged_decode_attention", "attention")


def function(operation: str) -> Callable[..., Any]:
    return getattr(jax_bridge, operation)


def arguments(operation: str, seed: int = 0) -> dict[str, Any]:
    """The required arguments; another seed changes values only."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def indices(*values: Any) -> np.ndarray:
        return np.asarray(values, np.int32)

    tables = rng.permutation(P).astype(np.int32).reshape(S, MP)
    if operation == "page_attention":
        lens = indices(9, 4 + seed)
        caches = {"key_cache": normal(P, HKV, PS, D), "value_cache": normal(P, HKV, PS, D)}
        return {"query": normal(S, HQ, D), **caches, "context_lens": lens, "block_tables": tables}
    if operation == "prefill_page_attention":
        caches = {"key_cache": normal(HKV, P, PS, D), "value_cache": normal(HKV, P, PS, D)}
        chunk = {"query": normal(QUERIES, HQ, D), **caches}
        return {**chunk, "context_len": indices(10 - seed), "page_indices": tables[0]}
    if operation == "unified_attention":
        caches = {"key_cache": normal(P, PS, HKV, D), "value_cache": normal(P, PS, HKV, D)}
        starts = indices(0, 3 - seed % 2, 4)
        lens = indices(9, 4 + seed)
        packed = {"queries": normal(TOKENS, HQ, D), **caches, "kv_lens": lens}
        return {**packed, "block_tables": tables, "query_start_loc": starts}
    if operation == "ragged_decode_attention":
        dense = {"query": normal(S, HQ, D), "key": normal(S, KEYS, HKV, D), "value": normal(S, KEYS, HKV, D)}
        return {**dense, "sequence_start": indices(0, 2), "sequence_end": indices(KEYS, 5 + seed)}
    if operation == "attention":
        shapes = {"query": (S, QUERIES, HQ, D), "key": (S, KEYS, HKV, D), "value": (S, KEYS, HKV, D)}
        return {name: normal(*shape) for name, shape in shapes.items()}
    if operation == "write_kv_pages":
        tokens = {"key": normal(TOKENS, HKV, D), "value": normal(TOKENS, HKV, D)}
        caches = {"key_cache": normal(P, PS, HKV, D), "value_cache": normal(P, PS, HKV, D)}
        return {**tokens, **caches, "slot_mapping": indices(3, -1, 9 + seed, 20, 1000)}
    rows = {"a": normal(TOKENS, HQ, D), "b": normal(TOKENS, HQ, D)}
    lses = {"a": normal(TOKENS, HQ), "b": normal(TOKENS, HQ)}
    return {"out_a": rows["a"], "lse_a": lses["a"], "out_b": rows["b"], "lse_b": lses["b"]}


def optional_arrays(operation: str, seed: int = 0) -> dict[str, Any]:
    """Every optional array that the operation takes and a tracer may stand for."""
    rng = np.random.default_rng(100 + seed)
    every = {
        "attention_sink": rng.normal(size=HQ).astype(np.float32),
        "alibi_slopes": rng.uniform(0.1, 1, HQ).astype(np.float32),
        "k_scale": rng.uniform(0.5, 2, HKV).astype(np.float32),
        "v_scale": rng.uniform(0.5, 2, HKV).astype(np.float32),
        "qq_bias": rng.normal(size=(QUERIES, QUERIES)).astype(np.float32),
        "bias": rng.normal(size=(S, 1, QUERIES, KEYS)).astype(np.float32),
        "softmax_aux": rng.normal(size=(HQ, 2)).astype(np.float32),
    }
    return {name: array for name, array in every.items() if name in parameters(operation)}


def parameters(operation: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function(operation)).parameters


def call(target: Callable[..., Any], operation: str, named: Arguments, **options: Any) -> Any:
    """Call `target`, which has the operation's signature, with arguments by name."""
    named = {**named, **options}
    given = []
    for name, parameter in parameters(operation).items():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            given.append(named.pop(name, None if parameter.default is parameter.empty else parameter.default))
    return target(*given, **named)


def run(operation: str, named: Arguments, **options: Any) -> Any:
    """Call the public function with arguments by name."""
    return call(function(operation), operation, named, **options)


def assert_close(left: Any, right: Any) -> None:
    """Compare trees of float32 answers."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), left, right)
