"""Dense attention, compiled for real GPUs on the CPU; run with `-m compile`. See `test_compile_gpu.py`."""

import json
import re
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import pytest
from triton.backends.compiler import GPUTarget

import jax_bridge
from bench.machine_code import Binary, compile_launch, launches_of, target_of
from jax_bridge import MaskInfo, dense_launch, device
from tests.implementations import FULL
from tests.test_compile_gpu import MOST_SPILLED_BYTES, NVIDIA, check_overlap

pytestmark = pytest.mark.compile


@dataclass(frozen=True)
class Variant:
    """A call of `attention` by its static properties."""

    name: str
    rows: int = 4096
    keys: int | None = None
    batch: int = 1
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    value_head_dim: int | None = None
    dtype: str = "bfloat16"
    mask: str = "none"
    sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def arguments(self) -> list[Any]:
        """Query, key, value, sinks or None, `MaskInfo` or None."""
        keys, heads = self.keys or self.rows, self.num_kv_heads
        integers = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        ids = [jax.ShapeDtypeStruct((self.batch, length), jnp.int32) for length in (self.rows, keys)]
        info = {
            "none": lambda: None,
            "segments": lambda: MaskInfo.from_segments(*ids),
            "lengths": lambda: MaskInfo.from_key_lengths(integers, self.rows, keys),
        }[self.mask]()
        return [
            jax.ShapeDtypeStruct((self.batch, self.rows, self.num_q_heads, self.head_dim), self.dtype),
            jax.ShapeDtypeStruct((self.batch, keys, heads, self.head_dim), self.dtype),
            jax.ShapeDtypeStruct((self.batch, keys, heads, self.value_head_dim or self.head_dim), self.dtype),
            jax.ShapeDtypeStruct((self.num_q_heads,), jnp.float32) if self.sinks else None,
            info,
        ]

    def call(self, *arguments: Any, platform: str | None = "triton", cfg: Any = None) -> jax.Array:
        query, key, value, sinks, info = arguments
        options = {"dtype": None, "causal": True, "platform": platform, "cfg": cfg} | self.options
        out: jax.Array = jax_bridge.attention(query, key, value, None, None, sinks, mask_info=info, **options)
        return out


PLAIN = Variant("causal")
SEGMENTS = Variant("segments", mask="segments", rows=16384)
WIDEST = Variant("512", num_q_heads=8, num_kv_heads=2, head_dim=512)
EVERYTHING: dict[str, Any] = {"logits_soft_cap": 30.0, "sliding_window": (1023, 0)}
VARIANTS = (
    Variant("16k", rows=16384),
    Variant("not-causal", options={"causal": False}),
    Variant("both-sides", dtype="float16", options={"causal": False, "sliding_window": (100, 7)}),
    Variant("every-feature", mask="segments", sinks=True, options=EVERYTHING),
    Variant("lengths", batch=16, rows=1024, mask="lengths"),
    Variant("short", rows=200, keys=3000),
    Variant("one-row", rows=1, batch=8, keys=4096, options={"causal": False}),
    Variant("64-g-7", num_q_heads=56, head_dim=64, dtype="float16"),
    Variant("24", num_q_heads=6, num_kv_heads=2, head_dim=24, value_head_dim=40),
    Variant("192-128", num_q_heads=16, num_kv_heads=16, head_dim=192, value_head_dim=128),
    Variant("256", num_q_heads=16, head_dim=256),
    WIDEST,
    Variant("float32", rows=1024, dtype="float32"),
)


def compiled(variant: Variant, target: GPUTarget, chip: str, cfg: Any = None) -> list[Binary]:
    with device.target_device(chip):
        launches = launches_of(
            lambda *arguments: variant.call(*arguments, cfg=cfg), *variant.arguments(), modules=(dense_launch,)
        )
    return [compile_launch(launch, target) for launch in launches]


