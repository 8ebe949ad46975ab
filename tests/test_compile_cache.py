"""The kernels of `write_kv_pages` and `merge_attention_states`, compiled for real GPUs on the CPU.

They only move memory: what counts is that they do it 16 bytes at a time, in registers, and in place.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest
from triton.backends.compiler import GPUTarget

import jax_bridge
from bench.machine_code import Binary, compile_launch, launches_of
from jax_bridge import device, kv_pages, states
from jax_bridge.layouts import CacheSizes, cache_shape

pytestmark = pytest.mark.compile

CHIPS = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200"}
MODULES = (kv_pages, states)


@dataclass(frozen=True)
class Write:
    """A call of `write_kv_pages` by its static properties."""

    num_tokens: int = 8192
    num_kv_heads: int = 8
    head_dim: int = 128
    value_head_dim: int = 128
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    kv_layout: str = "PTHD"
    num_scales: int = 0

    def arguments(self) -> tuple[list[jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        sizes = CacheSizes(1 << 17, 16, self.num_kv_heads, self.head_dim)
        dims = (self.head_dim, self.value_head_dim)
        rows = [jax.ShapeDtypeStruct((self.num_tokens, self.num_kv_heads, dim), self.dtype) for dim in dims]
        caches = [
            jax.ShapeDtypeStruct(cache_shape(self.kv_layout, sizes._replace(head_dim=dim)), self.cache_dtype)
            for dim in dims
        ]
        scale = jax.ShapeDtypeStruct((self.num_scales,), jnp.float32)
        scales = {"k_scale": scale, "v_scale": scale} if self.num_scales else {}
        return [*rows, *caches, jax.ShapeDtypeStruct((self.num_tokens,), jnp.int32)], scales

    def call(self, arrays: Any, scales: Any, platform: str | None = "triton") -> Any:
        return jax_bridge.write_kv_pages(*arrays, **scales, kv_layout=self.kv_layout, platform=platform)


WRITES = {
    "PTHD": Write(),
    "PHTD": Write(kv_layout="PHTD"),
    "HPTD": Write(kv_layout="HPTD"),
    "decode": Write(num_tokens=64),
    "80": Write(head_dim=80, value_head_dim=80, kv_layout="PHTD"),
    "narrow-values": Write(num_kv_heads=4, head_dim=192),
    "float32": Write(dtype="float32", cache_dtype="float32"),
    "rounded": Write(dtype="float32"),
    "int8": Write(cache_dtype="int8", num_scales=1),
    "e5m2": Write(cache_dtype="float8_e5m2", num_scales=8, kv_layout="PHTD"),
}
E4M3 = Write(cache_dtype="float8_e4m3fn", num_scales=8)
ODD = Write(num_kv_heads=1, head_dim=71, value_head_dim=71)


def compiled(function: Any, arguments: Any, target: GPUTarget, chip: str) -> Binary:
    """The one kernel that a call launches."""
    with device.target_device(chip):
        (launch,) = launches_of(function, *arguments, modules=MODULES)
    return compile_launch(launch, target)


def on_nvidia(write: Write, architecture: str) -> Binary:
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return compiled(write.call, write.arguments(), target, CHIPS[architecture])


def each_on_one_architecture() -> list[Any]:
    """Every write on one architecture in turn, the first on all."""
    names = list(CHIPS)
    return [
        pytest.param(write, name, id=f"{title}-{name}")
        for place, (title, write) in enumerate(WRITES.items())
        for name in (names if place == 0 else [names[place % len(names)]])
    ]


@pytest.mark.parametrize(("write", "architecture"), each_on_one_architecture())
def test_writes_move_16_bytes_at_a_time(write: Write, architecture: str) -> None:
    binary = on_nvidia(write, architecture)
    assert binary.stack == 0
    assert binary.registers <= 80, "fewer than six programs of 128 threads share a multiprocessor"
    assert binary.wide_loads > 0
    assert binary.wide_stores > 0
    assert binary.narrow_stores == 0


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_e4m3_caches_where_the_chip_converts_them(architecture: str) -> None:
    binary = on_nvidia(E4M3, architecture)
    assert binary.stack == binary.narrow_stores == 0


def test_e4m3_caches_are_refused_before_compute_capability_89() -> None:
    message = r'write_kv_pages\[triton\] does not support float8_e4m3fn .*; use platform="xla"'
    with device.target_device("a100"), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(E4M3.call, *E4M3.arguments())


def test_rows_that_no_vector_divides() -> None:
    assert on_nvidia(ODD, "sm_90").stack == 0


def merge_arguments(num_tokens: int, head_dim: int = 128) -> list[jax.ShapeDtypeStruct]:
    out = jax.ShapeDtypeStruct((num_tokens, 32, head_dim), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((num_tokens, 32), jnp.float32)
    return [out, lse, out, lse]


merge = functools.partial(jax_bridge.merge_attention_states, platform="triton")


@pytest.mark.parametrize(
    ("architecture", "num_tokens", "head_dim"), [("sm_80", 8192, 128), ("sm_90", 64, 128), ("sm_100", 2048, 320)]
)
def test_merging(architecture: str, num_tokens: int, head_dim: int) -> None:
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    binary = compiled(merge, merge_arguments(num_tokens, head_dim), target, CHIPS[architecture])
    assert binary.stack == 0
    assert binary.wide_loads > 0
    assert binary.wide_stores > 0


@pytest.mark.parametrize("title", ["PTHD", "HPTD", "int8"])
def test_writes_on_amd(title: str) -> None:
    write = WRITES[title]
    assert compiled(write.call, write.arguments(), GPUTarget("hip", "gfx942", 64), "h100").ttgir


def test_merging_on_amd() -> None:
    assert compiled(merge, merge_arguments(8192), GPUTarget("hip", "gfx942", 64), "h100").ttgir


@pytest.mark.parametrize("kv_layout", ["PTHD", "HPTD"])
def test_addresses_are_64_bit(kv_layout: str) -> None:
    """Pages and heads are widened before they meet a stride: a cache may hold more than 2^31 elements."""
    write = Write(kv_layout=kv_layout, head_dim=96, value_head_dim=96)
    strides = {"PTHD": (16 * 8 * 96,), "HPTD": (16 * 96, (1 << 17) * 16 * 96)}[kv_layout]
    ttgir = on_nvidia(write, "sm_90").ttgir
    for stride in strides:
        widths = re.findall(rf"arith\.constant (?:dense<{stride}>|{stride}) : (?:tensor<\w+x)?(i\d+)", ttgir)
        assert set(widths) == {"i64"}, f"the stride {stride} is multiplied in {widths}"


def lowered(function: Any, *arguments: Any, **options: Any) -> str:
    """A program for CUDA, as text."""
    program = jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=("cuda",))
    return str(program.as_text())


@pytest.mark.parametrize("platform", ["triton", None])
def test_a_write_is_one_launch_that_updates_what_it_is_given(platform: str | None) -> None:
    (key, value, *caches, slots), _ = Write().arguments()

    def write(key: Any, value: Any, slots: Any, *caches: Any) -> Any:
        return jax_bridge.write_kv_pages(key, value, *caches, slots, platform=platform)

    text = lowered(write, key, value, slots, *caches, donate_argnums=(3, 4))
    (call,) = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", call)
    assert aliases == [("0", "3"), ("1", "4")]
    assert len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text)) == 2
    assert not re.search(r"stablehlo\.(copy|scatter|convert|transpose|pad|broadcast)", text)


def test_steps_carry_the_caches_from_layer_to_layer() -> None:
    """In a scan the kernel updates the carried arrays, which no operation but the kernel touches.

    That the barriers around it cost no copy, XLA's compiler says in `test_compile_xla`.
    """
    (key, value, *caches, slots), _ = Write(num_tokens=64).arguments()

    def layers(key: Any, value: Any, slots: Any, *caches: Any) -> Any:
        def layer(caches: Any, index: Any) -> Any:
            return jax_bridge.write_kv_pages(key, value, *caches, slots + 64 * index), None

        return jax.lax.scan(layer, caches, jnp.arange(4))[0]

    text = lowered(layers, key, value, slots, *caches, donate_argnums=(3, 4))
    shape = "x".join(map(str, caches[0].shape))
    touching = {name for line in text.splitlines() if shape in line for name in re.findall(r"= stablehlo\.(\w+)", line)}
    assert touching == {"while", "custom_call", "optimization_barrier"}
    assert text.count("@triton_kernel_call") == 1


def test_merging_is_one_launch() -> None:
    text = lowered(jax_bridge.merge_attention_states, *merge_arguments(64))
    assert text.count("@triton_kernel_call") == 1
    assert "stablehlo.exponential" not in text


@pytest.mark.parametrize("operation", ["write_kv_pages", "merge_attention_states"])
def test_auto_exports_for_several_platforms(operation: str) -> None:
    """Kernels for CUDA and `xla` elsewhere, in one program; a vmap of it is a loop around the kernel."""
    arguments = Write(num_tokens=64).arguments()[0] if operation == "write_kv_pages" else merge_arguments(64)
    checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
    jitted = jax.jit(getattr(jax_bridge, operation))
    exported = jax.export.export(jitted, platforms=["cpu", "cuda", "tpu"], disabled_checks=checks)(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "triton_kernel_call_ffi" in exported.mlir_module()
    stacked = [jax.ShapeDtypeStruct((3, *array.shape), array.dtype) for array in arguments]
    assert lowered(jax.vmap(getattr(jax_bridge, operation)), *stacked).count("@triton_kernel_call_ffi") == 1
