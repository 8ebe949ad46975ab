"""Ragged decode over dense rows beside `page_attention` on the same lengths: `python -m bench.ragged`.

Both are held to the float32 reference, and timed over rotating rows, pages and queries. Examples:

    python -m bench.ragged --json ragged.json
    python -m bench.ragged --cases 64x4096of8192 --fields 'kv_blocksize=128,num_stages=3'
    JAX_PLATFORMS=cpu python -m bench.ragged --cases 2x64,3x40of96 --platform xla --rotation-mb 1 --repeats 3

A case `8x8192` is 8 full rows of 8192 keys; `64x4096of8192` is 64 rows of 8192 keys, of which each sees a random range
of up to 4096 that does not begin at 0.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import reference
from bench.cases import SEED
from bench.check import ROW_TOLERANCE, row_error
from bench.operations import parse_configs
from bench.timing import (
    Timing,
    add_sampling_options,
    compile_program,
    copy_bandwidth,
    describe_machine,
    measure_program,
    print_machine,
    sampling_of,
)
from jax_bridge import FwdParams, RaggedDecodeAttentionConfig, page_attention, ragged_decode_attention
from tests.cases import MODELS

NAMES = ("8x8192", "64x4096of8192", "1x131072")
MODEL = MODELS["llama3_8b"]
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = MODEL.num_q_heads, MODEL.num_kv_heads, MODEL.head_dim, MODEL.page_size
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2  # K and V, bfloat16
CHECKED_ROWS = 8

CallArrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class RaggedCase:
    """Ranges of dense bfloat16 rows, and one query token a row."""

    name: str
    batch: int
    longest: int
    """Keys of the longest range; ranges are drawn where rows are longer, else they are the rows."""
    row_length: int

    @property
    def bounds(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """First key and end of every row's range."""
        if self.longest == self.row_length:
            return np.zeros(self.batch, np.int32), np.full(self.batch, self.row_length, np.int32)
        rng = np.random.default_rng(SEED)
        lengths = rng.integers(1, self.longest, self.batch, endpoint=True)
        starts = rng.integers(1, self.row_length - lengths, endpoint=True)
        return starts.astype(np.int32), (starts + lengths).astype(np.int32)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that the ranges cover."""
        starts, ends = self.bounds
        return int((ends - starts).sum()) * TOKEN_BYTES

    @property
    def flops(self) -> int:
        """Floating-point operations of both products over the keys that the ranges cover."""
        return self.kv_bytes // TOKEN_BYTES * 4 * NUM_Q_HEADS * HEAD_DIM

    @property
    def checked_rows(self) -> NDArray[np.intp]:
        """Some rows, the first and the last among them."""
        return np.linspace(0, self.batch - 1, min(self.batch, CHECKED_ROWS)).round().astype(np.intp)

    def sets(self, count: int) -> list[CallArrays]:
        """Of each call: query, K and V rows, both bounds; lengths and page table for as many tokens in these rows."""
        starts, ends = self.bounds
        width = math.ceil(self.longest / PAGE_SIZE)
        sets = []
        for number in range(count):
            keys = jax.random.split(jax.random.key(number), 3)
            shape = (self.batch, self.row_length, NUM_KV_HEADS, HEAD_DIM)
            key, value = (_normal(k, shape) for k in keys[:2])
            query = _normal(keys[2], (self.batch, NUM_Q_HEADS, HEAD_DIM))
            pages = self.batch * self.row_length // PAGE_SIZE
            table = np.random.default_rng([SEED, number]).permutation(pages)[: self.batch * width]
            tables = table.reshape(self.batch, width).astype(np.int32)
            sets.append((query, key, value, *map(jnp.asarray, (starts, ends, ends - starts, tables))))
        return sets


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def parse_case(name: str) -> RaggedCase:
    """The case that `name` describes.

    Raises:
        ValueError: `name` is no such description, or rows cannot hold its ranges or be cut into pages.
    """
    match = re.fullmatch(r"(\d+)x(\d+)(?:of(\d+))?", name)
    sizes = [int(size) for size in match.groups("0")] if match else [0, 0, 0]
    batch, longest, row_length = sizes[0], sizes[1], sizes[2] or sizes[1]
    if not batch or not 0 < longest <= row_length or row_length % PAGE_SIZE:
        raise ValueError(
            f"unknown case {name!r}: expected {NAMES[0]} or {NAMES[1]}, rows of whole pages of {PAGE_SIZE}"
        )
    return RaggedCase(name, batch, longest, row_length)


def attend_ranges(
    platform: str,
    cfg: RaggedDecodeAttentionConfig | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *rest: Any,
) -> jax.Array:
    """`ragged_decode_attention` of the arrays of `RaggedCase.sets`."""
    starts, ends, _, _ = rest
    attended: jax.Array = ragged_decode_attention(query, key, value, starts, ends, platform=platform, cfg=cfg)
    return attended


def _pages(platform: str, query: jax.Array, key: jax.Array, value: jax.Array, *rest: Any) -> jax.Array:
    _, _, lengths, tables = rest
    key_cache, value_cache = (rows.reshape(-1, PAGE_SIZE, *rows.shape[2:]) for rows in (key, value))
    attended: jax.Array = page_attention(
        query, key_cache, value_cache, lengths, tables, kv_layout="PTHD", platform=platform
    )
    return attended


def expected_rows(arrays: CallArrays, rows: NDArray[np.intp]) -> tuple[jax.Array, jax.Array]:
    """What the float32 reference answers on some rows: over their ranges, and over their pages."""
    query, key, value, starts, ends, lengths, tables = arrays
    with jax.default_matmul_precision("highest"):
        some = [array[rows].astype(jnp.float32) for array in (query, key, value)]
        ragged = reference.ragged_decode_attention(*some, starts[rows], ends[rows])
        pages = tables[rows]
        gathered = [a.reshape(-1, PAGE_SIZE, *a.shape[2:])[pages.reshape(-1)].astype(jnp.float32) for a in (key, value)]
        own = jnp.arange(pages.size, dtype=jnp.int32).reshape(pages.shape)
        paged = reference.page_attention(some[0], *gathered, lengths[rows], own, kv_layout="PTHD")
    return ragged, paged


def time_case(
    case: RaggedCase, cfg: RaggedDecodeAttentionConfig | None, options: argparse.Namespace
) -> dict[str, Timing]:
    """One call of many in a program, by both operations.

    Raises:
        ArithmeticError: an output is wrong.
    """
    calls = max(2, math.ceil(options.rotation_mb * 1e6 / case.kv_bytes))
    sets = case.sets(calls)
    rows = case.checked_rows
    expected = expected_rows(sets[0], rows)
    ways: dict[str, Callable[..., jax.Array]] = {
        "ragged": functools.partial(attend_ranges, options.platform, cfg),
        "pages": functools.partial(_pages, options.platform),
    }
    timings = {}
    for (name, way), wanted in zip(ways.items(), expected, strict=True):
        program = compile_program(way, sets)
        if not (error := row_error(program.run(0)[0][rows], wanted)) <= ROW_TOLERANCE:
            raise ArithmeticError(f"{case.name}, {name}: row error {error:.2e}, allowed {ROW_TOLERANCE}")
        timings[name] = measure_program(program, **sampling_of(options))
    return timings


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ragged", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(NAMES), help="by commas")
    parser.add_argument("--fields", default="", help="fields of FwdParams: a=1,b=2;a=3")
    parser.add_argument("--platform", default="triton")
    parser.add_argument("--rotation-mb", type=float, default=1500.0, help="that the calls of a program read")
    add_sampling_options(parser)
    options = parser.parse_args(arguments)
    try:
        options.cases = [parse_case(name) for name in options.cases.split(",")]
        configs = [FwdParams(**fields) if fields else None for fields in parse_configs(options.fields)]
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    options.configs = [None if params is None else RaggedDecodeAttentionConfig(params) for params in configs]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    facts = describe_machine()
    rates = copy_bandwidth(min(1 << 30, int(options.rotation_mb * 1e6)), repeats=options.repeats)
    copy = max(rates.values())
    print_machine(facts, rates)
    print("| rows | ragged us | TB/s | of copy | page_attention us | page / ragged |")
    print("|---|---|---|---|---|---|")
    rows = []
    for case in options.cases:
        for cfg in options.configs:
            timings = time_case(case, cfg, options)
            ragged, pages = (timings[name].median for name in ("ragged", "pages"))
            rate = case.kv_bytes / ragged
            print(
                f"| {case.name} | {ragged * 1e6:.1f} | {rate / 1e12:.2f} | {rate / copy:.0%} | {pages * 1e6:.1f} "
                f"| {pages / ragged:.2f} |",
                flush=True,
            )
            rows.append({"case": case.name, "cfg": str(cfg), "bytes": case.kv_bytes, "ragged": ragged, "pages": pages})
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "copy": rates, "seconds": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