def on_architectures() -> list[Any]:
    """The core variants on every architecture, the others on one in turn; all of them in the full run."""
    names = list(NVIDIA)
    in_turn = ("sm_90", "sm_80", "sm_90", "sm_100")
    chosen = [(variant, name) for variant in (PLAIN, SEGMENTS) for name in names]
    for place, variant in enumerate(VARIANTS):
        chosen += [(variant, name) for name in (names if FULL else [in_turn[place % len(in_turn)]])]
    return [pytest.param(variant, name, id=f"{variant}-{name}") for variant, name in chosen]


@pytest.mark.parametrize(("variant", "architecture"), on_architectures())
def test_nvidia(variant: Variant, architecture: str) -> None:
    chip = NVIDIA[architecture]
    binaries = compiled(variant, GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32), chip)
    assert len(binaries) == (2 if variant.mask == "segments" else 1)
    for binary in binaries:
        assert binary.stack <= MOST_SPILLED_BYTES, f"{binary.kernel} spills {binary.stack} of {binary.registers}"
        assert binary.shared <= device.KNOWN_DEVICES[chip].shared_memory
    attend = binaries[-1]
    assert (attend.mma + attend.wgmma > 0) == (variant.dtype != "float32")
    assert attend.cp_async > 0, "K and V are not loaded ahead"
    if attend.prefills and architecture == "sm_90":
        assert attend.wgmma > 0
        assert attend.depth >= 2


@pytest.mark.parametrize("variant", [PLAIN, SEGMENTS], ids=str)
def test_two_programs_share_a_multiprocessor(variant: Variant) -> None:
    """The plan of the heuristics: an H100 has registers and shared memory for it, and loads overlap computing."""
    attend = compiled(variant, GPUTarget("cuda", 90, 32), "h100")[-1]
    cfg = jax_bridge.Attention().heuristic_cfg(_invocation(variant))
    assert (cfg.block_q, cfg.programs_per_sm) == (128, 2)  # type: ignore[attr-defined]
    assert 2 * attend.registers * 32 * attend.launch.num_warps <= 65_536
    assert 2 * (attend.shared + 1024) <= 228 * 1024
    check_overlap(attend)


def _invocation(variant: Variant) -> jax_bridge.Invocation:
    query, key, value, sinks, info = variant.arguments()
    operation = jax_bridge.Attention()
    return operation.invocation(query, key, value, None, None, sinks, mask_info=info, causal=True)


def test_every_candidate_compiles() -> None:
    operation = jax_bridge.Attention()
    with device.target_device("h100"):
        candidates = operation.candidate_cfgs(_invocation(PLAIN))
    assert operation.heuristic_cfg(_invocation(PLAIN)) in candidates
    assert len(candidates) >= 6
    for cfg in candidates[1 :: 1 if FULL else 3]:
        (attend,) = compiled(PLAIN, GPUTarget("cuda", 90, 32), "h100", cfg)
        assert attend.wgmma > 0
        assert attend.shared <= device.KNOWN_DEVICES["h100"].shared_memory


@pytest.mark.parametrize(
    ("variant", "chip"),
    [*((variant, "mi300x") for variant in (PLAIN, SEGMENTS, VARIANTS[-1])), (WIDEST, "l4"), (SEGMENTS, "l4")],
    ids=str,
)
def test_chips_with_little_shared_memory(variant: Variant, chip: str) -> None:
    """What the heuristics choose there can be launched."""
    described = device.KNOWN_DEVICES[chip]
    for binary in compiled(variant, target_of(described), chip):
        assert binary.shared <= described.shared_memory


def test_addresses_are_64_bit() -> None:
    """Tokens and batch rows are widened before they meet a stride: keys may hold more than 2^31 elements."""
    variant = Variant("", rows=1 << 20, batch=3, num_q_heads=40, num_kv_heads=10, head_dim=96)
    ttgir = compiled(variant, GPUTarget("cuda", 90, 32), "h100")[0].ttgir
    for stride in (10 * 96, (1 << 20) * 10 * 96):
        widths = re.findall(rf"arith\.constant (?:dense<{stride}>|{stride}) : (?:tensor<\w+x)?(i\d+)", ttgir)
        assert "i64" in widths, f"a stride of {stride} is multiplied in {widths}"


