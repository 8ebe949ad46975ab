"""Every kind of kernel launch, compiled for real GPUs on the CPU: it fits the chip, spills nothing, uses tensor cores.

Triton's interpreter runs what no GPU could: these tests find what only the compiler sees. Run with `-m compile`.
"""

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from triton.backends.compiler import GPUTarget

import jax_bridge
from bench.machine_code import Binary, compile_launch, launches_of, target_of, tile_copies
from jax_bridge import device, paged_launch
from jax_bridge.layouts import CacheSizes, cache_shape
from jax_bridge.registry import OPERATIONS
from tests import small_calls
from tests.cases import MODELS, PAGED, Model
from tests.implementations import FULL
from tests.planted_kernels import KernelBug, planted

pytestmark = pytest.mark.compile

NVIDIA = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200"}
MOST_SPILLED_BYTES = 768
MOST_SPILLED_BYTES_OF_DECODING = 96  # before and behind the loop, so that as many programs as planned fit the registers
ALL_FEATURES = {
    "attn_logits_soft_cap": 30.0,
    "sliding_window": 1024,
    "attention_sink": jax.ShapeDtypeStruct((32,), jnp.float32),
    "alibi_slopes": jax.ShapeDtypeStruct((32,), jnp.float32),
    "return_lse": True,
}
PER_HEAD_SCALES = {name: jax.ShapeDtypeStruct((8,), jnp.float32) for name in ("k_scale", "v_scale")}


