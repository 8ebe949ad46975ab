"""Compiles the kernels that a call would launch, for any GPU, on a host without one, and reads the machine code."""

import contextlib
import functools
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from jax_bridge.device import Device
from jax_bridge.launch import backend_options

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "int8": "i8",
    "int32": "i32",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the bridge would make it."""

    kernel: Any
    dtypes: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None


@dataclass(frozen=True)
class Binary:
    """What the compiler made of a launch for one target."""

    kernel: str
    registers: int
    stack: int
    shared: int
    depth: int
    """Tiles of K or V that the software pipeline keeps in shared memory."""
    wgmma: int
    wgmma_waits: int
    """Waits for them: as many as there are of them where registers do not suffice to have several under way."""
    mma: int
    cp_async: int
    tma: int
    """Boxes that the TMA fetches."""
    wide_loads: int
    wide_stores: int
    narrow_stores: int
    ttgir: str
    sass: str
    launch: Launch

    @property
    def prefills(self) -> bool:
        """Whether it computes tiles of many rows, beside those of few or alone."""
        tiles = [value for name, value in self.launch.constants.items() if name.endswith("TILE")]
        return any(tile.skip_masks for tile in tiles)

    def main_loops(self) -> list[tuple[str, str]]:
        """For every innermost loop with a dot product: what stands before it in its block, and its body."""
        lines = self.ttgir.splitlines()
        loops = []
        for begin, line in enumerate(lines):
            if "scf.for" not in line:
                continue
            indent = line[: len(line) - len(line.lstrip())]
            end = next(i for i in range(begin + 1, len(lines)) if lines[i].startswith(f"{indent}}}"))
            body = "\n".join(lines[begin + 1 : end])
            if re.search(r"tt\.dot |warp_group_dot ", body) and "scf.for" not in body:
                outer = max(
                    (i for i in range(begin) if re.match(r" *(scf\.(for|while|if)|tt\.func)", lines[i])), default=0
                )
                loops.append(("\n".join(lines[outer:begin]), body))
        return loops


def tile_copies(text: str) -> int:
    """Copies of two-dimensional tiles into shared memory that go on beside other work."""
    return len(re.findall(r"async_copy_global_to_local .* : tensor<\d+x\d+x", text))


@contextlib.contextmanager
def recorded_launches(*modules: Any) -> Iterator[list[Launch]]:
    """Replaces `launch` in the bridge's `modules` by a recorder that answers zeros."""
    launches: list[Launch] = []

    def record(kernel: Any, *, outputs: Any, operands: Any, constants: Any, **options: Any) -> dict[str, jax.Array]:
        updated = options.pop("updated", None) or {}
        operands = {**operands, **updated}
        written = {name: output for name, output in outputs.items() if output is not None}
        arrays = {**written, **{name: array for name, array in operands.items() if array is not None}}
        absent = {name: None for name in (*outputs, *operands) if name not in arrays}
        dtypes = {name: _type_of(array) for name, array in arrays.items()}
        compiler = (options["num_warps"], options["num_stages"], options.get("max_registers"))
        launches.append(Launch(kernel, dtypes, {**constants, **absent}, *compiler))
        changed = {name: array for name, array in updated.items() if array is not None}
        return {name: jnp.zeros(output.shape, output.dtype) for name, output in {**written, **changed}.items()}

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "launch", record))
        yield launches


def _type_of(array: Any) -> str:
    """Triton's name for the type of an operand."""
    if hasattr(array, "block_shape"):  # what `launch.descriptor` makes of one
        element, block = _TYPES[jnp.dtype(array.base.dtype).name], ",".join(map(str, array.block_shape))
        return f"tensordesc<{element}[{block}],{array.layout!r}>"
    return f"*{_TYPES[jnp.dtype(array.dtype).name]}"


def launches_of(
    function: Callable[..., Any], *arguments: Any, modules: tuple[Any, ...], **keywords: Any
) -> list[Launch]:
    """The launches of `function` of arrays or `ShapeDtypeStruct`s; keywords that are none of these are static."""
    traced = {name: value for name, value in keywords.items() if isinstance(value, jax.Array | jax.ShapeDtypeStruct)}
    static = {name: value for name, value in keywords.items() if name not in traced}
    jax.clear_caches()  # a trace from before would not launch again, and ours answers zeros
    with recorded_launches(*modules) as launches:
        jax.eval_shape(functools.partial(function, **static), *arguments, **traced)
    jax.clear_caches()
    return launches


def target_of(device: Device) -> GPUTarget:
    """What Triton's compiler calls a device."""
    if device.vendor == "amd":
        return GPUTarget("hip", device.architecture, 64)
    return GPUTarget("cuda", device.compute_capability, 32)


def compile_launch(launch: Launch, target: GPUTarget) -> Binary:
    """Compiles a launch; machine code is read for NVIDIA targets only."""
    names = launch.kernel.arg_names
    source_type = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_type(
        launch.kernel,
        {name: launch.dtypes.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name, dtype in launch.dtypes.items() if dtype[0] == "*"
        },
    )
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **backend_options(launch.max_registers),
    }
    compiled = triton.compile(source, target=target, options=options)
    ttgir = compiled.asm["ttgir"]
    buffers = [int(size) for size in re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)]
    sass, usage = _disassemble(compiled.asm["cubin"]) if target.backend == "cuda" else ("", "REG:0 STACK:0")
    return Binary(
        kernel=launch.kernel.__name__,
        registers=_figure("REG", usage),
        stack=_figure("STACK", usage),
        shared=compiled.metadata.shared,
        depth=_depth(buffers, launch),
        wgmma=sass.count("HGMMA"),
        wgmma_waits=sass.count("WARPGROUP.DEPBAR"),
        mma=sass.count("HMMA"),
        cp_async=sass.count("LDGSTS"),
        tma=sass.count("UTMALDG"),
        wide_loads=len(re.findall(r"LDG\.E[.\w]*\.128", sass)),
        wide_stores=len(re.findall(r"STG\.E[.\w]*\.128", sass)),
        narrow_stores=len(re.findall(r"STG\.E(?![.\w]*\.128)", sass)),
        ttgir=ttgir,
        sass=sass,
        launch=launch,
    )


def _depth(buffers: list[int], launch: Launch) -> int:
    """How many tiles the buffers hold that K and V have; of Gluon's the queries' is another one."""
    if not buffers:
        return 0
    return statistics.mode(buffers) if launch.kernel.is_gluon() else max(buffers)


def _figure(name: str, usage: str) -> int:
    found = re.search(rf"{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump names no {name}: {usage}")
    return int(found[1])


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _answer("nvdisasm", "-c", file.name), _answer("cuobjdump", "-res-usage", file.name)


def _answer(tool: str, *arguments: str) -> str:
    """What a tool prints; its warnings, of which there are some for every binary, only where it fails."""
    finished = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{tool} {' '.join(arguments)}: {finished.stderr}")
    return finished.stdout
