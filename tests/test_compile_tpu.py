"""Every kernel compiled by the TPU's own compiler, for chips that are not here."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from tests.implementations import ON_GPU
from tests.tpu_compile import TOPOLOGIES, Variant, compiled

if ON_GPU or importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs libtpu, and no GPU in its process", allow_module_level=True)

FULL = os.environ.get("HYPOTHESIS_PROFILE") == "full"
PAGED = ("page_attention", "prefill_page_attention", "unified_attention")
OPERATIONS = (*PAGED, "ragged_decode_attention")

AXES: dict[str, tuple[Any, ...]] = {
    "operation": PAGED,
    "chip": tuple(TOPOLOGIES),
    "dtype": ("bfloat16", "float32"),
    "head_dim": (64, 80, 128, 256),
    "group_size": (1, 3, 4, 8, 71),
    "page_size": (8, 16, 20, 64),
    "kv_layout": ("PTHD", "PHTD", "HPTD"),
    "features": ("plain", "window", "sinks_cap", "alibi_lse", "scales"),
}
"""What is combined: every value of each axis with every value of every other."""

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"options": (("sliding_window", 100),)},
    "sinks_cap": {"per_head": ("attention_sink",)},
    "alibi_lse": {"per_head": ("alibi_slopes",), "options": (("return_lse", True),)},
    "scales": {"per_head": ("k_scale", "v_scale")},
}


LARGE_CACHE = 2**28
"""Elements of a cache that XLA does not take into faster memory as a whole."""


def pairs(choice: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The pairs of values that a choice of one value an axis covers."""
    return itertools.combinations(sorted(choice.items()), 2)