@dataclass(frozen=True)
class Variant:
    """A call of an operation that the paged kernels serve, by its static properties."""

    name: str
    model: Model
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    num_seqs: int = 8
    max_len: int = 4096
    page_size: int | None = None
    layout: str = "PHTD"
    features: Any = None
    operation: str = "page_attention"
    num_tokens: int = 0

    def __str__(self) -> str:
        return self.name

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        model, page_size = self.model, self.page_size or self.model.page_size
        sizes = CacheSizes(1 << 16, page_size, model.num_kv_heads, model.head_dim)
        values = sizes._replace(head_dim=model.value_head_dim or model.head_dim)
        if self.operation != "unified_attention":
            values = sizes
        dtype = self.cache_dtype or self.dtype
        if self.operation == "ragged_decode_attention":
            rows = jax.ShapeDtypeStruct((self.num_seqs, self.max_len, model.num_kv_heads, model.head_dim), dtype)
            query = jax.ShapeDtypeStruct((self.num_seqs, model.num_q_heads, model.head_dim), self.dtype)
            bounds = jax.ShapeDtypeStruct((self.num_seqs,), jnp.int32)
            return [query, rows, rows, bounds, bounds], {**(self.features or {})}
        key_cache, value_cache = (jax.ShapeDtypeStruct(cache_shape(self.layout, s), dtype) for s in (sizes, values))
        query_shape = (self.num_tokens or self.num_seqs, model.num_q_heads, model.head_dim)
        width = -(-self.max_len // page_size)
        arrays = [jax.ShapeDtypeStruct(query_shape, self.dtype), key_cache, value_cache]
        if self.operation == "prefill_page_attention":
            arrays += [jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((width,), jnp.int32)]
        else:
            arrays += [
                jax.ShapeDtypeStruct((self.num_seqs,), jnp.int32),
                jax.ShapeDtypeStruct((self.num_seqs, width), jnp.int32),
            ]
        if self.operation == "unified_attention":
            arrays.append(jax.ShapeDtypeStruct((self.num_seqs + 1,), jnp.int32))
        return arrays, {"kv_layout": self.layout, **(self.features or {})}


LLAMA = MODELS["llama3_8b"]
VARIANTS = (
    *(Variant(name, model) for name, model in MODELS.items()),
    Variant("one-partition", LLAMA, features={"num_splits": 1}),
    Variant("forced-splits", LLAMA, features={"num_splits": 7}, layout="HPTD"),
    Variant("every-feature", LLAMA, features=ALL_FEATURES),
    Variant("float16", LLAMA, "float16"),
    Variant("float32", LLAMA, "float32"),
    Variant("e5m2-cache", LLAMA, cache_dtype="float8_e5m2", features=PER_HEAD_SCALES),
    Variant("int8-cache", LLAMA, "float16", cache_dtype="int8", features=PER_HEAD_SCALES),
    Variant("page-1", LLAMA, page_size=1, layout="PTHD"),
    Variant("page-24", LLAMA, page_size=24),
    Variant("page-256", LLAMA, page_size=256, layout="PTHD"),
    Variant("batch-1024", LLAMA, num_seqs=1024),
    Variant("long-context", LLAMA, num_seqs=1, max_len=1 << 20),
)
E4M3 = Variant("e4m3-cache", LLAMA, cache_dtype="float8_e4m3fn", features=PER_HEAD_SCALES)


def _unified(name: str, model: Model = LLAMA, **options: Any) -> Variant:
    return Variant(f"unified-{name}", model, operation="unified_attention", **({"layout": "PTHD"} | options))


def _prefill(name: str, model: Model = LLAMA, **options: Any) -> Variant:
    return Variant(f"prefill-{name}", model, operation="prefill_page_attention", num_seqs=1, **options)


def _ragged(name: str, model: Model = LLAMA, **options: Any) -> Variant:
    return Variant(f"ragged-{name}", model, operation="ragged_decode_attention", layout="PTHD", **options)


def _heads(num_kv_heads: int, group_size: int, head_dim: int) -> Model:
    return Model(name="", num_q_heads=num_kv_heads * group_size, num_kv_heads=num_kv_heads, head_dim=head_dim)


UNIFIED_FEATURES = {
    "logits_soft_cap": 30.0,
    "attention_sink": jax.ShapeDtypeStruct((32,), jnp.float32),
    "alibi_slopes": jax.ShapeDtypeStruct((32,), jnp.float32),
    "qq_bias": jax.ShapeDtypeStruct((300, 300), jnp.float32),
    "return_lse": True,
}
WIDE_HEADS = _heads(2, 4, 512)
RAGGED_FEATURES = {"logits_soft_cap": 30.0, "sliding_window": (1023, 0), "return_lse": True}
RAGGED_VARIANTS = (
    _ragged("full"),
    _ragged("every-feature", features=RAGGED_FEATURES),
    _ragged("one-row", num_seqs=1, max_len=1 << 17),
    _ragged("many-rows", num_seqs=256, max_len=5000, dtype="float16", features={"return_lse": True}),
    _ragged("80", MODELS["phi2"]),
    _ragged("71", MODELS["falcon_7b"], dtype="float16"),
    _ragged("256", MODELS["gemma2_9b"], features={"logits_soft_cap": 50.0, "sliding_window": 4096}),
    _ragged("512", WIDE_HEADS),
    _ragged("float32", dtype="float32"),
)  # fmt: skip
PACKED_VARIANTS = (
    # Decoding only.
    _unified("decode"),
    _unified("decode-few-rows", _heads(8, 1, 128), dtype="float16"),
    _unified("decode-256-page-64", MODELS["gemma2_9b"], page_size=64, features={"sliding_window": 4096}),
    _unified("decode-many-splits", num_seqs=1, max_len=1 << 17, features={"return_lse": True}),
    # Few tokens a sequence: drafts, or some prompts among many decodes.
    _unified("drafts", num_seqs=32, num_tokens=128),
    _unified("drafts-int8", num_seqs=32, num_tokens=128, cache_dtype="int8", features=PER_HEAD_SCALES),
    _unified("drafts-71", MODELS["falcon_7b"], num_tokens=64, dtype="float16", page_size=24),
    # Prompts beside decodes.
    _unified("mixed", num_tokens=2048),
    _unified("mixed-every-feature", num_tokens=2048, features=UNIFIED_FEATURES | {"sliding_window": 1024}),
    _unified("mixed-both-sides", num_tokens=2048, features={"causal": False, "sliding_window": (64, 8)}),
    _unified("mixed-not-causal", num_tokens=2048, features={"causal": False}, layout="HPTD"),
    _unified("mixed-float16-64", MODELS["gpt_oss_20b"], dtype="float16", num_tokens=1000, layout="PHTD"),
    _unified("mixed-80-page-1", MODELS["phi2"], num_tokens=512, page_size=1),
    _unified("mixed-256", MODELS["gemma2_9b"], num_tokens=2048, page_size=256),
    _unified("mixed-512", WIDE_HEADS, num_tokens=2048),
    _unified("mixed-narrow-values", MODELS["mla_like"], num_tokens=2048),
    _unified("mixed-e5m2", num_tokens=2048, cache_dtype="float8_e5m2", features=PER_HEAD_SCALES),
    _unified("mixed-float32", num_tokens=2048, dtype="float32"),
    _unified("mixed-7", MODELS["qwen2_7b"], num_tokens=16384, features={"attention_sink": None}),
    _unified("mixed-3", _heads(2, 3, 96), num_tokens=300, page_size=24),
    _unified("mixed-5", _heads(2, 5, 64), num_tokens=300, dtype="float16"),
    _unified("one-prompt", num_seqs=1, num_tokens=4096),
    # Chunks.
    _prefill("chunk", num_tokens=2048),
    _prefill("one-token", num_tokens=1),
    _prefill("short", num_tokens=40, features={"return_lse": True}),
    _prefill("every-feature", num_tokens=512, features=ALL_FEATURES),
    _prefill("float16-64", MODELS["gpt_oss_20b"], num_tokens=1000, dtype="float16", features={"sliding_window": 128}),
    _prefill("80-page-24", MODELS["phi2"], num_tokens=512, page_size=24),
    _prefill("256", MODELS["gemma2_9b"], num_tokens=2048),
    _prefill("512", WIDE_HEADS, num_tokens=2048),
    _prefill("float32", num_tokens=512, dtype="float32"),
    _prefill("int8", num_tokens=2048, cache_dtype="int8", dtype="float16", features=PER_HEAD_SCALES),
    _prefill("71", MODELS["falcon_7b"], num_tokens=100),
)  # fmt: skip
CORE = ("llama3_8b", "unified-decode", "unified-mixed", "prefill-chunk", "ragged-full")


def on_architectures(variants: tuple[Variant, ...]) -> list[Any]:
    """Every variant on one architecture in turn, the core ones on all; all of them in the full run."""
    names = list(NVIDIA)
    chosen = [
        (variant, name)
        for place, variant in enumerate(variants)
        for name in (names if FULL or variant.name in CORE else [names[place % len(names)]])
    ]
    return [pytest.param(variant, name, id=f"{variant}-{name}") for variant, name in chosen]


def compiled(variant: Variant, target: GPUTarget, chip: str, cfg: Any = None) -> list[Binary]:
    """The kernels that a call launches, with the configuration that the heuristics choose for `chip`."""
    arrays, keywords = variant.arguments()
    operation = getattr(jax_bridge, variant.operation)
    with device.target_device(chip):
        launches = launches_of(operation, *arrays, modules=(paged_launch,), **keywords, platform="triton", cfg=cfg)
    return [compile_launch(launch, target) for launch in launches]


@pytest.mark.parametrize(("variant", "architecture"), on_architectures((*VARIANTS, *RAGGED_VARIANTS)))
def test_nvidia(variant: Variant, architecture: str) -> None:
    chip = NVIDIA[architecture]
    binaries = compiled(variant, GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32), chip)
    assert binaries
    for binary in binaries:
        assert binary.stack <= MOST_SPILLED_BYTES_OF_DECODING, (
            f"{binary.kernel} spills {binary.stack} bytes with {binary.registers} registers"
        )
        assert binary.shared <= device.KNOWN_DEVICES[chip].shared_memory
    attend = binaries[0]
    uses_tensor_cores = attend.mma + attend.wgmma > 0
    # float32 keeps float32 accuracy: no TF32.
    assert uses_tensor_cores == (variant.dtype != "float32")
    assert attend.cp_async > 0, "K and V are not loaded ahead"
    if len(binaries) == 2:
        assert binaries[1].kernel == "split_reduce_kernel"


