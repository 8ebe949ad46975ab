"""Cache writes and merging beside the copy bandwidth: `python -m bench.kv_pages`.

Both only move memory. Every timed program is first held to `platform="xla"`. On a CPU:

    JAX_PLATFORMS=cpu python -m bench.kv_pages --platform xla --tokens 64 --rotation-mb 1 --repeats 3 --sample-ms 1
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.check import ROW_TOLERANCE, row_error
from bench.timing import (
    Program,
    Timing,
    add_sampling_options,
    compile_program,
    copy_bandwidth,
    describe_machine,
    measure,
    measure_program,
    print_machine,
    sampling_of,
)
from jax_bridge import merge_attention_states, write_kv_pages
from jax_bridge.layouts import CacheSizes, cache_shape

PAGE_SIZE = 16
NUM_Q_HEADS, NUM_KV_HEADS = 32, 8
MAX_CALLS = 64

Caches = tuple[jax.Array, jax.Array]
Tokens = tuple[jax.Array, jax.Array, jax.Array]  # key, value, slots


@dataclass(frozen=True)
class WriteCase:
    """A write of bfloat16 tokens."""

    num_tokens: int
    kv_layout: str = "PTHD"
    cache_dtype: str = "bfloat16"
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"write {self.num_tokens} tokens, {self.kv_layout}, {self.cache_dtype}, D {self.head_dim}"

    @property
    def scales(self) -> dict[str, float]:
        """Given where the cache is quantised; powers of two, so that every platform rounds the same quotients."""
        return {} if self.cache_dtype == "bfloat16" else {"k_scale": 2.0**-5, "v_scale": 2.0**-6}

    @property
    def call_bytes(self) -> int:
        """Bytes of K and V that a call reads and writes."""
        elements = 2 * self.num_tokens * NUM_KV_HEADS * self.head_dim
        return elements * (jnp.dtype(jnp.bfloat16).itemsize + jnp.dtype(self.cache_dtype).itemsize)

    def caches(self, calls: int) -> Caches:
        """With a slot for every token of every call."""
        sizes = CacheSizes(math.ceil(calls * self.num_tokens / PAGE_SIZE), PAGE_SIZE, NUM_KV_HEADS, self.head_dim)
        shape = cache_shape(self.kv_layout, sizes)
        return jnp.zeros(shape, self.cache_dtype), jnp.zeros(shape, self.cache_dtype)

    def token_sets(self, calls: int) -> list[Tokens]:
        """Tokens of each call; their slots are runs of shuffled pages, as an engine hands them out."""
        num_pages = math.ceil(calls * self.num_tokens / PAGE_SIZE)
        pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        slots = (pages[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE, dtype=np.int32)).reshape(-1)
        shape = (self.num_tokens, NUM_KV_HEADS, self.head_dim)
        sets = []
        for call in range(calls):
            key, value = jax.random.normal(jax.random.key(call), (2, *shape), jnp.bfloat16)
            sets.append((key, value, jnp.asarray(slots[call * self.num_tokens : (call + 1) * self.num_tokens])))
        return sets

    def write_all(self, platform: str, caches: Caches, sets: Sequence[Tokens]) -> Caches:
        """All calls, one after the other, in the same caches."""
        for key, value, slots in sets:
            caches = write_kv_pages(
                key, value, *caches, slots, **self.scales, kv_layout=self.kv_layout, platform=platform
            )
        return caches


def checked_writes(case: WriteCase, platform: str, rotation_bytes: float) -> tuple[Callable[[int], Any], int]:
    """A function that starts a program of writes into the caches of the one before, and how many it holds.

    Raises:
        ArithmeticError: the caches are wrong.
    """
    calls = min(MAX_CALLS, max(4, math.ceil(rotation_bytes / case.call_bytes)))
    sets = case.token_sets(calls)
    step = jax.jit(functools.partial(case.write_all, platform), donate_argnums=0)
    caches = step(case.caches(calls), sets)
    expected = functools.partial(case.write_all, "xla")(case.caches(calls), sets)
    for got, wanted in zip(caches, expected, strict=True):
        if differing := int(jnp.sum(got.astype(jnp.float32) != wanted.astype(jnp.float32))):
            raise ArithmeticError(f"{case.name}: {differing} values of the cache differ from those of xla")

    def enqueue(_: int) -> Any:
        nonlocal caches
        caches = step(caches, sets)
        return caches

    return enqueue, calls


def checked_merges(num_tokens: int, head_dim: int, platform: str, rotation_bytes: float) -> Program:
    """A program of merges.

    Raises:
        ArithmeticError: an output is wrong.
    """
    shape = (2, num_tokens, NUM_Q_HEADS)
    calls = min(MAX_CALLS, max(4, math.ceil(rotation_bytes / merged_bytes(num_tokens, head_dim))))
    sets = []
    for call in range(calls):
        out_a, out_b = jax.random.normal(jax.random.key(call), (*shape, head_dim), jnp.bfloat16)
        lse_a, lse_b = 3 * jax.random.normal(jax.random.key(calls + call), shape)
        sets.append((out_a, lse_a, out_b, lse_b))
    program = compile_program(functools.partial(merge_attention_states, platform=platform), sets)
    expected = merge_attention_states(*sets[0], platform="xla")
    if not (error := row_error(program.run(0)[0][0], expected[0])) <= ROW_TOLERANCE:
        raise ArithmeticError(f"merge of {num_tokens} tokens: row error {error:.2e}, allowed {ROW_TOLERANCE}")
    return program


def merged_bytes(num_tokens: int, head_dim: int) -> int:
    """Bytes of two bfloat16 results with their LSEs, and of what becomes of them."""
    return 3 * num_tokens * NUM_Q_HEADS * (2 * head_dim + 4)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the large calls")
    parser.add_argument("--platform", default="triton")
    parser.add_argument("--rotation-mb", type=float, default=1000.0, help="that a program moves; many times the L2")
    add_sampling_options(parser)
    options = parser.parse_args(arguments)
    facts = describe_machine()
    rates = copy_bandwidth(min(1 << 30, int(options.rotation_mb * 1e6)), repeats=options.repeats)
    copy = max(rates.values())
    print_machine(facts, rates)
    print("| call | us | TB/s | of copy |")
    print("|---|---|---|---|")
    rows = []

    def report(name: str, timing: Timing, call_bytes: int) -> None:
        rate = call_bytes / timing.median
        print(f"| {name} | {timing.median * 1e6:.1f} | {rate / 1e12:.2f} | {rate / copy:.0%} |", flush=True)
        rows.append({"call": name, "seconds": timing.median, "bytes": call_bytes})

    cases = [
        *(WriteCase(options.tokens, kv_layout) for kv_layout in ("PTHD", "PHTD", "HPTD")),
        *(WriteCase(options.tokens, cache_dtype=dtype) for dtype in ("float8_e4m3fn", "float8_e5m2", "int8")),
        WriteCase(options.tokens, head_dim=80),
        *(WriteCase(max(1, options.tokens // share)) for share in (8, 32, 128)),
    ]
    rotation_bytes = options.rotation_mb * 1e6
    sampling = sampling_of(options)
    for case in cases:
        enqueue, calls = checked_writes(case, options.platform, rotation_bytes)
        report(case.name, measure(enqueue, calls=calls, **sampling), case.call_bytes)
    for num_tokens, head_dim in ((options.tokens, 128), (options.tokens, 80), (max(1, options.tokens // 128), 128)):
        program = checked_merges(num_tokens, head_dim, options.platform, rotation_bytes)
        timing = measure_program(program, **sampling)
        report(f"merge {num_tokens} tokens, D {head_dim}", timing, merged_bytes(num_tokens, head_dim))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "copy": rates, "calls": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
