"""Bugs for the jnp implementation: wrong functions, to stand in for the right ones while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from reference import blocks, paging, scores

right_softmax = scores.softmax
right_visible_range = paging.visible_range
right_per_kv_head = scores.per_kv_head
right_bias_between = blocks.bias_between


def _cap_ignored(logits: Any, soft_cap: Any) -> Any:
    return logits


def _cap_through_exp(logits: Any, soft_cap: Any) -> Any:
    if not soft_cap:
        return logits
    up, down = jnp.exp(logits / soft_cap), jnp.exp(-logits / soft_cap)
    return soft_cap * (up - down) / (up + down)


def _everything_seen(visible: Any) -> Any:
    return jnp.ones_like(jnp.any(visible, axis=(1, 2))[:, :, None, None])


def _sinks_twice(logits: Any, visible: Any, sinks: Any) -> Any:
    return right_softmax(logits, visible, jnp.concatenate([sinks, sinks], axis=1))


def _finite_mask(logits: Any, visible: Any, sinks: Any) -> Any:
    return right_softmax(jnp.where(visible, logits, -1.0), True, sinks)


def _lse_in_base_2(logits: Any, visible: Any, sinks: Any) -> Any:
    weights, lse = right_softmax(logits, visible, sinks)
    return weights, lse / jnp.log(2.0)


def _one_more_before(*arguments: Any, **keywords: Any) -> Any:
    lower, upper = right_visible_range(*arguments, **keywords)
    return jnp.maximum(lower - 1, 0), upper


def _one_fewer_behind(*arguments: Any, **keywords: Any) -> Any:
    lower, upper = right_visible_range(*arguments, **keywords)
    return lower, upper - 1


def _wrong_head(scale: Any, num_kv_heads: int) -> Any:
    return jnp.roll(right_per_kv_head(scale, num_kv_heads), 1)


def _transposed(qq_bias: Any, rows: Any, columns: Any) -> Any:
    return right_bias_between(qq_bias.T, rows, columns)


REFERENCE_BUGS: dict[str, tuple[ModuleType, str, Callable[..., Any]]] = {
    "cap_ignored": (scores, "soft_capped", _cap_ignored),
    "cap_through_exp": (scores, "soft_capped", _cap_through_exp),
    "nan_leak": (scores, "seen_keys", _everything_seen),
    "sinks_twice": (scores, "softmax", _sinks_twice),
    "finite_mask": (scores, "softmax", _finite_mask),
    "lse_in_base_2": (scores, "softmax", _lse_in_base_2),
    "one_more_before": (paging, "visible_range", _one_more_before),
    "one_fewer_behind": (paging, "visible_range", _one_fewer_behind),
    "scale_of_wrong_head": (scores, "per_kv_head", _wrong_head),
    "qq_bias_transposed": (blocks, "bias_between", _transposed),
}
"""By name: the module, the name that is looked up there, the wrong function."""