@pytest.mark.parametrize(("variant", "architecture"), on_architectures(PACKED_VARIANTS))
def test_packed_on_nvidia(variant: Variant, architecture: str) -> None:
    chip = NVIDIA[architecture]
    binaries = compiled(variant, GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32), chip)
    assert binaries
    for binary in binaries:
        # What prefill tiles spill lies before and behind the loop over keys.
        allowed = MOST_SPILLED_BYTES if binary.prefills else MOST_SPILLED_BYTES_OF_DECODING
        assert binary.stack <= allowed, f"{binary.kernel} spills {binary.stack} bytes of {binary.registers} registers"
        assert binary.shared <= device.KNOWN_DEVICES[chip].shared_memory
        if binary.kernel == "split_reduce_kernel":
            continue
        assert (binary.mma + binary.wgmma > 0) == (variant.dtype != "float32")
        assert binary.cp_async > 0, "K and V are not loaded ahead"
        if binary.prefills and architecture == "sm_90":
            assert binary.wgmma > 0
            assert binary.depth >= 2 or variant.cache_dtype is not None


PIPELINES = [
    ("page_attention", {"num_stages": 2}),
    ("page_attention", {"num_stages": 5}),
    ("prefill_page_attention", {"num_stages": 2}),
    ("prefill_page_attention", {"num_stages": 3}),
]


