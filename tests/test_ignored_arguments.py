"""No argument is accepted and ignored."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from tests.small_calls import (
    KEYS,
    MP,
    OPERATIONS,
    PS,
    QUERIES,
    D,
    S,
    arguments,
    optional_arrays,
    parameters,
    run,
)

CHANGES: dict[str, dict[str, Any]] = {
    "softmax_scale": {"softmax_scale": 0.9},
    "attn_scale": {"attn_scale": 0.9},
    "sliding_window": {"sliding_window": 2},
    "logits_soft_cap": {"logits_soft_cap": 0.5},
    "attn_logits_soft_cap": {"attn_logits_soft_cap": 0.5},
    "return_lse": {"return_lse": True},
    "return_weights": {"return_weights": True},
    "dtype": {"dtype": jnp.float32},
    "softmax_dtype": {"softmax_dtype": jnp.bfloat16},
    "mask_info": {
        "mask_info": jax_bridge.MaskInfo.from_attention_mask(np.tri(QUERIES, KEYS, dtype=bool)[None, None].repeat(S, 0))
    },
    "init_bias": {"init_bias": lambda: np.arange(KEYS, dtype=np.float32)},
    "dropout_rng": {"dropout_rng": np.asarray([0, 1], np.uint32), "deterministic": False, "dropout_prob": 0.5},
}
CHANGES |= {name: CHANGES["dropout_rng"] for name in ("dropout_prob", "deterministic")}
# Never change a result, by contract.
HINTS = {"mask_value": -1.0, "num_splits": 3, "max_context_len": MP * PS, "platform": "xla"}
# Refused where they mean nothing, or tested by themselves.
ELSEWHERE = {"pages_per_compute_block", "megacore_mode", "inline_seq_dim", "mesh", "in_specs", "out_specs", "cfg"}


def equal_axes(named: dict[str, Any]) -> dict[str, Any]:
    """Caches that every layout fits, and what goes with them."""
    rng = np.random.default_rng(1)
    caches: dict[str, Any] = {
        name: rng.normal(size=(4, 4, 4, D)).astype(np.float32) for name in ("key_cache", "value_cache")
    }
    tables: dict[str, Any] = {name: named[name] % 4 for name in ("block_tables", "page_indices") if name in named}
    tokens: dict[str, Any] = {name: np.ones((5, 4, D), np.float32) for name in ("key", "value") if name in named}
    return {**caches, **tables, **tokens}


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (operation, name)
        for operation in OPERATIONS
        for name in parameters(operation)
        if name not in ELSEWHERE | arguments(operation).keys()
    ],
)
def test_nothing_is_accepted_and_ignored(operation: str, name: str) -> None:
    """Every optional argument changes the answer, but for the hints, which must not."""
    named = arguments(operation)
    if operation == "attention" and name != "dtype":
        named["dtype"] = jnp.float16
    if name == "kv_layout":
        named |= equal_axes(named)
    before = run(operation, named)
    if name in HINTS:
        after = run(operation, named, **{name: HINTS[name]})
        jax.tree.map(np.testing.assert_array_equal, before, after)
        return
    default = parameters(operation)[name].default
    change = (
        CHANGES.get(name)
        or {
            "causal": lambda: {"causal": not default},
            "kv_layout": lambda: {"kv_layout": "PHTD" if default == "PTHD" else "PTHD"},
        }.get(name, lambda: {name: optional_arrays(operation)[name]})()
    )
    after = run(operation, named, **change)
    if isinstance(before, tuple) == isinstance(after, tuple):
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        assert any(left.dtype != right.dtype or np.any(np.asarray(left) != np.asarray(right)) for left, right in pairs)