def pairwise(axes: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Choices of a value an axis, few of them, that hold every pair of values of two axes."""
    names = list(axes)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]
    every.sort(key=lambda choice: zlib.crc32(repr(choice).encode()))
    missing = set(itertools.chain.from_iterable(map(pairs, every)))
    chosen = []
    while missing:
        sample = [choice for choice in every[: len(every) // 8] if not missing.isdisjoint(pairs(choice))] or every
        best = max(sample, key=lambda choice: sum(pair in missing for pair in pairs(choice)))
        chosen.append(best)
        missing -= set(pairs(best))
    return chosen


def choices() -> list[dict[str, Any]]:
    """Over pages, and over dense rows."""
    ragged = {name: AXES[name] for name in ("chip", "dtype", "head_dim", "group_size")}
    ragged = {"operation": ("ragged_decode_attention",), **ragged, "features": ("plain", "window", "lse")}
    if FULL:
        return [
            dict(zip(axes, values, strict=True))
            for axes in (AXES, ragged)
            for values in itertools.product(*axes.values())
        ]
    return [*pairwise(AXES), *pairwise(ragged)]


def variant_of(choice: dict[str, Any]) -> Variant:
    operation, feature = choice["operation"], choice["features"]
    heads = 1 if choice["group_size"] > 8 else 2
    fields = dict(FEATURES.get(feature, {"options": (("return_lse", True),)}))
    if feature == "sinks_cap":
        cap = "logits_soft_cap" if operation == "unified_attention" else "attn_logits_soft_cap"
        fields["options"] = ((cap, 30.0),)
    if feature == "scales":
        fields["cache_dtype"] = ("int8", "float8_e4m3fn", "float8_e5m2")[choice["head_dim"] // 16 % 3]
    return Variant(
        name="-".join(str(value) for value in choice.values()),
        operation=operation,
        num_q_heads=heads * choice["group_size"],
        num_kv_heads=heads,
        head_dim=choice["head_dim"],
        page_size=choice.get("page_size", 16),
        kv_layout=choice.get("kv_layout"),
        dtype=choice["dtype"],
        num_seqs=4096 if operation == "ragged_decode_attention" else 8,
        num_tokens=64,
        dense_len=500,
        num_pages=LARGE_CACHE // (choice.get("page_size", 1) * heads * choice["head_dim"]),
        is_row_major=True,
        **fields,
    )


VARIANTS = [pytest.param(variant_of(choice), choice["chip"], id=variant_of(choice).name) for choice in choices()]


@pytest.mark.parametrize(("variant", "chip"), VARIANTS)
def test_variant_compiles(variant: Variant, chip: str) -> None:
    program = compiled(variant, chip)
    assert program.kernels == 1
    assert program.cache_copies == []


LLAMA = {operation: Variant(name="llama3_8b", operation=operation) for operation in OPERATIONS}
each_operation = pytest.mark.parametrize("operation", OPERATIONS)
each_chip = pytest.mark.parametrize("chip", TOPOLOGIES)


@each_operation
@each_chip
def test_llama_compiles_as_xla_lays_its_arrays_out(operation: str, chip: str) -> None:
    """At full size with default blocks, and without a copy of the cache."""
    program = compiled(LLAMA[operation], chip)
    assert program.kernels == 1
    assert program.cache_copies == []
    assert program.temporary_bytes <= 2**20


HEAVY: dict[str, dict[str, Any]] = {
    "many_heads": {"num_q_heads": 32, "num_kv_heads": 32},
    "wide_heads": {"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 256},
    "wide_values": {"num_q_heads": 16, "num_kv_heads": 16, "head_dim": 192, "value_head_dim": 128, "page_size": 64},
    "group_71": {"num_q_heads": 71, "num_kv_heads": 1, "head_dim": 64},
    "qq_bias": {"num_q_heads": 16, "qq_bias": 64},
    "float32": {"num_q_heads": 32, "num_kv_heads": 32, "dtype": "float32"},
    "float16": {"num_q_heads": 16, "dtype": "float16"},
}


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (operation, name)
        for name, fields in HEAVY.items()
        for operation in ("prefill_page_attention", "unified_attention")
        if operation == "unified_attention" or not fields.keys() & {"value_head_dim", "qq_bias"}
    ],
)
def test_default_blocks_fit_the_smallest_chip(operation: str, name: str) -> None:
    """The chip with least memory takes what the estimate lets through."""
    assert compiled(Variant(name=name, operation=operation, **HEAVY[name]), "v4").kernels == 1


@pytest.mark.parametrize("head_dim", [64, 96, 192])
def test_caches_in_row_major_order_are_not_copied(head_dim: int) -> None:
    """XLA's own order for narrow or odd heads differs: there a copy shows, which `Format` avoids."""
    narrow = Variant(name="narrow", operation="page_attention", head_dim=head_dim)
    assert compiled(narrow, "v5e").cache_copies
    row_major = Variant(name="narrow", operation="page_attention", head_dim=head_dim, is_row_major=True)
    assert compiled(row_major, "v5e").cache_copies == []


HINTS: dict[str, dict[str, Any]] = {
    "pages_per_compute_block": {"pages_per_compute_block": 4},
    "batch": {"megacore_mode": "batch"},
    "kv_head": {"megacore_mode": "kv_head"},
    "grid": {"inline_seq_dim": False},
    "all": {"pages_per_compute_block": 2, "megacore_mode": "kv_head", "inline_seq_dim": False},
}


@pytest.mark.parametrize("hints", HINTS)
@pytest.mark.parametrize("chip", ["v4", "v5p"])
def test_hints_compile(hints: str, chip: str) -> None:
    for layout in ("PHTD", "PTHD"):
        variant = Variant(name=hints, operation="page_attention", num_q_heads=16, kv_layout=layout)
        assert compiled(variant, chip, **HINTS[hints]).kernels == 1


class TestRefusals:
    """What does not fit is refused before it is launched, in words that say what to do."""

    def test_tables_beyond_scalar_memory(self) -> None:
        wide = Variant(name="wide", operation="page_attention", num_seqs=2048, table_width=256, num_pages=8)
        with pytest.raises(NotImplementedError, match=r"block_tables of 524288 entries: .*fewer sequences a call"):
            compiled(wide, "v5e")
        arrays, _ = wide.arguments()
        automatic = jax.jit(jax_bridge.page_attention).trace(*arrays).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" not in automatic.as_text()

    def test_largest_tables_compile(self) -> None:
        assert compiled(Variant(name="wide", operation="unified_attention", table_width=4000), "v5e").kernels == 1

    def test_pages_beyond_vector_memory(self) -> None:
        large = Variant(name="large", operation="unified_attention", num_kv_heads=32, page_size=1024)
        with pytest.raises(NotImplementedError, match=r"blocks of 1024 keys .*vector memory.*smaller pages"):
            compiled(large, "v5e")

    @pytest.mark.parametrize(
        ("operation", "cfg", "fields"),
        [
            ("page_attention", jax_bridge.PageAttentionConfig(block_n=1 << 20), "cfg.block_n"),
            ("unified_attention", jax_bridge.UnifiedAttentionConfig(block_n=4096), "cfg.block_m and cfg.block_n"),
            (
                "ragged_decode_attention",
                jax_bridge.RaggedDecodeAttentionConfig(jax_bridge.FwdParams(kv_blocksize=4096)),
                "cfg.fwd_params.kv_blocksize",
            ),
        ],
    )
    def test_blocks_of_a_configuration(self, operation: str, cfg: Any, fields: str) -> None:
        words = rf"{operation}\[pallas\]: with the {fields} given, blocks of \d+ tokens and \d+ keys need \d+ bytes"
        with pytest.raises(ValueError, match=words):
            compiled(dataclasses.replace(LLAMA[operation], table_width=1024, dense_len=8192), "v5e", cfg=cfg)

    def test_pages_of_a_compute_block(self) -> None:
        many = Variant(name="many", operation="page_attention", num_kv_heads=32)
        with pytest.raises(NotImplementedError, match="fewer pages a compute block"):
            compiled(many, "v5e", pages_per_compute_block=64)

    @pytest.mark.parametrize(
        ("heads", "layout", "words"), [(7, "PHTD", "odd number of KV heads"), (6, "PTHD", "multiple of 4")]
    )
    def test_heads_that_two_cores_cannot_share(self, heads: int, layout: str, words: str) -> None:
        fields = {"num_q_heads": heads, "num_kv_heads": heads, "kv_layout": layout}
        with pytest.raises(NotImplementedError, match=words):
            compiled(Variant(name="odd", operation="page_attention", **fields), "v4", megacore_mode="kv_head")


def lowered(operation: str, platform: str | None) -> str:
    arrays, _ = LLAMA[operation].arguments()
    call = functools.partial(getattr(jax_bridge, operation), platform=platform)
    return str(jax.jit(call).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text())


def test_lowering_of_a_single_key() -> None:
    """Of which Mosaic makes no product of matrices."""
    bound = jax.ShapeDtypeStruct((1,), jnp.int32)
    query, row, page = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 2, 64), (1, 1, 1, 64), (5, 1, 1, 64))
    )
    table = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    for operation, arrays in (
        (jax_bridge.ragged_decode_attention, (query, row, row, bound, bound)),
        (jax_bridge.page_attention, (query, page, page, bound, table)),
    ):
        call = jax.jit(functools.partial(operation, platform="pallas"))
        assert "tpu_custom_call" in call.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()