def check_overlap(binary: Binary) -> None:
    """K and V are on their way before the loop begins, and in it no copy is waited for where it is asked for."""
    loops = binary.main_loops()
    assert loops
    for before, body in loops:
        assert tile_copies(before) >= 2, "no prologue: the first tiles are asked for in the loop"
        operations = re.findall(r"async_copy_global_to_local .* : tensor<\d+x\d+x|async_wait .*?num = \d+", body)
        for first, second in itertools.pairwise(operations):
            is_copy = first.startswith("async_copy")
            assert not (is_copy and second.endswith("num = 0")), "a copy is waited for at once"


@pytest.mark.parametrize(("operation", "fields"), PIPELINES, ids=lambda value: str(value))
def test_loads_overlap_computing(operation: str, fields: dict[str, int]) -> None:
    variant = Variant("", LLAMA) if operation == "page_attention" else _prefill("", num_tokens=2048)
    cfg = OPERATIONS[operation].config_type(**fields)
    check_overlap(compiled(variant, GPUTarget("cuda", 90, 32), "h100", cfg)[0])


def test_a_pipeline_that_does_not_overlap_is_noticed(tmp_path: Path) -> None:
    """A load carried from one iteration to the next keeps deeper pipelines from overlapping anything."""
    bug = KernelBug("attend", (("= TILE.num_stages <= 2", "= TILE.num_stages <= 9"),), "page_attention", "everything")
    cfg = jax_bridge.PageAttentionConfig(num_stages=5)
    with planted(bug, tmp_path):
        binary = compiled(Variant("", LLAMA), GPUTarget("cuda", 90, 32), "h100", cfg)[0]
    with pytest.raises(AssertionError, match=r"in the loop|at once"):
        check_overlap(binary)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_e4m3_caches_where_the_chip_converts_them(architecture: str) -> None:
    (attend, _) = compiled(E4M3, GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32), NVIDIA[architecture])
    assert attend.stack <= MOST_SPILLED_BYTES_OF_DECODING
    assert attend.mma > 0


def test_e4m3_caches_are_refused_before_compute_capability_89() -> None:
    with pytest.raises(NotImplementedError, match=r"page_attention\[triton\] does not support float8_e4m3fn"):
        compiled(E4M3, GPUTarget("cuda", 80, 32), "a100")


