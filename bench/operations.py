"""The operations of `jax_bridge` that are timed, called alike, and their configurations as text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax_bridge
from bench.cases import AttentionCase

DEFAULT_CONFIG = "default"

Config = dict[str, Any]  # fields of the operation's configuration: integers and booleans


@dataclass(frozen=True)
class Operation:
    """An operation of `jax_bridge` as the benchmarks call it, with the arrays of `unified_attention`."""

    name: str
    config_type: Callable[..., Any]
    call: Callable[..., Any]
    """Called with query, both caches, kv_lens, query_start_loc, block_tables, the soft cap, and what all share."""
    requirement: str
    """What the operation asks of a case, in words."""
    accepts: Callable[[AttentionCase], bool]


def _call_unified(
    query: Any, key_cache: Any, value_cache: Any, kv_lens: Any, starts: Any, tables: Any, soft_cap: Any, **options: Any
) -> Any:
    return jax_bridge.unified_attention(
        query, key_cache, value_cache, kv_lens, tables, starts, logits_soft_cap=soft_cap, **options
    )


def _call_page(
    query: Any, key_cache: Any, value_cache: Any, kv_lens: Any, starts: Any, tables: Any, soft_cap: Any, **options: Any
) -> Any:
    del starts
    return jax_bridge.page_attention(
        query, key_cache, value_cache, kv_lens, tables, attn_logits_soft_cap=soft_cap, **options
    )


def _call_prefill(
    query: Any, key_cache: Any, value_cache: Any, kv_lens: Any, starts: Any, tables: Any, soft_cap: Any, **options: Any
) -> Any:
    del starts
    return jax_bridge.prefill_page_attention(
        query, key_cache, value_cache, kv_lens, tables.reshape(-1), attn_logits_soft_cap=soft_cap, **options
    )


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("unified_attention", jax_bridge.UnifiedAttentionConfig, _call_unified, "anything", lambda case: True),
        Operation(
            "page_attention",
            jax_bridge.PageAttentionConfig,
            _call_page,
            "one new token a sequence",
            lambda case: case.is_decode,
        ),
        Operation(
            "prefill_page_attention",
            jax_bridge.PrefillPageAttentionConfig,
            _call_prefill,
            "one sequence",
            lambda case: case.num_seqs == 1,
        ),
    )
}


def parse_configs(text: str) -> list[Config]:
    """Configurations separated by `;`, fields by `,`: `default;block_n=64,num_warps=4`."""
    configs: list[Config] = []
    for item in text.split(";"):
        fields = [field.partition("=") for field in item.split(",") if field.strip() not in ("", DEFAULT_CONFIG)]
        configs.append({name.strip(): _field_value(value) for name, _, value in fields})
    return configs


def parse_sweep(text: str) -> list[Config]:
    """All combinations of a grid `block_n=32,64;num_warps=4,8`, after the default configuration."""
    axes = [axis.partition("=") for axis in text.split(";") if axis.strip()]
    names = [name.strip() for name, _, _ in axes]
    values = [[_field_value(value) for value in choices.split(",")] for _, _, choices in axes]
    return [{}, *(dict(zip(names, choice, strict=True)) for choice in itertools.product(*values))]


def _field_value(text: str) -> int | bool:
    word = text.strip().lower()
    return word == "true" if word in ("true", "false") else int(word)


def config_name(config: Config) -> str:
    return ",".join(f"{name}={value}" for name, value in config.items()) or DEFAULT_CONFIG
