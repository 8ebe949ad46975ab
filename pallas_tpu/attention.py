"""The attention kernel of every operation: packed, decoding or chunked queries over pages or dense rows of keys.

A core walks its work items: tiles of query tokens of one sequence, each with all heads. For an item it walks the keys
that the tile sees, block by block. While a block is computed the next one is on its way from HBM, be it of the same
item or of the next one, and so are the queries of the next item and the answers of the last.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_tpu import attend, fetch, memory
from pallas_tpu.schedule import Place, Scalar, following, item_at, segment_range
from pallas_tpu.specialization import Specialization

SCALARS = ("lens", "row_starts", "key_starts", "table", "k_scale", "v_scale")
INPUTS = ("queries", "keys", "values", "sinks", "slopes", "qq_bias")


def attention_kernel(*refs: Any, names: tuple[str, ...], spec: Specialization) -> None:
    """Attend the segments of one core, in one program, or in one program a block where blocks are steps of the grid."""
    absent = dict.fromkeys((*SCALARS, *INPUTS, "lse"))
    named = types.SimpleNamespace(**absent | dict(zip(names, refs, strict=True)))
    first_segment, end_segment = segment_range(pl.program_id(0), spec)

    def begin() -> None:
        named.unsent[1] = 0

        @pl.when(first_segment < end_segment)
        def start() -> None:
            item = item_at(Place(first_segment, 0, 0), named, spec)
            fetch.start_keys(item, 0, 0, named, spec)
            fetch.start_queries(item, named, spec)

    if spec.split.grid_blocks is None:
        begin()
        jax.lax.while_loop(
            lambda carry: carry[0].segment < end_segment,
            lambda carry: (step(*carry, end_segment, named, spec), 1 - carry[1]),
            (Place(jnp.int32(first_segment), jnp.int32(0), jnp.int32(0)), jnp.int32(0)),
        )
        fetch.wait_for_answers(named, spec)
        return

    segment, block = first_segment + pl.program_id(1), pl.program_id(2)

    @pl.when((pl.program_id(1) == 0) & (block == 0))
    def first() -> None:
        named.slot[0] = 0
        begin()

    place = Place(segment, 0, block)

    @pl.when(segment < end_segment)
    def inside() -> None:
        @pl.when(block < item_at(place, named, spec).num_blocks)
        def needed() -> None:
            slot = named.slot[0]
            step(place, slot, end_segment, named, spec)
            named.slot[0] = 1 - slot

    @pl.when((pl.program_id(1) == pl.num_programs(1) - 1) & (block == pl.num_programs(2) - 1))
    def last() -> None:
        fetch.wait_for_answers(named, spec)


def step(place: Place, slot: Scalar, end_segment: Scalar, refs: Any, spec: Specialization) -> Place:
    """Compute the block that is on its way into `slot`, ask for the one after it, and answer with its place."""
    item = item_at(place, refs, spec)
    after = following(place, item)
    next_item = item_at(after._replace(segment=jnp.minimum(after.segment, end_segment - 1)), refs, spec)
    exists = after.segment < end_segment

    def for_tile(act: Any) -> None:
        for tokens in spec.tiles:
            pl.when(item.tile_tokens == tokens)(functools.partial(act, tokens))

    @pl.when(exists)
    def ask_for_keys() -> None:
        fetch.start_keys(next_item, after.block, 1 - slot, refs, spec)

    @pl.when(place.block == 0)
    def take_queries() -> None:
        fetch.wait_for_queries(item, refs, spec)
        for_tile(lambda tokens: attend.load_rows(item, tokens, refs, spec))

    @pl.when(exists & (after.block == 0))
    def ask_for_queries() -> None:
        fetch.start_queries(next_item, refs, spec)

    fetch.wait_for_keys(item, place.block, slot, refs, spec)

    @pl.when(item.key_begin < item.key_end)
    def compute() -> None:
        for_tile(lambda tokens: attend.attend_block(item, place.block, slot, tokens, refs, spec))

    @pl.when(place.block == item.num_blocks - 1)
    def answer() -> None:
        fetch.wait_for_answers(refs, spec)
        for_tile(lambda tokens: attend.store_rows(tokens, refs, spec))
        fetch.send_answers(item, refs, spec)

    return after


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A call of the kernel, ready but for its arrays, which come in the order of `operands`.

    Attributes:
        name: the operation, for profiles and errors.
        spec: what the kernel is compiled for.
        operands: names of the arrays: those of `SCALARS`, then those of `INPUTS`, absent ones left out. Queries are
            `[T, Hq, D]`; per-head terms `sinks` and `slopes` float32 `[Hq]`; `qq_bias` float32 `[2, Q, Q]`, see
            `scores.select_bias_columns`.
    """

    name: str
    spec: Specialization
    operands: tuple[str, ...]

    def outputs(self, *arrays: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The output `[T, Hq, Dv]` and, if asked for, the LSE `[T, Hq, 1]`."""
        queries = arrays[self.operands.index("queries")]
        out = jax.ShapeDtypeStruct((*queries.shape[:2], self.spec.value_head_dim), queries.dtype)
        lse = jax.ShapeDtypeStruct((*queries.shape[:2], 1), jnp.float32)
        return (out, lse) if self.spec.return_lse else (out,)

    def __call__(self, *arrays: jax.Array, interpret: Any) -> tuple[jax.Array, ...]:
        """Run the kernel."""
        spec, named = self.spec, dict(zip(self.operands, arrays, strict=True))
        parts = spec.split.num_cores if spec.split.over_heads else 1

        def in_parts(array: Any) -> tuple[int, ...]:
            return (array.shape[0], parts, spec.num_q_heads, array.shape[-1])

        outputs = self.outputs(*arrays)
        query_dtype, cache_dtype = named["queries"].dtype, named["keys"].dtype
        named["queries"] = named["queries"].reshape(in_parts(named["queries"]))
        for term in ("sinks", "slopes"):
            if term in named:
                named[term] = jnp.broadcast_to(
                    named[term].reshape(parts, -1, 1), (parts, spec.num_q_heads, memory.LANES)
                )
        scalars = [operand for operand in self.operands if operand in SCALARS]
        inputs = [operand for operand in self.operands if operand in INPUTS]
        in_hbm, in_vmem = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.VMEM)
        of_core = pl.BlockSpec(
            (None, spec.num_q_heads, memory.LANES), lambda core, *_: (core if spec.split.over_heads else 0, 0, 0)
        )
        places = {"sinks": of_core, "slopes": of_core, "qq_bias": in_vmem}
        scratch = scratch_buffers(spec, query_dtype, cache_dtype)
        grid = grid_of(spec)
        in_order = [pltpu.ARBITRARY] * (len(grid) - 1)
        answers = pl.pallas_call(
            functools.partial(
                attention_kernel, names=(*scalars, *inputs, *("out", "lse")[: len(outputs)], *scratch), spec=spec
            ),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[places.get(operand, in_hbm) for operand in inputs],
                out_specs=[in_hbm for _ in outputs],
                scratch_shapes=list(scratch.values()),
            ),
            out_shape=[jax.ShapeDtypeStruct(in_parts(output), output.dtype) for output in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL if grid[0] > 1 else pltpu.ARBITRARY, *in_order)
            ),
            interpret=interpret,
            name=self.name,
        )(*(named[operand] for operand in (*scalars, *inputs)))
        return tuple(answer.reshape(output.shape) for answer, output in zip(answers, outputs, strict=True))


def scratch_buffers(spec: Specialization, query_dtype: Any, cache_dtype: Any) -> dict[str, Any]:
    """The buffers, state and semaphores of a core by their names in the kernel."""
    dtypes = {"query": query_dtype, "cache": cache_dtype, "float32": jnp.float32}
    scratch: dict[str, Any] = {
        name: pltpu.VMEM(buffer.shape, dtypes[buffer.kind])
        for name, buffer in memory.buffers(spec, query_dtype.itemsize).items()
    }
    scratch |= {
        "unsent": pltpu.SMEM((2,), jnp.int32),
        "key_semaphores": pltpu.SemaphoreType.DMA((2, 2)),
        "query_semaphore": pltpu.SemaphoreType.DMA((1,)),
        "answer_semaphores": pltpu.SemaphoreType.DMA((2,)),
    }
    if spec.split.grid_blocks is not None:
        scratch["slot"] = pltpu.SMEM((1,), jnp.int32)
    return scratch


def grid_of(spec: Specialization) -> tuple[int, ...]:
    """One program a core, or one a core, segment and block of keys."""
    split = spec.split
    if split.grid_blocks is None:
        return (split.num_cores,)
    segments = spec.num_segments if split.over_heads else -(-spec.num_segments // split.num_cores)
    return (split.num_cores, segments, split.grid_blocks)