@each_operation
@pytest.mark.parametrize("platform", ["auto", "pallas"])
def test_lowering_for_tpu_from_this_host(operation: str, platform: str) -> None:
    assert lowered(operation, platform).count("tpu_custom_call") == 1


@each_operation
def test_export(operation: str) -> None:
    """By name for TPUs, and as "auto" for several platforms in one program."""
    arrays, _ = LLAMA[operation].arguments()
    function = getattr(jax_bridge, operation)
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(name) for name in ("tpu_custom_call", "triton_kernel_call_ffi")
    ]
    for platform, targets in (("pallas", ["tpu"]), ("auto", ["cpu", "cuda", "tpu"])):
        jitted = jax.jit(functools.partial(function, platform=platform))
        exported = jax.export.export(jitted, platforms=targets, disabled_checks=checks)(*arrays)
        again = jax.export.deserialize(exported.serialize())
        assert "tpu_custom_call" in again.mlir_module()
        assert again.platforms == tuple(targets)


@each_operation
def test_transformations_keep_one_kernel(operation: str) -> None:
    """`vmap` and `scan` are loops around it."""
    (query, *others), _ = LLAMA[operation].arguments()
    function = functools.partial(getattr(jax_bridge, operation), platform="pallas")
    mapped = jax.vmap(function, in_axes=(0, *(None for _ in others)))
    scanned = lambda query, *others: jax.lax.scan(lambda q, _: (function(q, *others), None), query, length=3)[0]  # noqa: E731
    stacked = jax.ShapeDtypeStruct((3, *query.shape), query.dtype)
    for call, argument in ((mapped, stacked), (scanned, query)):
        text = jax.jit(call).trace(argument, *others).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("@tpu_custom_call") == 1


@pytest.mark.parametrize("operation", PAGED)
def test_shard_map_over_heads_has_no_collective(operation: str) -> None:
    (query, *others), _ = LLAMA[operation].arguments()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("heads",))
    heads, whole = jax.P(None, "heads"), jax.P()
    layout = {"page_attention": "PHTD", "prefill_page_attention": "HPTD", "unified_attention": "PTHD"}[operation]
    cache = jax.P(*("heads" if axis == "H" else None for axis in layout))
    specs = (heads, cache, cache, *(whole for _ in others[2:]))
    function = functools.partial(getattr(jax_bridge, operation), platform="pallas")
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=heads)
    text = jax.jit(sharded).trace(query, *others).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 1
    assert not any(word in text for word in ("all_reduce", "all_gather", "all_to_all"))


def test_gpus_and_gradients_are_refused() -> None:
    arrays, _ = LLAMA["page_attention"].arguments()
    call = functools.partial(jax_bridge.page_attention, platform="pallas")
    with pytest.raises(NotImplementedError, match=r"page_attention\[pallas\] does not support GPUs"):
        jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match=r"page_attention\[pallas\] does not support differentiation"):
        jax.eval_shape(jax.grad(lambda query: jnp.sum(call(query, *arrays[1:]).astype(jnp.float32))), arrays[0])
