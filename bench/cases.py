"""Paged attention workloads for timing this project and its peers, built from seeds with numpy alone.

Peers run in a process of their own, without JAX. Both sides rebuild the same queries, page tables and cache contents
from the functions here, so that nothing large has to be handed over and outputs can be compared.

A case is described by its name alone, see `parse_case`; `GROUPS` lists the names that belong together in a report.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.serving_trace import draw_requests

SEED = 20_261_121
KEY_SALT, VALUE_SALT = 1, 2
ITEM_BYTES = 2  # bfloat16

ASSUMED_BANDWIDTH, ASSUMED_FLOPS = 2.8e12, 4e14  # a second; only size the programs
ASSUMED_OVERHEAD = 6e-6  # seconds a call; only sizes the programs
PROGRAM_SECONDS = 8e-3
ROTATION_BYTES = 1e9  # twenty times the 50 MB of L2 of an H100
MAX_CHUNKS = 16
# Pools of every geometry are multiples of this where they can be, and so of one size: what one pool leaves behind fits
# the next one exactly.
POOL_UNIT = 15 << 22

DRAWN_LENGTHS = (128, 16_384)

NAMES = ("1x4096", "1x32768", "8x4096", "12x8192", "32x2048", "64x4096", "128x1024", "256x4096", "ragged64")
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256)
CONTEXTS = {1: (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072), 16: (512, 1024, 2048, 4096, 8192, 16_384)}
CHUNKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = ("-d64", "-d80", "-d96", "-d256", "-kv32", "-kv1", "-page1", "-page64", "-page256")
FEATURES = "-window4096-cap30-sinks"
DECODE_BASE, PREFILL_BASE = "64x4096", "1x4096of4096"
GROUPS: dict[str, tuple[str, ...]] = {
    "decode": NAMES,
    "ragged": ("drawn64", "1x131072+63x512", "trace128"),
    "short": tuple(f"{num_seqs}x4of{keys}" for keys in (4096, 16_384) for num_seqs in (8, 32, 64)),
    "mixed": ("60x4096+4x512of4096", "31x2048+1x2048of2048"),
    "prefill": (
        *("1x1024of1024", "1x4096of4096", "1x16384of16384", "4x512of8192", "8x2048of2048"),
        *("1x16384of16384-window1024", "1x16384of16384-page128"),
    ),
    "shapes": tuple(base + suffix for base in (DECODE_BASE, PREFILL_BASE) for suffix in ("", *SHAPES)),
    "features": tuple(base + suffix for base in (DECODE_BASE, PREFILL_BASE) for suffix in ("", FEATURES)),
    "cliff": tuple(f"{num_seqs}x4096" for num_seqs in BATCHES),
    "contexts": tuple(f"{num_seqs}x{keys}" for num_seqs, lengths in CONTEXTS.items() for keys in lengths),
    "chunks": (
        *("1x16384", *(f"1x{tokens}of16384" for tokens in CHUNKS)),
        *("16x4096", *(f"16x{tokens}of4096" for tokens in CHUNKS if tokens <= 512)),
    ),
}
DEFAULT_GROUPS = ("decode", "ragged", "short", "mixed", "prefill")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a cache, apart from how many pages it has."""

    num_kv_heads: int
    head_dim: int
    page_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, K and V together."""
        return 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, K and V together."""
        return self.page_size * self.token_bytes