AMD = (
    *("llama3_8b", "one-partition", "every-feature", "page-1", "unified-decode", "unified-mixed", "prefill-chunk"),
    *("ragged-full", "ragged-every-feature"),
)
EVERY_VARIANT = (*VARIANTS, *PACKED_VARIANTS, *RAGGED_VARIANTS)


ADA = ("unified-mixed-every-feature", "prefill-512")
LITTLE_SHARED_MEMORY = [
    pytest.param(variant, chip, id=f"{variant}-{chip}")
    for variant in EVERY_VARIANT
    for chip, names in (("mi300x", AMD), ("l4", ADA))
    if variant.name in names
]


@pytest.mark.parametrize(("variant", "chip"), LITTLE_SHARED_MEMORY)
def test_chips_with_little_shared_memory(variant: Variant, chip: str) -> None:
    """What the heuristics choose there can be launched."""
    described = device.KNOWN_DEVICES[chip]
    for binary in compiled(variant, target_of(described), chip):
        assert binary.shared <= described.shared_memory


@pytest.mark.parametrize("make", [Variant, _unified, _prefill], ids=["page", "unified", "prefill"])
def test_addresses_are_64_bit(make: Any) -> None:
    """Page ids are widened before they meet a stride: a cache may hold more than 2^31 elements."""
    heads, page_size, head_dim = LLAMA.num_kv_heads, 24, LLAMA.head_dim
    for layout, page_stride in (("PTHD", page_size * heads * head_dim), ("HPTD", page_size * head_dim)):
        variant = make(layout, LLAMA, page_size=page_size, layout=layout, num_tokens=0 if make is Variant else 2048)
        ttgir = compiled(variant, GPUTarget("cuda", 90, 32), "h100")[0].ttgir
        widths = re.findall(rf"arith\.constant (?:dense<{page_stride}>|{page_stride}) : (?:tensor<\w+x)?(i\d+)", ttgir)
        assert set(widths) == {"i64"}, f"{layout}: the page stride is multiplied in {widths}"


def test_rows_of_any_length_are_one_kernel() -> None:
    """No loop is unrolled over the keys, and the stride of a row is multiplied in 64 bits."""
    sizes = []
    for length in (3000, 1 << 29):
        ttgir = compiled(_ragged("", num_seqs=4, max_len=length), GPUTarget("cuda", 90, 32), "h100")[0].ttgir
        stride = length * LLAMA.num_kv_heads * LLAMA.head_dim
        assert set(re.findall(rf"arith\.constant {stride} : (\w+)", ttgir)) == {"i64"}
        sizes.append(sum("=" in line for line in ttgir.splitlines()))
    # Positions in the longest rows take 64 bits, and some conversions.
    assert max(sizes) <= 1.05 * min(sizes), f"operations in kernels of growing rows: {sizes}"


LOWERED = [_ragged("lowered"), Variant("page", LLAMA), _unified("", num_tokens=64), _prefill("", num_tokens=2048)]
each_operation = pytest.mark.parametrize("variant", LOWERED, ids=lambda variant: variant.operation)


def public(variant: Variant) -> Any:
    """The public function of the variant's operation, for arrays, with its layout."""
    function = getattr(jax_bridge, variant.operation)
    return function if variant.operation not in PAGED else functools.partial(function, kv_layout=variant.layout)


def kernel_calls(function: Any, *arguments: Any) -> int:
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("@triton_kernel_call_ffi")


def expected_calls(variant: Variant) -> int:
    """The launches of one call."""
    arrays, _ = variant.arguments()
    named = functools.partial(public(variant), platform="triton")
    return len(launches_of(named, *arrays, modules=(paged_launch,)))


@each_operation
def test_auto_lowers_for_cuda_from_this_host(variant: Variant) -> None:
    arrays, _ = variant.arguments()
    assert kernel_calls(public(variant), *arrays) == expected_calls(variant) >= 1


