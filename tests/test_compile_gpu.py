"""Every kind of kernel launch, compiled for real GPUs on the CPU: it fits the chip, spills nothing, uses tensor cores.

Triton's interpreter runs what no GPU could: these tests find what only the compiler sees. Run with `-m compile`.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from triton.backends.compiler import GPUTarget

import jax_bridge
from jax_bridge import device, paged_launch
from jax_bridge.layouts import CacheSizes, cache_shape
from tests.cases import MODELS, Model
from tests.gpu_compile import Binary, compile_launch, launches_of

pytestmark = pytest.mark.compile

NVIDIA = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200"}
AMD_LOCAL_MEMORY = 64 * 1024
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
    """A call of page attention by its static properties."""

    name: str
    model: Model
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    num_seqs: int = 8
    max_len: int = 4096
    page_size: int | None = None
    layout: str = "PHTD"
    features: Any = None

    def __str__(self) -> str:
        return self.name

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        model, page_size = self.model, self.page_size or self.model.page_size
        sizes = CacheSizes(1 << 16, page_size, model.num_kv_heads, model.head_dim)
        cache = jax.ShapeDtypeStruct(cache_shape(self.layout, sizes), self.cache_dtype or self.dtype)
        arrays = [
            jax.ShapeDtypeStruct((self.num_seqs, model.num_q_heads, model.head_dim), self.dtype),
            cache,
            cache,
            jax.ShapeDtypeStruct((self.num_seqs,), jnp.int32),
            jax.ShapeDtypeStruct((self.num_seqs, -(-self.max_len // page_size)), jnp.int32),
        ]
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


def compiled(variant: Variant, target: GPUTarget, chip: str) -> list[Binary]:
    """The kernels that a call launches, with the configuration that the heuristics choose for `chip`."""
    arrays, keywords = variant.arguments()
    traced = {name: value for name, value in keywords.items() if isinstance(value, jax.ShapeDtypeStruct)}
    static = {name: value for name, value in keywords.items() if name not in traced}

    def call(arrays: Any, traced: Any) -> Any:
        return jax_bridge.page_attention(*arrays, **traced, **static, platform="triton")

    with device.target_device(chip):
        launches = launches_of(call, arrays, traced, modules=(paged_launch,))
    return [compile_launch(launch, target) for launch in launches]


@pytest.mark.parametrize("architecture", NVIDIA)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nvidia(variant: Variant, architecture: str) -> None:
    chip = NVIDIA[architecture]
    binaries = compiled(variant, GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32), chip)
    assert binaries
    for binary in binaries:
        assert binary.stack == 0, f"{binary.kernel} spills {binary.stack} bytes with {binary.registers} registers"
        assert binary.shared <= device.KNOWN_DEVICES[chip].shared_memory
    attend = binaries[0]
    uses_tensor_cores = attend.mma + attend.wgmma > 0
    # float32 keeps float32 accuracy: no TF32.
    assert uses_tensor_cores == (variant.dtype != "float32")
    assert attend.cp_async > 0, "K and V are not loaded ahead"
    if len(binaries) == 2:
        assert binaries[1].kernel == "split_reduce_kernel"


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_e4m3_caches_where_the_chip_converts_them(architecture: str) -> None:
    (attend, _) = compiled(E4M3, GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32), NVIDIA[architecture])
    assert attend.stack == 0
    assert attend.mma > 0


def test_e4m3_caches_are_refused_before_compute_capability_89() -> None:
    with pytest.raises(NotImplementedError, match=r"page_attention\[triton\] does not support float8_e4m3fn"):
        compiled(E4M3, GPUTarget("cuda", 80, 32), "a100")


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.name in ("llama3_8b", "one-partition", "every-feature", "page-1")], ids=str
)
def test_amd(variant: Variant) -> None:
    for binary in compiled(variant, GPUTarget("hip", "gfx942", 64), "h100"):
        assert binary.shared <= AMD_LOCAL_MEMORY


def test_addresses_are_64_bit() -> None:
    """Page ids are widened before they meet a stride: a cache may hold more than 2^31 elements."""
    heads, page_size, head_dim = LLAMA.num_kv_heads, 24, LLAMA.head_dim
    for layout, page_stride in (("PTHD", page_size * heads * head_dim), ("HPTD", page_size * head_dim)):
        variant = Variant(layout, LLAMA, page_size=page_size, layout=layout)
        ttgir = compiled(variant, GPUTarget("cuda", 90, 32), "h100")[0].ttgir
        widths = re.findall(rf"arith\.constant (?:dense<{page_stride}>|{page_stride}) : (?:tensor<\w+x)?(i\d+)", ttgir)
        assert set(widths) == {"i64"}, f"{layout}: the page stride is multiplied in {widths}"


def test_auto_lowers_for_cuda_from_this_host() -> None:
    arrays, keywords = Variant("lowering", LLAMA).arguments()
    call = functools.partial(jax_bridge.page_attention, **keywords)
    lowered = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@triton_kernel_call_ffi") == 2


def test_launches_that_need_too_much_shared_memory_say_so() -> None:
    arrays, keywords = Variant("too large", LLAMA).arguments()
    cfg = jax_bridge.PageAttentionConfig(block_n=256, num_stages=6, platform="triton")
    call = functools.partial(jax_bridge.page_attention, **keywords, cfg=cfg)
    with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory, expected at most \d+.*smaller block_n"):
        jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",))


def test_running_on_a_cpu_without_the_interpreter_says_what_to_do() -> None:
    arrays, keywords = Variant("cpu", LLAMA).arguments()
    call = functools.partial(jax_bridge.page_attention, **keywords, platform="triton")
    with pytest.raises(NotImplementedError, match=r"does not support CPU devices; set TRITON_INTERPRET=1"):
        jax.jit(call).trace(*arrays).lower()


class TestTransformations:
    """Programs around the kernels, lowered for CUDA from this host."""

    @staticmethod
    def kernel_calls(function: Any, *arguments: Any) -> int:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("@triton_kernel_call_ffi")

    def test_vmap_is_a_loop(self) -> None:
        (query, *others), _ = Variant("vmap", LLAMA).arguments()
        queries = jax.ShapeDtypeStruct((3, *query.shape), query.dtype)
        batched = jax.vmap(jax_bridge.page_attention, in_axes=(0, None, None, None, None))
        assert self.kernel_calls(batched, queries, *others) == 2

    def test_scan(self) -> None:
        (query, *others), _ = Variant("scan", LLAMA).arguments()

        def layers(query: Any, *others: Any) -> Any:
            return jax.lax.scan(lambda q, _: (jax_bridge.page_attention(q, *others), None), query, length=3)[0]

        assert self.kernel_calls(layers, query, *others) == 2

    def test_shard_map_over_kv_heads_has_no_collective(self) -> None:
        arrays, _ = Variant("shard_map", LLAMA).arguments()
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("heads",))
        heads, whole = jax.P(None, "heads"), jax.P()
        sharded = jax.shard_map(
            jax_bridge.page_attention, mesh=mesh, in_specs=(heads, heads, heads, whole, whole), out_specs=heads
        )
        lowered = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert lowered.count("@triton_kernel_call_ffi") == 2
        assert not re.search(r"all_reduce|all_gather|all_to_all|collective", lowered)

    def test_export(self) -> None:
        arrays, _ = Variant("export", LLAMA).arguments()
        checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
        exported = jax.export.export(jax.jit(jax_bridge.page_attention), platforms=["cuda"], disabled_checks=checks)(
            *arrays
        )
        again = jax.export.deserialize(exported.serialize())
        assert again.platforms == ("cuda",)
        assert again.out_avals[0].shape == arrays[0].shape
