"""What only a GPU can show: exported programs that run, command buffers that replay, layers that follow each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bridge import page_attention, write_kv_pages
from jax_bridge.device import KNOWN_DEVICES, current_device
from tests.serving_layers import ONE_CACHE, STEPS, Batch
from tests.small_calls import arguments, assert_close, run

pytestmark = pytest.mark.gpu

EXPORT = """
import sys
from pathlib import Path
import jax, jax.export
from tests.small_calls import arguments, run
operation, path = sys.argv[1:]
named = arguments(operation)
checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
jitted = jax.jit(lambda named: run(operation, named, platform="triton"))
Path(path).write_bytes(jax.export.export(jitted, platforms=["cuda"], disabled_checks=checks)(named).serialize())
"""


@pytest.mark.parametrize("operation", ["page_attention", "unified_attention", "write_kv_pages"])
def test_a_program_exported_without_a_gpu_runs(operation: str, tmp_path: Path) -> None:
    """Another process, which sees a CPU only and is told what GPU to export for, writes the file."""
    here = current_device()
    target = next(name for name, d in KNOWN_DEVICES.items() if d.compute_capability == here.compute_capability)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_BRIDGE_TARGET": target}
    path = tmp_path / "program"
    subprocess.run([sys.executable, "-c", EXPORT, operation, str(path)], env=environment, check=True, timeout=300)
    exported: Any = jax.export.deserialize(bytearray(path.read_bytes()))
    named = arguments(operation)
    assert_close(exported.call(named), run(operation, named, platform="xla"))


def decode_layers(
    platform: str, layers: int, query: Any, new: Any, caches: Any, slots: Any, lens: Any, tables: Any
) -> Any:
    for _ in range(layers):
        caches = write_kv_pages(new, new, *caches, slots, platform=platform)
        query = page_attention(query, *caches, lens, tables, kv_layout="PTHD", platform=platform)
    return query, caches


def test_a_decoding_step_is_replayed() -> None:
    """XLA puts the launches of a step into a command buffer; replays see new lengths and new queries."""
    pages = 12
    cache = jax.random.normal(jax.random.key(0), (pages, 16, 2, 64))
    new = jax.random.normal(jax.random.key(1), (3, 2, 64))
    tables = jnp.asarray(np.random.default_rng(0).permutation(pages).reshape(3, 4))
    step = jax.jit(decode_layers, static_argnums=(0, 1))
    for seed in range(4):
        query = jax.random.normal(jax.random.key(seed), (3, 8, 64))
        lens = jnp.asarray([1 + seed, 17 * (seed + 1) - seed, 64 - seed])
        slots = jnp.take_along_axis(tables, ((lens - 1) // 16)[:, None], 1)[:, 0] * 16 + (lens - 1) % 16
        given = (query, new, (cache, cache), slots, lens, tables)
        assert_close(step("triton", 4, *given), step("xla", 4, *given))


@pytest.mark.parametrize("num_tokens", [64, 128])
@pytest.mark.parametrize("name", STEPS)
def test_layers_of_a_serving_step_follow_each_other(num_tokens: int, name: str) -> None:
    """Cache writes and attention of many layers, with sequences and rows that are padding, in bfloat16.

    The answer of every layer is compared with that of `xla` on the queries and caches of that layer.
    """
    layers, pages, num_seqs, width = 6, 256, 64, 20
    rng = np.random.default_rng(num_tokens)
    active = 20
    lens = np.zeros(num_seqs, np.int32)
    lens[:active] = rng.integers(1, 12 * 16, active)
    query_lens = (lens > 0).astype(np.int32)
    if num_tokens > num_seqs:
        query_lens[active - 1] = min(70, lens[active - 1])
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    tables = np.zeros((num_seqs, width), np.int32)
    free = iter(rng.permutation(pages))
    slots = np.full(num_tokens, -1, np.int32)
    for sequence in range(active):
        used = -(-lens[sequence] // 16)
        tables[sequence, :used] = [next(free) for _ in range(used)]
        positions = np.arange(lens[sequence] - query_lens[sequence], lens[sequence])
        rows = slice(starts[sequence], starts[sequence + 1])
        slots[rows] = tables[sequence, positions // 16] * 16 + positions % 16
    shape = (layers * pages, 16, 4, 128) if name in ONE_CACHE else (layers, pages, 16, 4, 128)
    caches = tuple(jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in range(2))
    queries = jax.random.normal(jax.random.key(2), (layers, num_tokens, 16, 128), jnp.bfloat16)
    new = jax.random.normal(jax.random.key(3), (layers, 2, num_tokens, 4, 128), jnp.bfloat16)
    batch = Batch(*map(jnp.asarray, (lens, tables, starts, slots)))

    donating = jax.jit(STEPS[name], static_argnums=0, donate_argnums=1)
    for _ in range(3):
        copies = tuple(jnp.copy(cache) for cache in caches)
        written, got = donating("triton", copies, queries, new, batch)
        expected_caches, expected = jax.jit(STEPS[name], static_argnums=0)("xla", caches, queries, new, batch)
        for left, right in zip(written, expected_caches, strict=True):
            np.testing.assert_array_equal(left, right)
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=3e-2, rtol=2e-2)