def test_launches_that_need_too_much_shared_memory_say_so() -> None:
    arrays, keywords = Variant("too large", LLAMA).arguments()
    cfg = jax_bridge.PageAttentionConfig(block_n=256, num_stages=6, platform="triton")
    call = functools.partial(jax_bridge.page_attention, **keywords, cfg=cfg)
    words = r"page_attention\[triton\]: cfg asks for .* needs \d+ bytes of shared memory, expected at most \d+"
    with pytest.raises(ValueError, match=words):
        jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("operation", "cfg"),
    [
        ("attention", jax_bridge.AttentionConfig(block_q=4096)),
        ("ragged_decode_attention", jax_bridge.RaggedDecodeAttentionConfig(jax_bridge.FwdParams(blocksize_heads=8192))),
    ],
)
def test_tiles_beyond_the_registers_are_refused_while_tracing(operation: str, cfg: Any) -> None:
    """Compiling them takes minutes and gigabytes."""
    named = small_calls.arguments(operation)
    words = rf"{operation}: cfg asks for tiles of \d+ rows .* registers of scores or sums, expected at most the 65536"
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda named: small_calls.run(operation, named, platform="triton", cfg=cfg), named)


def test_running_on_a_cpu_without_the_interpreter_says_what_to_do() -> None:
    arrays, keywords = Variant("cpu", LLAMA).arguments()
    call = functools.partial(jax_bridge.page_attention, **keywords, platform="triton")
    expected = r'does not support CPU devices; use platform="xla", or set TRITON_INTERPRET=1'
    with pytest.raises(NotImplementedError, match=expected):
        jax.jit(call).trace(*arrays).lower()


class TestTransformations:
    """Programs around the kernels, lowered for CUDA from this host."""

    @each_operation
    def test_vmap_is_a_loop(self, variant: Variant) -> None:
        (query, *others), _ = variant.arguments()
        queries = jax.ShapeDtypeStruct((3, *query.shape), query.dtype)
        batched = jax.vmap(public(variant), in_axes=(0, *(None for _ in others)))
        assert kernel_calls(batched, queries, *others) == expected_calls(variant)

    @each_operation
    def test_scan(self, variant: Variant) -> None:
        (query, *others), _ = variant.arguments()

        def layers(query: Any, *others: Any) -> Any:
            return jax.lax.scan(lambda q, _: (public(variant)(q, *others), None), query, length=3)[0]

        assert kernel_calls(layers, query, *others) == expected_calls(variant)

    @each_operation
    def test_shard_map_over_kv_heads_has_no_collective(self, variant: Variant) -> None:
        arrays, _ = variant.arguments()
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("heads",))
        heads, whole = jax.P(None, "heads"), jax.P()
        cache = jax.P(*("heads" if axis == "H" else None for axis in variant.layout))
        specs = (heads, cache, cache, *(whole for _ in arrays[3:]))
        sharded = jax.shard_map(public(variant), mesh=mesh, in_specs=specs, out_specs=heads)
        lowered = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert lowered.count("@triton_kernel_call_ffi") >= 1
        assert not re.search(r"all_reduce|all_gather|all_to_all|collective", lowered)

    @each_operation
    def test_export(self, variant: Variant) -> None:
        arrays, _ = variant.arguments()
        checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
        exported = jax.export.export(jax.jit(public(variant)), platforms=["cuda"], disabled_checks=checks)(*arrays)
        again = jax.export.deserialize(exported.serialize())
        assert again.platforms == ("cuda",)
        assert again.out_avals[0].shape == arrays[0].shape

    @each_operation
    def test_auto_exports_for_several_platforms(self, variant: Variant) -> None:
        """Kernels for CUDA and `xla` elsewhere, in one program."""
        arrays, _ = variant.arguments()
        checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
        jitted = jax.jit(public(variant))
        exported = jax.export.export(jitted, platforms=["cpu", "cuda", "tpu"], disabled_checks=checks)(*arrays)
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert "triton_kernel_call_ffi" in exported.mlir_module()
