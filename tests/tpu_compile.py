"""Compiles calls for TPUs ahead of time, on a host without one: libtpu holds the whole compiler."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

import jax_bridge
from tests.cases import NATIVE_LAYOUT

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A call of one operation: sizes of the arrays and whatever the call asks for."""

    name: str
    operation: str
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    value_head_dim: int | None = None
    page_size: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    num_seqs: int = 64
    num_tokens: int = 512
    table_width: int = 64
    dense_len: int = 4096
    num_pages: int = 2048
    kv_layout: str | None = None
    is_row_major: bool = False
    """Whether the cache lies in memory in the order of its axes, instead of in XLA's own order."""
    per_head: tuple[str, ...] = ()
    qq_bias: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def cache_shape(self) -> tuple[int, ...]:
        if self.operation == "ragged_decode_attention":
            return (self.num_seqs, self.dense_len, self.num_kv_heads, self.head_dim)
        layout = self.kv_layout or NATIVE_LAYOUT[self.operation]
        sizes = {"P": self.num_pages, "T": self.page_size, "H": self.num_kv_heads, "D": self.head_dim}
        return tuple(sizes[axis] for axis in layout)

    def arguments(self, sharding: Any = None) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, arrays as `jax.ShapeDtypeStruct`s."""

        def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def cache(head_dim: int) -> jax.ShapeDtypeStruct:
            place: Any = Format(Layout((0, 1, 2, 3)), sharding) if self.is_row_major else sharding
            dtype = jnp.dtype(self.cache_dtype or self.dtype)
            return jax.ShapeDtypeStruct((*self.cache_shape[:-1], head_dim), dtype, sharding=place)

        caches = [cache(self.head_dim), cache(self.value_head_dim or self.head_dim)]
        rows = self.num_seqs if self.operation in ("page_attention", "ragged_decode_attention") else self.num_tokens
        query = array(rows, self.num_q_heads, self.head_dim, dtype=jnp.dtype(self.dtype))
        lens, tables = array(self.num_seqs), array(self.num_seqs, self.table_width)
        integers = {
            "page_attention": [lens, tables],
            "prefill_page_attention": [array(1), array(self.table_width)],
            "unified_attention": [lens, tables, array(self.num_seqs + 1)],
            "ragged_decode_attention": [lens, lens],
        }[self.operation]
        keywords: dict[str, Any] = dict(self.options)
        if self.kv_layout is not None:
            keywords["kv_layout"] = self.kv_layout
        for name in self.per_head:
            heads = self.num_kv_heads if name in ("k_scale", "v_scale") else self.num_q_heads
            keywords[name] = array(heads, dtype=jnp.float32)
        if self.qq_bias:
            keywords["qq_bias"] = array(self.qq_bias, self.qq_bias, dtype=jnp.float32)
        return [query, *caches, *integers], keywords


@dataclass(frozen=True)
class Program:
    """What the compiler made of a call."""

    text: str
    temporary_bytes: int
    cache_shape: tuple[int, ...]

    @property
    def kernels(self) -> int:
        """Calls of Pallas kernels."""
        return self.text.count('custom_call_target="tpu_custom_call"')

    @property
    def cache_copies(self) -> list[str]:
        """Instructions other than the kernel that produce an array as large as the cache."""
        shape = ",".join(map(str, self.cache_shape))
        made = rf"= \w+\[{shape}\]\S* (?!parameter|get-tuple-element|bitcast)[\w-]+\("
        return [line.strip() for line in self.text.splitlines() if re.search(made, line)]


@functools.cache
def sharding_on(chip: str) -> SingleDeviceSharding:
    """One device of a chip that is not here."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks no cloud about this host
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor locks out other processes: there is no TPU to share
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return SingleDeviceSharding(topology.devices[0])


def compiled(variant: Variant, chip: str, platform: str = "pallas", **options: Any) -> Program:
    """A call, compiled for a chip."""
    arrays, keywords = variant.arguments(sharding_on(chip))
    static = {name: value for name, value in keywords.items() if not hasattr(value, "shape")}
    terms = {name: value for name, value in keywords.items() if hasattr(value, "shape")}
    function = getattr(jax_bridge, variant.operation)

    def call(arrays: Any, terms: Any) -> Any:
        return function(*arrays, **terms, **static, **options, platform=platform)

    program = jax.jit(call).lower(arrays, terms).compile()
    return Program(program.as_text(), program.memory_analysis().temp_size_in_bytes, variant.cache_shape)
