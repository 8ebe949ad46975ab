"""Times of JAX computations on a device whose caches must not serve what a real program would read from memory."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_bridge.timing import (
    CompiledCalls,
    Program,
    Timing,
    compile_calls,
    compile_program,
    measure,
    measure_program,
)

__all__ = [
    "CompiledCalls",
    "Program",
    "Timing",
    "add_sampling_options",
    "compile_calls",
    "compile_program",
    "copy_bandwidth",
    "describe_machine",
    "matrix_rate",
    "measure",
    "measure_program",
    "print_machine",
    "sampling_of",
]

DISTRIBUTIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton", "numpy", "torch")


def copy_bandwidth(num_bytes: int = 1 << 30, *, repeats: int = 20, sample_seconds: float = 0.03) -> dict[str, float]:
    """Bytes per second, read plus written, of copying `num_bytes` within the device, by two ways of XLA.

    Returns:
        `memcpy`: XLA's copy. `add`: an elementwise kernel.
    """
    source = jnp.arange(num_bytes // 4, dtype=jnp.uint32)
    ways: dict[str, Callable[[jax.Array], jax.Array]] = {"memcpy": jnp.copy, "add": lambda array: array + jnp.uint32(1)}
    rates = {}
    for name, copy in ways.items():
        # The donated destination lets executions follow each other without new allocations.
        step = jax.jit(
            lambda source, destination, copy=copy: copy(source), donate_argnames="destination", keep_unused=True
        )
        destination = jnp.zeros_like(source)

        def enqueue(_: int, step: Callable[..., jax.Array] = step) -> jax.Array:
            nonlocal destination
            destination = step(source, destination)
            return destination

        timing = measure(enqueue, repeats=repeats, sample_seconds=sample_seconds)
        rates[name] = 2 * source.nbytes / timing.median
    return rates


def matrix_rate(size: int = 8192, *, repeats: int = 20, sample_seconds: float = 0.03) -> float:
    """FLOPs per second of the product of two bfloat16 matrices `[size, size]` of normal values."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    timing = measure(lambda _: product(left, right), repeats=repeats, sample_seconds=sample_seconds)
    return 2 * size**3 / timing.median


def describe_machine() -> dict[str, str]:
    """The device, the host and the versions of what a timing depends on."""
    device = jax.devices()[0]
    facts = {
        "device": device.device_kind,
        "host": f"{platform.machine()}, Python {platform.python_version()}, {platform.platform()}",
        "command": " ".join([f"python -m {_main_module()}", *sys.argv[1:]]),
    }
    if executable := shutil.which("nvidia-smi"):
        query = [executable, "--query-gpu=name,driver_version,clocks.max.mem,power.limit", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        facts["nvidia-smi"] = answer.stdout.strip()
    versions = []
    for name in DISTRIBUTIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["versions"] = ", ".join(versions)
    return facts


def print_machine(facts: Mapping[str, str], rates: Mapping[str, float]) -> None:
    """Print what `describe_machine` and `copy_bandwidth` answered, and an empty line."""
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    if rates:
        print("copy: " + ", ".join(f"{name} {rate / 1e12:.3f} TB/s" for name, rate in rates.items()))
    print()


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options for how often and how long to time, and where to store it."""
    parser.add_argument("--repeats", type=int, default=20, help="timed samples")
    parser.add_argument("--sample-ms", type=float, default=30.0, help="length of a timed sample")
    parser.add_argument("--json", type=Path, help="store all numbers here")


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `measure` that these options stand for."""
    return {"repeats": options.repeats, "sample_seconds": options.sample_ms / 1e3}


def _main_module() -> str:
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return specification.name if specification else sys.argv[0]