@dataclass(frozen=True)
class AttentionCase:
    """New tokens of several sequences against a paged bfloat16 cache that holds them already."""

    name: str
    lengths: tuple[int, ...]
    """Keys of each sequence, new tokens included."""
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    query_lens: tuple[int, ...] = ()
    """New tokens of each sequence, its last ones; if empty, one each."""
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        if not self.query_lens:
            object.__setattr__(self, "query_lens", (1,) * len(self.lengths))
        if not self.lengths:
            raise ValueError(f"case {self.name!r} has no sequences")
        if len(self.query_lens) != len(self.lengths):
            raise ValueError(f"case {self.name!r} has {len(self.query_lens)} chunks for {len(self.lengths)} sequences")
        if any(not 1 <= rows <= keys for rows, keys in zip(self.query_lens, self.lengths, strict=True)):
            raise ValueError(f"case {self.name!r} has sequences of no new token, or of more than it has keys")

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new token."""
        return max(self.query_lens) == 1

    @property
    def base(self) -> str:
        """Name of the case that this one is a variant of; its own if it is none."""
        return self.name.partition("-")[0]

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.num_kv_heads, self.head_dim, self.page_size)

    @property
    def table_width(self) -> int:
        return math.ceil(max(self.lengths) / self.page_size)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each sequence."""
        return tuple(math.ceil(keys / self.page_size) for keys in self.lengths)

    @property
    def query_start_loc(self) -> NDArray[np.int32]:
        """First row of each sequence among the packed ones, and the end: `[S + 1]`."""
        return np.cumsum((0, *self.query_lens), dtype=np.int32)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that some row sees, which one call has to read."""
        seen = (
            keys if self.window is None else min(keys, self.window + rows - 1)
            for rows, keys in zip(self.query_lens, self.lengths, strict=True)
        )
        return sum(seen) * self.geometry.token_bytes

    @property
    def flops(self) -> int:
        """Floating-point operations of both products over the pairs of query row and key that the masks leave."""
        pairs = sum(
            visible_pairs(rows, keys, self.window) for rows, keys in zip(self.query_lens, self.lengths, strict=True)
        )
        return 4 * self.head_dim * self.num_q_heads * pairs

    @property
    def sink_logits(self) -> NDArray[np.float32] | None:
        """A logit for each query head, where the case has sinks."""
        return np.linspace(-2, 4, self.num_q_heads, dtype=np.float32) if self.sinks else None

    def rotation(self, max_calls: int) -> tuple[int, int]:
        """Calls in one program, and how many such groups of distinct argument sets to rotate among."""
        io_bytes = 2 * self.num_tokens * self.num_q_heads * self.head_dim * ITEM_BYTES
        call_bytes = self.kv_bytes + io_bytes
        call_seconds = max(call_bytes / ASSUMED_BANDWIDTH, self.flops / ASSUMED_FLOPS) + ASSUMED_OVERHEAD
        wanted = min(math.ceil(PROGRAM_SECONDS / call_seconds), math.ceil(ROTATION_BYTES / io_bytes))
        calls = min(max(wanted, 4), max_calls)
        chunks = min(math.ceil(ROTATION_BYTES / (call_bytes * calls)), MAX_CHUNKS)
        return calls, chunks

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name != "query_lens" or not self.is_decode}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> AttentionCase:
        """The case that `to_json` stored, also before there were chunks and windows; other entries do not matter."""
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {name: value for name, value in fields.items() if name in known}
        for name in {"lengths", "query_lens"} & values.keys():
            values[name] = tuple(values[name])
        return cls(**values)


def visible_pairs(rows: int, keys: int, window: int | None) -> int:
    """Pairs of one of the last `rows` positions of `keys` and a position that it sees."""
    context = keys - rows
    growing = rows if window is None else min(max(window - context, 0), rows)  # rows that see all keys up to their own
    pairs = growing * (2 * context + growing + 1) // 2
    return pairs if window is None else pairs + (rows - growing) * window


@dataclass(frozen=True)
class ArgumentSet:
    """What differs from call to call; float32 queries hold values that bfloat16 represents exactly."""

    query: NDArray[np.float32]  # [T, Hq, D]
    block_tables: NDArray[np.int32]  # [S, MP]


def parse_case(name: str, **geometry: int) -> AttentionCase:
    """The case that `name` describes.

    `64x4096` is 64 sequences of 4096 keys and one new token each, `4x512of8192` four whose last 512 keys are new, and
    `+` joins several such. Lengths of one new token each also come from `ragged64` (`128 + (7919 i) % 16000`),
    `drawn64` (drawn evenly from `DRAWN_LENGTHS`) and `trace128` (of the conversation trace's statistics, requests
    halfway through their answers). Suffixes change the rest: `-d64` head dim, `-kv1` KV heads, `-page1` page size,
    `-window1024`, `-cap30`, `-sinks`.

    Args:
        name: the description.
        **geometry: sizes of `AttentionCase` for what the name leaves open.

    Raises:
        ValueError: `name` is no such description.
    """
    parts, *suffixes = name.split("-")
    sequences = [pair for part in parts.split("+") for pair in _parse_sequences(part, name)]
    options: dict[str, Any] = dict(geometry)
    for suffix in suffixes:
        options.update(_parse_suffix(suffix, name))
    return AttentionCase(
        name, tuple(keys for _, keys in sequences), query_lens=tuple(rows for rows, _ in sequences), **options
    )


def _parse_sequences(part: str, name: str) -> Iterable[tuple[int, int]]:
    """New tokens and keys of each sequence of one part of a name."""
    if match := re.fullmatch(r"(\d+)x(?:(\d+)of)?(\d+)", part):
        return ((int(match[2] or 1), int(match[3])),) * int(match[1])
    if match := re.fullmatch(r"(ragged|drawn|trace)(\d+)", part):
        return ((1, keys) for keys in _varied_lengths(match[1], int(match[2])))
    raise ValueError(f"unknown case {name!r}: expected something like {NAMES[0]}, {NAMES[-1]} or 4x512of8192-d64")


def _varied_lengths(kind: str, count: int) -> list[int]:
    if kind == "ragged":
        return [128 + (i * 7919) % 16000 for i in range(count)]
    if kind == "drawn":
        low, high = DRAWN_LENGTHS
        return np.random.default_rng(SEED).integers(low, high, count, endpoint=True).tolist()
    return [request.context_tokens + request.generated_tokens // 2 for request in draw_requests(count, SEED)]


def _parse_suffix(suffix: str, name: str) -> dict[str, Any]:
    if suffix == "sinks":
        return {"sinks": True}
    fields = {"d": "head_dim", "kv": "num_kv_heads", "page": "page_size", "window": "window", "cap": "soft_cap"}
    match = re.fullmatch(rf"({'|'.join(fields)})(\d+)", suffix)
    if match is None or not int(match[2]):
        raise ValueError(f"case {name!r}: unknown suffix {suffix!r}, expected sinks or a number after {list(fields)}")
    number = int(match[2])
    return {fields[match[1]]: float(number) if match[1] == "cap" else number}


def by_geometry(cases: Iterable[AttentionCase]) -> dict[Geometry, list[AttentionCase]]:
    """The cases that can share a pool, in the order in which they come."""
    groups: dict[Geometry, list[AttentionCase]] = {}
    for case in cases:
        groups.setdefault(case.geometry, []).append(case)
    return groups


def num_pool_pages(cases: Sequence[AttentionCase], pool_bytes: float) -> int:
    """Pages of a pool of about `pool_bytes`.

    Raises:
        ValueError: one call of a case needs more pages than that, or the cases differ in geometry.
    """
    if len(geometries := {case.geometry for case in cases}) != 1:
        raise ValueError("cases that share one pool need one page geometry")
    page_bytes = geometries.pop().page_bytes
    unit = math.lcm(page_bytes, POOL_UNIT)
    pages = int(pool_bytes // unit) * unit // page_bytes or int(pool_bytes // page_bytes)
    for case in cases:
        if (needed := sum(case.pages)) > pages:
            raise ValueError(f"case {case.name} needs {needed} pages, the pool of {pool_bytes / 1e9:g} GB has {pages}")
    return pages


def argument_sets(case: AttentionCase, pool_pages: int, count: int) -> list[ArgumentSet]:
    """`count` sets with distinct queries; their pages are shuffled and repeat only once the pool is used up.

    Table entries past the end of a sequence are 0.
    """
    identity = [SEED, *case.name.encode()]
    order = np.random.default_rng(identity).permutation(pool_pages).astype(np.int32)
    used = np.arange(case.table_width) < np.array(case.pages)[:, None]
    span = np.arange(sum(case.pages))
    shape = (case.num_tokens, case.num_q_heads, case.head_dim)
    sets = []
    for index in range(count):
        integers = np.frombuffer(np.random.default_rng([*identity, index]).bytes(math.prod(shape)), np.int8)
        tables = np.zeros(used.shape, np.int32)
        tables[used] = order[(index * span.size + span) % pool_pages]
        query = integers.astype(np.float32).reshape(shape) / np.float32(64)
        sets.append(ArgumentSet(query, tables))
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