LONG = Variant("long", rows=1 << 16, mask="segments", batch=2)


def lowered(variant: Variant, platform: str | None, function: Any = None) -> str:
    """The program of a call for CUDA."""
    call = function or (lambda *arguments: variant.call(*arguments, platform=platform))
    return jax.jit(call).trace(*variant.arguments()).lower(lowering_platforms=("cuda",)).as_text()


def test_auto_takes_the_kernel_and_no_matrix_appears() -> None:
    """65536 rows and keys, segments: nothing in the program is as large as rows times keys, not even a mask."""
    text = lowered(LONG, None)
    assert text.count("@triton_kernel_call_ffi") == 2
    largest = max(
        jnp.prod(jnp.array([int(size) for size in shape.rstrip("x").split("x")], jnp.float32))
        for shape in re.findall(r"tensor<((?:\d+x)+)", text)
    )
    assert largest <= 2 * LONG.rows * 32 * 128


@pytest.mark.parametrize(
    "options", [{"logits_soft_cap": 5.0}, {"return_weights": True}, {"softmax_dtype": jnp.bfloat16}], ids=str
)
def test_auto_takes_xla_for_what_the_kernel_lacks(options: dict[str, Any]) -> None:
    variant = Variant("", rows=64, options=options)
    takes_kernel = "logits_soft_cap" in options
    assert ("@triton_kernel_call_ffi" in lowered(variant, None)) == takes_kernel
    assert ("dot_general" in lowered(variant, None)) != takes_kernel


def test_auto_differentiates_through_xla() -> None:
    variant = Variant("", rows=64)

    def gradient(query: Any, *others: Any) -> Any:
        return jax.grad(lambda query: variant.call(query, *others, platform=None).astype(jnp.float32).sum())(query)

    text = lowered(variant, None, gradient)
    assert "@triton_kernel_call_ffi" not in text
    assert "dot_general" in text


def test_export_and_vmap() -> None:
    variant = Variant("", rows=64, mask="lengths")
    checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
    jitted = jax.jit(lambda *arguments: variant.call(*arguments, platform=None))
    exported = jax.export.export(jitted, platforms=["cpu", "cuda"], disabled_checks=checks)(*variant.arguments())
    assert "triton_kernel_call_ffi" in exported.mlir_module()
    batched = jax.vmap(lambda *arguments: variant.call(*arguments), axis_size=3, in_axes=None)
    assert lowered(variant, None, batched).count("@triton_kernel_call_ffi") == 1


CUDNN: dict[str, tuple[dict[str, Any], str, int]] = {
    "plain": ({"options": {"causal": False}}, "NO_MASK", 0),
    "causal": ({}, "CAUSAL", 0),
    "window": ({"options": {"causal": False, "sliding_window": (9, 0)}}, "CAUSAL", 10),
    "lengths": ({"mask": "lengths", "options": {"causal": False}}, "PADDING", 0),
    "causal-lengths": ({"mask": "lengths", "dtype": "float16"}, "PADDING_CAUSAL", 0),
}


@pytest.mark.parametrize("case", CUDNN)
def test_cudnn_is_asked_for_what_the_call_means(case: str) -> None:
    """Lowered as if cuDNN were here; more keys than rows, of which a causal call hands over those that are seen."""
    changes, mask_type, window = CUDNN[case]
    variant = Variant("", **{"rows": 64, "keys": 96, **changes})
    with mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", return_value=91_000):
        text = lowered(variant, "cuda")
    (call,) = re.findall(r"custom_call @__cudnn\$fmhaSoftmax\(.*", text)
    (config,) = re.findall(r'backend_config = "((?:[^"\\]|\\.)*)"', call)
    asked = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
    assert (asked["mask_type"], asked["sliding_window_length"]) == (mask_type, window)
    assert asked["fmha_scale"] == pytest.approx(128**-0.5)
    num_keys = 64 if "CAUSAL" in mask_type else 96
    assert f"tensor<1x{num_keys}x8x128x" in call
