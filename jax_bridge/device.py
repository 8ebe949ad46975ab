"""The GPU that kernels are specialised for: the one at hand, or a named target where there is none."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar

import jax

TARGET_VARIABLE = "JAX_BRIDGE_TARGET"

_KIB = 1024
_SHARED_MEMORY = {
    70: 96,
    75: 64,
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    110: 227,
    120: 99,
    121: 99,
}
"""KiB of shared memory that one program may use, by compute capability (CUDA C++ Programming Guide)."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a launch configuration depends on.

    Attributes:
        name: As the driver reports it.
        compute_capability: Major and minor version as one number, 90 for Hopper; the number of the `gfx` of an AMD GPU.
        num_sms: Streaming multiprocessors.
        shared_memory: Bytes of shared memory that one program may use.
        vendor: `"nvidia"` or `"amd"`; kernels compile for both and are launched on NVIDIA's only.
    """

    name: str
    compute_capability: int
    num_sms: int
    shared_memory: int
    vendor: str = "nvidia"

    @property
    def specializes_warps(self) -> bool:
        """Whether it has warpgroups with matrix products of their own, and a TMA: Hopper, and no other."""
        return self.vendor == "nvidia" and self.compute_capability == 90

    @property
    def architecture(self) -> str:
        """As compilers name it: `"sm_90"`, `"gfx942"`."""
        return f"{'sm_' if self.vendor == 'nvidia' else 'gfx'}{self.compute_capability}"

    @property
    def converts_e4m3(self) -> bool:
        """Whether it converts float8_e4m3fn; Triton has no such type on those that do not."""
        return self.vendor == "nvidia" and self.compute_capability >= 89


def _known(name: str, compute_capability: int, num_sms: int) -> Device:
    return Device(name, compute_capability, num_sms, _SHARED_MEMORY[compute_capability] * _KIB)


KNOWN_DEVICES = {
    "a100": _known("NVIDIA A100", 80, 108),
    "l4": _known("NVIDIA L4", 89, 58),
    "rtx4090": _known("NVIDIA GeForce RTX 4090", 89, 128),
    "h100": _known("NVIDIA H100", 90, 132),
    "h200": _known("NVIDIA H200", 90, 132),
    "b200": _known("NVIDIA B200", 100, 148),
    "mi300x": Device("AMD Instinct MI300X", 942, num_sms=304, shared_memory=64 * _KIB, vendor="amd"),
}
DEFAULT_TARGET = "h100"

_target: ContextVar[Device | None] = ContextVar("jax_bridge_target", default=None)


@contextlib.contextmanager
def target_device(device: Device | str) -> Iterator[Device]:
    """Specialises kernels traced inside for `device`: to lower for a GPU from a host without it.

    Args:
        device: A `Device`, or a name in `KNOWN_DEVICES` ("h100", "a100", ...).

    Raises:
        ValueError: The name is not known.
    """
    chosen = device if isinstance(device, Device) else _by_name(device)
    token = _target.set(chosen)
    try:
        yield chosen
    finally:
        _target.reset(token)


def current_device() -> Device:
    """The device that kernels are specialised for.

    In order: `target_device`, the environment variable JAX_BRIDGE_TARGET, the first local GPU, an H100.
    """
    if (chosen := _target.get()) is not None:
        return chosen
    if name := os.environ.get(TARGET_VARIABLE):
        return _by_name(name)
    return _local_gpu() or KNOWN_DEVICES[DEFAULT_TARGET]


def is_at_hand(device: Device) -> bool:
    """Whether this process runs CUDA kernels on such a device, so that times taken here are its own."""
    return device == _local_gpu()


def _by_name(name: str) -> Device:
    try:
        return KNOWN_DEVICES[name.lower()]
    except KeyError:
        raise ValueError(f"target device {name!r} is not known, expected one of {sorted(KNOWN_DEVICES)}") from None


@functools.cache
def _local_gpu() -> Device | None:
    try:
        gpu = jax.local_devices(backend="cuda")[0]
    except RuntimeError:  # this process has no CUDA backend
        return None
    compute_capability = int(gpu.compute_capability.replace(".", ""))
    shared_memory = _SHARED_MEMORY.get(compute_capability, min(_SHARED_MEMORY.values())) * _KIB
    return Device(gpu.device_kind, compute_capability, gpu.core_count, shared_memory)
