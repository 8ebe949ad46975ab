"""Decode workloads for timing this project and its peers, built from seeds with numpy alone.

Peers run in a process of their own, without JAX. Both sides rebuild the same queries, page tables and cache contents
from the functions here, so that nothing large has to be handed over and outputs can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 20_261_121
NAMES = ("1x4096", "1x32768", "8x4096", "12x8192", "32x2048", "64x4096", "128x1024", "256x4096", "ragged64")
KEY_SALT, VALUE_SALT = 1, 2
ITEM_BYTES = 2  # bfloat16

ASSUMED_BANDWIDTH = 2.8e12  # bytes/s; only sizes the programs
ASSUMED_OVERHEAD = 6e-6  # seconds a call; only sizes the programs
PROGRAM_SECONDS = 8e-3
ROTATION_BYTES = 1e9  # twenty times the 50 MB of L2 of an H100
MAX_CHUNKS = 16


@dataclass(frozen=True)
class DecodeCase:
    """One token for each of several sequences, against a paged bfloat16 cache."""

    name: str
    lengths: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    @property
    def table_width(self) -> int:
        return math.ceil(max(self.lengths) / self.page_size)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one call has to read."""
        return sum(self.lengths) * 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, K and V together."""
        return self.page_size * 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES

    def rotation(self, max_calls: int) -> tuple[int, int]:
        """Calls in one program, and how many such groups of distinct argument sets to rotate among."""
        call_seconds = self.kv_bytes / ASSUMED_BANDWIDTH + ASSUMED_OVERHEAD
        calls = min(max(math.ceil(PROGRAM_SECONDS / call_seconds), 4), max_calls)
        chunks = min(math.ceil(ROTATION_BYTES / (self.kv_bytes * calls)), MAX_CHUNKS)
        return calls, chunks

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> DecodeCase:
        return cls(**{**fields, "lengths": tuple(fields["lengths"])})


@dataclass(frozen=True)
class ArgumentSet:
    """What differs from call to call; float32 queries hold values that bfloat16 represents exactly."""

    query: NDArray[np.float32]  # [S, Hq, D]
    block_tables: NDArray[np.int32]  # [S, MP]


def parse_case(name: str, **geometry: int) -> DecodeCase:
    """The case called `name`: `<sequences>x<length>`, or `ragged<sequences>` with lengths `128 + (7919 i) % 16000`.

    Raises:
        ValueError: `name` has neither form.
    """
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        lengths = (int(match[2]),) * int(match[1])
    elif match := re.fullmatch(r"ragged(\d+)", name):
        lengths = tuple(128 + (i * 7919) % 16000 for i in range(int(match[1])))
    else:
        raise ValueError(f"unknown case {name!r}: expected SEQUENCESxLENGTH or raggedSEQUENCES, such as {NAMES}")
    if not lengths or not max(lengths):
        raise ValueError(f"case {name!r} has nothing to attend to")
    return DecodeCase(name, lengths, **geometry)


def num_pool_pages(cases: list[DecodeCase], pool_bytes: float) -> int:
    """Pages of a pool of about `pool_bytes`.

    Raises:
        ValueError: one call of a case needs more pages than that, or the cases differ in geometry.
    """
    if len({(case.num_kv_heads, case.head_dim, case.page_size) for case in cases}) != 1:
        raise ValueError("the cases of one run share one pool and need one page geometry")
    pages = int(pool_bytes // cases[0].page_bytes)
    for case in cases:
        if (needed := case.num_seqs * case.table_width) > pages:
            raise ValueError(f"case {case.name} needs {needed} pages, the pool of {pool_bytes / 1e9:g} GB has {pages}")
    return pages


def argument_sets(case: DecodeCase, pool_pages: int, count: int) -> list[ArgumentSet]:
    """`count` sets with distinct queries; their pages are shuffled and repeat only once the pool is used up."""
    identity = [SEED, *case.name.encode()]
    order = np.random.default_rng(identity).permutation(pool_pages).astype(np.int32)
    shape = (case.num_seqs, case.table_width)
    span = np.arange(math.prod(shape))
    sets = []
    for index in range(count):
        integers = np.random.default_rng([*identity, index]).integers(
            -128, 128, (case.num_seqs, case.num_q_heads, case.head_dim)
        )
        pages = order[(index * span.size + span) % pool_pages]
        sets.append(ArgumentSet((integers / 64).astype(np.float32), pages.reshape(shape)))
    return sets


def scramble(page: Any, within: Any, salt: int, constant: Callable[[int], Any] = int) -> Any:
    """Pseudo-random 8-bit integers for positions `within` pages, the same in every array library.

    Every constant stays below 2^31, so that int64 arithmetic is exact modulo 2^32, as uint32 arithmetic is.

    Args:
        page: page ids, an integer array of 64 bits or unsigned of 32 bits that broadcasts against `within`.
        within: `(token * num_kv_heads + head) * head_dim + dim`, of the same type.
        salt: tells the key cache from the value cache.
        constant: makes a scalar of the arrays' type.

    Returns:
        Values from 0 to 255.
    """
    low_bits = constant(0xFFFFFFFF)
    mixed = page * constant(0x1E3779B1) + within * constant(0x5BD1E995) + constant(salt * 0x27D4EB2F)
    mixed = mixed & low_bits
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        mixed = ((mixed ^ (mixed >> constant(shift))) * constant(factor)) & low_bits
    return (mixed ^ (mixed >> constant(15))) >> constant(24)
