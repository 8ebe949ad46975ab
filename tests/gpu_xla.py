"""Compiles `tests.gpu_programs` for an H100 by the GPU compiler of XLA, on a host without a GPU.

The compiler is in JAX's CUDA plugin, which `make set-up` puts into a folder of its own: where JAX finds it, JAX looks
for a GPU and complains. So the programs are compiled in a process of their own, `python -m tests.gpu_xla`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
from jax.sharding import Sharding, SingleDeviceSharding

import jax_bridge.launch
from tests.gpu_programs import PROGRAMS, UNGUARDED

ROOT = Path(__file__).resolve().parent.parent
COMPILER = Path(sys.prefix) / "gpu-compiler"
PLUGIN = "jax_plugins.xla_cuda13"
_UNGUARDED = "without barriers"

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's `GpuTargetConfigProto`."""


@dataclass(frozen=True)
class Instruction:
    """A line of a compiled program.

    Attributes:
        computation: The name of the computation that it stands in.
        result: Its type, as in `(bf16[8,128]{1,0}, s32[])`.
        opcode: As in `custom-call`.
        text: The line.
    """

    computation: str
    result: str
    opcode: str
    text: str


class Compiled:
    """What XLA made of a program, read from its text."""

    _COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
    _INSTRUCTION = re.compile(r"  (?:ROOT )?%\S+ = (\(.*?\)|\S+) ([\w-]+)\(")
    _PLUMBING = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "custom-call")

    def __init__(self, text: str) -> None:
        self.header = text.partition("\n")[0]
        self.instructions: list[Instruction] = []
        computation = ""
        for line in text.splitlines():
            if begins := self._COMPUTATION.match(line):
                computation = begins[1]
            elif found := self._INSTRUCTION.match(line):
                self.instructions.append(Instruction(computation, found[1], found[2], line))

    @property
    def launches(self) -> list[Instruction]:
        """Calls of Triton kernels."""
        is_ours = 'custom_call_target="triton_kernel_call_ffi"'
        return [i for i in self.instructions if i.opcode == "custom-call" and is_ours in i.text]

    @property
    def updating(self) -> list[Instruction]:
        """Those launches that change operands in place."""
        return [launch for launch in self.launches if "output_to_operand_aliasing" in launch.text]

    @property
    def fused_updating(self) -> list[Instruction]:
        """Those of them in a fusion, which has no word for what its calls change in place."""
        fused = {name for i in self.instructions for name in re.findall(r"calls=\{?%([^\s,}]+)", i.text)}
        return [launch for launch in self.updating if launch.computation in fused]

    def makers(self, shape: tuple[int, ...]) -> list[str]:
        """Instructions that produce an array of `shape`, other than launches and what hands arrays on."""
        array = f"[{','.join(map(str, shape))}]"
        return [i.text.strip() for i in self.instructions if array in i.result and i.opcode not in self._PLUMBING]


def is_available() -> bool:
    """Whether the compiler is there: in its folder, or among the packages, where there is a GPU."""
    if (COMPILER / "jax_plugins").is_dir():
        return True
    return importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec(PLUGIN) is not None


def compiled(name: str, *, with_barriers: bool = True) -> Compiled:
    """A program; those without the barriers of `jax_bridge.launch` are there for the names in `UNGUARDED` only."""
    return _compiled()[name if with_barriers else f"{name} {_UNGUARDED}"]


@functools.cache
def _compiled() -> dict[str, Compiled]:
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {
            "JAX_BRIDGE_CACHE_DIR": scratch,
            "JAX_BRIDGE_TARGET": "h100",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(COMPILER),
            "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        }
        command = [sys.executable, "-m", "tests.gpu_xla"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: Compiled(text) for name, text in json.loads(done.stdout).items()}


def _h100() -> Sharding:
    from jax._src import xla_bridge
    from jax.experimental import topologies

    # JAX would look for a GPU to tell what "cuda" is short for.
    with mock.patch.object(xla_bridge, "canonicalize_platform", lambda platform: platform):
        topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])


@contextlib.contextmanager
def _ptxas() -> Iterator[None]:
    """Lets XLA find the assembler for which Triton has written PTX; others may be older, or there may be none."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "ptxas").symlink_to(knobs.nvidia.ptxas_blackwell.path)
        with mock.patch.dict(os.environ, PATH=f"{scratch}:{os.environ['PATH']}"):
            yield


def _text(name: str, sharding: Sharding) -> str:
    print("compiling", name, file=sys.stderr)
    program = PROGRAMS[name]
    arguments = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), program.arguments
    )
    text = jax.jit(program.function, donate_argnums=program.donated).lower(*arguments).compile().as_text()
    assert text is not None
    return text


def _main() -> None:
    device = _h100()
    with _ptxas():
        texts = {name: _text(name, device) for name in PROGRAMS}
        jax.clear_caches()
        with mock.patch.object(jax_bridge.launch, "_not_slices", lambda arrays: arrays):
            texts |= {f"{name} {_UNGUARDED}": _text(name, device) for name in UNGUARDED}
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    _main()
