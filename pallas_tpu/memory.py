"""The on-chip memory of a kernel: its buffers, what they cost, and blocks that fit. Nothing here imports Pallas.

Budgets are those of the smallest chip (v4, v5e and v5p; a v6e has more), as its compiler reports them.
"""

import dataclasses
import math
from collections.abc import Mapping

from pallas_tpu.specialization import Blocks, DenseRows, Pages, Specialization

LANES, SUBLANES = 128, 8
SMEM_BYTES = 2**20 - 2**14  # the compiler keeps some of the MiB for itself
VMEM_BYTES = 13 * 2**20  # of 16 MiB for one kernel; the rest is for what the compiler spills
_KEY_BUFFER_BYTES = 4 * 2**20  # both slots of K and V: enough on the way to hide the latency of a copy
_MOST_KEYS, _FEWEST_KEYS = 512, 128
_MOST_TOKENS, _TOKENS_OF_FEW = 128, 8
_SCORE_TILES = 4  # float32 tiles of scores that are alive at once


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Shape and kind of a buffer in VMEM: `"query"`, `"cache"` or `"float32"` elements."""

    shape: tuple[int, ...]
    kind: str


def buffers(spec: Specialization, query_bytes: int) -> dict[str, Buffer]:
    """The VMEM buffers of a core by their names in the kernel, for queries of elements of `query_bytes`."""
    tokens, heads, rows = spec.blocks.tokens, spec.num_kv_heads, spec.blocks.tokens * spec.group_size
    row_state = Buffer((heads, rows, LANES), "float32")
    result = {
        "key_buffer": Buffer((2, *_key_shape(spec, spec.head_dim)), "cache"),
        "value_buffer": Buffer((2, *_key_shape(spec, spec.value_head_dim)), "cache"),
        "query_buffer": Buffer((tokens, spec.num_q_heads, spec.head_dim), "query"),
        "out_buffer": Buffer((tokens, spec.num_q_heads, spec.value_head_dim), "query"),
        "rows": Buffer((heads, rows, spec.head_dim), "query"),
        "accumulated": Buffer((heads, rows, spec.value_head_dim), "float32"),
        "row_max": row_state,
        "row_sum": row_state,
    }
    if tokens > 1 and query_bytes < 4:
        widest = max(spec.head_dim, spec.value_head_dim)
        result["staging"] = Buffer((tokens, spec.num_q_heads, widest), "float32")
    if spec.return_lse:
        result["lse_buffer"] = Buffer((tokens, spec.num_q_heads, 1), "float32")
    if spec.scoring.has_alibi:
        result["row_slopes"] = row_state
    if spec.scoring.qq_size is not None:
        result["bias_rows"] = Buffer((2, rows, spec.scoring.qq_size), "float32")
    return result


def _key_shape(spec: Specialization, head_dim: int) -> tuple[int, ...]:
    """One slot of K or V: tokens and heads in the order in which the cache has them."""
    if isinstance(spec.source, DenseRows) or spec.source.tokens_first:
        return (spec.blocks.keys, spec.num_kv_heads, head_dim)
    page_size = spec.source.page_size
    return (spec.blocks.keys // page_size, spec.num_kv_heads, page_size, head_dim)


def vmem_bytes(spec: Specialization, query_bytes: int, cache_bytes: int) -> int:
    """What a core needs of VMEM: its buffers, per-head terms and biases, and the values that live in a step."""
    element_bytes = {"query": query_bytes, "cache": cache_bytes, "float32": 4}
    total = sum(
        padded_bytes(buffer.shape, element_bytes[buffer.kind]) for buffer in buffers(spec, query_bytes).values()
    )
    rows, scoring = spec.blocks.tokens * spec.group_size, spec.scoring
    total += 2 * (scoring.has_alibi + scoring.has_sinks) * padded_bytes((spec.num_q_heads, LANES), 4)
    if scoring.qq_size is not None:
        total += padded_bytes((2, scoring.qq_size, scoring.qq_size), 4)
        total += padded_bytes((scoring.qq_size, spec.blocks.keys), 4) + padded_bytes((rows, scoring.qq_size), 4)
    total += _SCORE_TILES * padded_bytes((rows, spec.blocks.keys), 4)
    widest = max(spec.head_dim, spec.value_head_dim)
    return total + padded_bytes((2, spec.blocks.keys, widest), 4) + padded_bytes((rows, widest), 4)


def padded_bytes(shape: tuple[int, ...], element_bytes: int) -> int:
    """Bytes of an array in VMEM, where tiles of 32 bits by 8 sublanes by 128 lanes hold the last two axes."""
    *outer, rows, columns = shape
    packing = max(1, 4 // element_bytes)
    rows = math.ceil(rows / (SUBLANES * packing)) * SUBLANES * packing
    return math.prod(outer) * rows * math.ceil(columns / LANES) * LANES * element_bytes


def smem_bytes(num_elements: Mapping[str, int]) -> int:
    """What the prefetched scalar arrays need of SMEM."""
    return sum(math.ceil(elements / LANES) * LANES * 4 for elements in num_elements.values())


def fitted(
    spec: Specialization,
    query_bytes: int,
    cache_bytes: int,
    *,
    num_tokens: int,
    tokens: int | None,
    keys: int | None,
) -> Specialization:
    """`spec` with blocks that fit, or the smallest ones.

    Args:
        spec: the kernel; its blocks do not matter.
        query_bytes: bytes of an element of the queries.
        cache_bytes: bytes of an element of the caches.
        num_tokens: query tokens of all sequences.
        tokens: tokens a tile if the caller says so.
        keys: keys a block if the caller says so.
    """
    num_seqs = max(1, spec.num_segments - 2) if spec.is_packed else spec.num_segments
    if not spec.is_packed:
        most_tokens = 1
    elif tokens is not None:
        most_tokens = tokens
    else:
        most_tokens = min(_MOST_TOKENS if num_tokens > num_seqs else _TOKENS_OF_FEW, 1 << (num_tokens - 1).bit_length())
    unit, most = _key_units(spec)
    wanted = _wanted_keys(spec, cache_bytes) if keys is None else keys
    num_units = max(1, min(wanted, most) // unit)
    while True:
        blocks = dataclasses.replace(spec.blocks, tokens=most_tokens, keys=num_units * unit)
        candidate = dataclasses.replace(spec, blocks=blocks)
        if vmem_bytes(candidate, query_bytes, cache_bytes) <= VMEM_BYTES:
            return candidate
        if tokens is None and most_tokens > 16:
            most_tokens //= 2
        elif keys is None and num_units > 1:
            num_units = (num_units + 1) // 2
        elif tokens is None and most_tokens > 1:
            most_tokens //= 2
        else:
            return candidate


def _key_units(spec: Specialization) -> tuple[int, int]:
    """What a block of keys is a multiple of, and the keys of the longest sequence, rounded up to that."""
    if isinstance(spec.source, Pages):
        return spec.source.page_size, max(1, spec.source.table_width) * spec.source.page_size
    unit = min(SUBLANES, max(1, spec.source.length))
    return unit, math.ceil(max(1, spec.source.length) / unit) * unit


def _wanted_keys(spec: Specialization, cache_bytes: int) -> int:
    blocks = Blocks(tokens=1, keys=_key_units(spec)[0])
    unit = dataclasses.replace(spec, blocks=blocks)
    bytes_of_unit = sum(
        padded_bytes(buffer.shape, cache_bytes) for buffer in buffers(unit, 4).values() if buffer.kind == "cache"
    )
    fitting = _KEY_BUFFER_BYTES // bytes_of_unit * blocks.keys
    return max(min(_FEWEST_KEYS, fitting), min(_MOST_KEYS, 1 << max(fitting, 1).bit_length() - 1))
