"""Launches of the Pallas TPU kernel: what it is compiled for, and its operands from those of an operation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

# What it adds to JAX's configuration is part of what programs are kept by: imported while the first one is traced, as
# the kernels would, it would have that program traced and compiled a second time.
import jax.experimental.pallas.tpu
import jax.numpy as jnp

from jax_bridge.launch import kernel_operation
from jax_bridge.operation import Invocation, Outputs
from jax_bridge.validation import Window

Arrays = Mapping[str, Any]  # arrays by name, None where absent

_LARGEST_BIAS = 3.38e38  # float32 above it may round to infinity in the bfloat16 pieces of an exact product
_CORES_OF_MEGACORE = 2


@dataclasses.dataclass(frozen=True)
class PagedNames:
    """What an operation over pages calls its arguments."""

    query: str
    lengths: str
    table: str
    starts: str | None = None
    is_packed: bool = True


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Query tokens and keys that a step takes; None where the kernel's own choice is wanted."""

    tokens: int | None = None
    keys: int | None = None
    source: str = "cfg"
    """What says so, in words."""


def block_sizes(cfg: Any, group_size: int) -> BlockSizes:
    """The fields of a configuration that mean something here: rows (`block_m`) and keys (`block_n`) of a tile."""
    return BlockSizes(
        tokens=None if cfg.block_m is None else 1 << max(1, cfg.block_m // group_size).bit_length() - 1,
        keys=cfg.block_n,
        source="cfg.block_m and cfg.block_n",
    )


def paged_specialization(
    invocation: Invocation, names: PagedNames, sizes_asked: BlockSizes, *, is_causal: bool = True
) -> Any:
    """The `pallas_tpu.specialization.Specialization` of a call of an operation over pages."""
    from pallas_tpu import memory, specialization

    sizes, options, arrays = invocation.sizes, invocation.options, invocation.arrays
    query, cache = arrays[names.query], arrays["key_cache"]
    num_cores, over_heads = 1, False
    if getattr(options, "megacore_mode", None) is not None:
        num_cores, over_heads = _CORES_OF_MEGACORE, options.megacore_mode == "kv_head"
    num_seqs = max(1, sizes.num_seqs)
    spec = specialization.Specialization(
        num_segments=num_seqs + 2 if names.is_packed else num_seqs,
        is_packed=names.is_packed,
        num_kv_heads=sizes.num_kv_heads // num_cores if over_heads else sizes.num_kv_heads,
        group_size=sizes.group_size,
        head_dim=sizes.head_dim,
        value_head_dim=sizes.value_head_dim,
        source=specialization.Pages(
            layout=options.kv_layout,
            num_pages=max(1, sizes.num_pages),
            page_size=sizes.page_size,
            table_width=max(1, sizes.table_width),
        ),
        scoring=_scoring(arrays, options, "attention_sink", is_causal=is_causal),
        blocks=specialization.Blocks(tokens=1, keys=sizes.page_size, decodes=names.starts is not None),
        split=specialization.Split(num_cores, over_heads),
        return_lse=options.return_lse,
    )
    spec = memory.fitted(
        spec,
        _computed(query.dtype).itemsize,
        cache.dtype.itemsize,
        num_tokens=max(1, sizes.num_tokens),
        tokens=sizes_asked.tokens,
        keys=sizes_asked.keys,
    )
    if getattr(options, "inline_seq_dim", True):
        return spec
    grid_blocks = max(1, -(-_longest(invocation) // spec.blocks.keys))
    return dataclasses.replace(spec, split=dataclasses.replace(spec.split, grid_blocks=grid_blocks))


def _longest(invocation: Invocation) -> int:
    """Keys of the longest sequence that the page table and the caller's bound allow."""
    sizes = invocation.sizes
    capacity = sizes.table_width * sizes.page_size if sizes.num_pages else 0
    bound = getattr(invocation.options, "max_context_len", None)
    return capacity if bound is None else min(capacity, bound)


def _scoring(arrays: Arrays, options: Any, sinks: str, *, is_causal: bool) -> Any:
    from pallas_tpu.specialization import Scoring

    window: Window | tuple[None, int | None] = options.window or (None, 0 if is_causal else None)
    qq_bias = arrays.get("qq_bias")
    has_sinks = arrays[sinks] is not None and arrays[sinks].shape[-1] > 0
    return Scoring(
        softmax_scale=options.softmax_scale,
        soft_cap=options.soft_cap,
        window_left=window[0],
        window_right=window[1],
        has_alibi=arrays.get("alibi_slopes") is not None,
        has_sinks=has_sinks,
        qq_size=None if qq_bias is None or qq_bias.shape[0] == 0 else qq_bias.shape[0],
    )


def lacks(invocation: Invocation, names: PagedNames, sizes_asked: BlockSizes | None = None) -> str | None:
    """Words for what the kernel cannot do of a call over pages, or None."""
    sizes, options, arrays = invocation.sizes, invocation.options, invocation.arrays
    cache_bytes = arrays["key_cache"].dtype.itemsize
    if getattr(options, "megacore_mode", None) == "kv_head":
        if sizes.num_kv_heads % _CORES_OF_MEGACORE:
            return f"megacore_mode='kv_head' with an odd number of KV heads (here {sizes.num_kv_heads})"
        packing = max(1, 4 // cache_bytes)
        if options.kv_layout == "PTHD" and sizes.num_kv_heads // _CORES_OF_MEGACORE % packing:
            needed = _CORES_OF_MEGACORE * packing
            return (
                f"megacore_mode='kv_head' over a cache laid out PTHD unless its KV heads are a multiple of {needed} "
                f"(here {sizes.num_kv_heads}): the chip cannot copy a part of a tile of heads"
            )
    num_seqs = max(1, sizes.num_seqs)
    scalars = {names.table: num_seqs * max(1, sizes.table_width), names.lengths: num_seqs}
    if names.is_packed:
        scalars["query_start_loc"] = num_seqs + 3
    spec = paged_specialization(invocation, names, sizes_asked or BlockSizes())
    return _lacks_memory(spec, _computed(arrays[names.query].dtype), cache_bytes, scalars, names.table)


def ragged_lacks(invocation: Invocation) -> str | None:
    """Words for what the kernel cannot do of a call over dense rows, or None."""
    dtype, batch = invocation.arrays["query"].dtype, invocation.sizes.batch
    spec, scalars = ragged_specialization(invocation, BlockSizes()), {"sequence_start": batch, "sequence_end": batch}
    return _lacks_memory(spec, _computed(dtype), dtype.itemsize, scalars, "sequence_start")


def _computed(dtype: Any) -> Any:
    """The dtype of queries and answers in the kernel."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def _lacks_memory(
    spec: Any, query_dtype: Any, cache_bytes: int, scalars: Mapping[str, int], largest: str
) -> str | None:
    from pallas_tpu import memory

    needed = memory.smem_bytes(scalars)
    if needed > memory.SMEM_BYTES:
        return (
            f"{largest} of {scalars[largest]} entries: they need {needed} bytes of the chip's scalar memory, which has "
            f"{memory.SMEM_BYTES} (fewer sequences a call, larger pages or a narrower page table need less)"
        )
    needed = memory.vmem_bytes(spec, query_dtype.itemsize, cache_bytes)
    if needed > memory.VMEM_BYTES:
        return (
            f"these sizes: blocks of {spec.blocks.keys} keys and {spec.blocks.tokens} query tokens need {needed} bytes "
            f"of the chip's vector memory, of which a kernel has {memory.VMEM_BYTES} (fewer heads a device, smaller "
            "pages, fewer pages a compute block or a smaller qq_bias need less)"
        )
    return None


def attend_pages(
    invocation: Invocation, names: PagedNames, sizes_asked: BlockSizes, *, is_causal: bool = True
) -> Outputs:
    """The answers of an operation over pages."""
    spec = paged_specialization(invocation, names, sizes_asked, is_causal=is_causal)
    operation, longest, sizes = invocation.operation, _longest(invocation), invocation.sizes

    def attend(arrays: Arrays) -> tuple[jax.Array, jax.Array | None]:
        lens, table = arrays[names.lengths], arrays[names.table]
        starts = arrays[names.starts] if names.starts else jnp.array([0, sizes.num_tokens], jnp.int32)
        if sizes.num_seqs == 0:  # all rows are padding: the same as one sequence of no tokens
            lens, table, starts = jnp.zeros(1, jnp.int32), table, jnp.concatenate([starts, starts])
        keys, values = (_not_empty(arrays[name], sizes.num_pages) for name in ("key_cache", "value_cache"))
        operands = {
            "lens": jnp.clip(lens, 0, longest),
            "table": table.reshape(-1) if table.size else jnp.zeros(1, jnp.int32),
            "k_scale": arrays["k_scale"],
            "v_scale": arrays["v_scale"],
            "queries": arrays[names.query],
            "keys": keys,
            "values": values,
            "sinks": _as_float32(arrays["attention_sink"]),
            "slopes": _as_float32(arrays["alibi_slopes"]),
        }
        if names.is_packed:
            operands["row_starts"] = _segment_starts(starts, sizes.num_tokens)
        if spec.scoring.qq_size is not None:
            operands["qq_bias"] = _finite_bias(arrays["qq_bias"])
        return _run(operation, spec, operands, sizes_asked.source)

    out, lse = kernel_operation(f"{operation}[pallas]", attend)(dict(invocation.arrays))
    return (out, lse) if spec.return_lse else out


def _segment_starts(starts: jax.Array, num_tokens: int) -> jax.Array:
    """First rows of all segments, the padding before and after the sequences included, and the end of the last."""
    starts = jnp.clip(jax.lax.cummax(starts), 0, num_tokens)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), starts, jnp.full(1, num_tokens, jnp.int32)])


def _not_empty(cache: jax.Array, num_pages: int) -> jax.Array:
    """A cache with one page at least, for there are no arrays of size 0 to copy from."""
    return cache if num_pages else jnp.zeros([max(1, size) for size in cache.shape], cache.dtype)


def _as_float32(terms: jax.Array | None) -> jax.Array | None:
    return None if terms is None else terms.astype(jnp.float32)


def _finite_bias(bias: jax.Array) -> jax.Array:
    """`[2, Q, Q]`: the bias with 0 for what is -inf, and 1 where it is -inf."""
    bias = bias.astype(jnp.float32)
    hides = bias == -jnp.inf
    return jnp.stack([jnp.where(hides, 0.0, jnp.clip(bias, -_LARGEST_BIAS, _LARGEST_BIAS)), hides.astype(jnp.float32)])


def ragged_specialization(invocation: Invocation, sizes_asked: BlockSizes) -> Any:
    """The `pallas_tpu.specialization.Specialization` of a call over dense rows."""
    from pallas_tpu import memory, specialization

    sizes, arrays, options = invocation.sizes, invocation.arrays, invocation.options
    spec = specialization.Specialization(
        num_segments=max(1, sizes.batch),
        is_packed=False,
        num_kv_heads=sizes.num_kv_heads,
        group_size=sizes.group_size,
        head_dim=sizes.head_dim,
        value_head_dim=sizes.value_head_dim,
        source=specialization.DenseRows(max(1, sizes.kv_len)),
        scoring=_scoring(arrays, options, "softmax_aux", is_causal=True),
        blocks=specialization.Blocks(tokens=1, keys=1),
        return_lse=options.return_lse,
    )
    dtype = arrays["query"].dtype
    return memory.fitted(
        spec, _computed(dtype).itemsize, dtype.itemsize, num_tokens=1, tokens=None, keys=sizes_asked.keys
    )


def attend_rows(invocation: Invocation, sizes_asked: BlockSizes) -> Outputs:
    """The answers of ragged decode, whose queries have three axes."""
    spec = ragged_specialization(invocation, sizes_asked)
    operation, kv_len, num_q_heads = invocation.operation, invocation.sizes.kv_len, invocation.sizes.num_q_heads

    def attend(arrays: Arrays) -> tuple[jax.Array, jax.Array | None]:
        keys, values = (_not_empty(arrays[name], kv_len) for name in ("key", "value"))
        operands = {
            "lens": jnp.clip(arrays["sequence_end"], 0, kv_len),
            "key_starts": jnp.clip(arrays["sequence_start"], 0, kv_len),
            "queries": arrays["query"],
            "keys": keys,
            "values": values,
            "sinks": _one_sink_a_head(arrays["softmax_aux"], num_q_heads),
        }
        return _run(operation, spec, operands, sizes_asked.source)

    out, lse = kernel_operation(f"{operation}[pallas]", attend)(dict(invocation.arrays))
    return (out, lse) if spec.return_lse else out


def _one_sink_a_head(sinks: jax.Array | None, num_q_heads: int) -> jax.Array | None:
    """Sinks `[n]` of all heads or `[Hq, n]` as the one logit `[Hq]` that adds as much to the denominator."""
    if sinks is None or sinks.shape[-1] == 0:
        return None
    return jnp.broadcast_to(jax.nn.logsumexp(sinks.astype(jnp.float32), axis=-1), (num_q_heads,))


def _run(operation: str, spec: Any, operands: Arrays, source: str) -> tuple[jax.Array, jax.Array | None]:
    from pallas_tpu import attention, float16, lowering, memory

    dtype = operands["queries"].dtype
    present = {name: float16.as_bits(array) for name, array in operands.items() if array is not None}
    present["queries"] = operands["queries"].astype(_computed(dtype))
    needed = memory.vmem_bytes(spec, present["queries"].dtype.itemsize, present["keys"].dtype.itemsize)
    if needed > memory.VMEM_BYTES:
        raise ValueError(
            f"{operation}[pallas]: with the {source} given, blocks of {spec.blocks.tokens} tokens and "
            f"{spec.blocks.keys} keys need {needed} bytes of vector memory, expected at most {memory.VMEM_BYTES}; use "
            "smaller ones"
        )
    order = tuple(name for name in (*attention.SCALARS, *attention.INPUTS) if name in present)
    call = attention.AttentionCall(operation, spec, order)
    out, *lse = lowering.run(call, *(present[name] for name in order))
    return out.astype(dtype), lse[0][..., 0] if lse else None
