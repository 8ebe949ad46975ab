"""The walk over work items: every segment, every tile of its query tokens, every block of the keys that tile sees.

All of it is scalar arithmetic on what was prefetched to SMEM. The kernel carries a `Place` from step to step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_tpu.specialization import Pages, Specialization

Scalar = Any  # int32, traced or not


class Place(NamedTuple):
    """A step of the walk: a block of keys for a tile of tokens of a segment."""

    segment: Scalar
    token: Scalar
    block: Scalar


class Item(NamedTuple):
    """A tile of query tokens and the keys that it sees.

    Attributes:
        sequence: the row of the page table, or of the dense keys.
        row: the tile's first row of the queries.
        num_tokens: rows of the queries in the tile; none in an empty segment.
        tile_tokens: rows that the tile has room for.
        is_last: whether it is the last tile of its segment.
        context: position of the segment's first token.
        position: position of the tile's first token.
        sequence_begin: first key of the sequence.
        sequence_end: end of its keys.
        key_begin: first key that any row sees.
        key_end: end of the keys that any row sees; `key_begin` where none sees any.
        origin: first key of the first block.
        num_blocks: blocks of keys, 1 at least.
    """

    sequence: Scalar
    row: Scalar
    num_tokens: Scalar
    tile_tokens: Scalar
    is_last: Scalar
    context: Scalar
    position: Scalar
    sequence_begin: Scalar
    sequence_end: Scalar
    key_begin: Scalar
    key_end: Scalar
    origin: Scalar
    num_blocks: Scalar


def quotient(dividend: Scalar, divisor: int) -> Scalar:
    """`dividend // divisor` of what is not negative: the rounding of `//` needs to know the chip while lowering."""
    return jax.lax.div(jnp.int32(dividend), jnp.int32(divisor))


def segment_range(core: Scalar, spec: Specialization) -> tuple[Scalar, Scalar]:
    """The segments `[first, end)` of a core."""
    cores = 1 if spec.split.over_heads else spec.split.num_cores
    if cores == 1:
        return 0, spec.num_segments
    return quotient(core * spec.num_segments, cores), quotient((core + 1) * spec.num_segments, cores)


def item_at(place: Place, scalars: Any, spec: Specialization) -> Item:
    """The item that a step belongs to.

    Args:
        place: the step; its block does not matter.
        scalars: has the prefetched arrays `lens` `[S]`, `row_starts` `[segments + 1]` where sequences are packed, and
            `key_starts` `[S]` where keys do not begin at 0.
        spec: sizes and windows.
    """
    segment, token = place.segment, place.token
    if spec.is_packed:
        # The first and the last segment are padding.
        sequence = jnp.clip(segment - 1, 0, spec.num_segments - 3)
        is_padding = (segment == 0) | (segment == spec.num_segments - 1)
        sequence_end = jnp.where(is_padding, 0, scalars.lens[sequence])
        begin = scalars.row_starts[segment]
        length = scalars.row_starts[segment + 1] - begin
    else:
        sequence, sequence_end, begin, length = segment, scalars.lens[segment], segment, 1
    sequence_begin = 0 if scalars.key_starts is None else scalars.key_starts[sequence]
    few, many = spec.tiles[0], spec.tiles[-1]
    tile_tokens = jnp.where(length <= few, few, many) if few != many else many
    num_tokens = jnp.minimum(tile_tokens, length - token)
    context = sequence_end - length
    position = context + token
    key_begin, key_end = visible_keys(position, position + num_tokens - 1, sequence_begin, sequence_end, spec)
    key_end = jnp.where(num_tokens > 0, jnp.maximum(key_end, key_begin), key_begin)
    page_size = spec.source.page_size if isinstance(spec.source, Pages) else 1
    origin = quotient(key_begin, page_size) * page_size
    return Item(
        sequence=sequence,
        row=begin + token,
        num_tokens=num_tokens,
        tile_tokens=tile_tokens,
        is_last=token + tile_tokens >= length,
        context=context,
        position=position,
        sequence_begin=sequence_begin,
        sequence_end=sequence_end,
        key_begin=key_begin,
        key_end=key_end,
        origin=origin,
        num_blocks=jnp.maximum(1, quotient(key_end - origin + spec.blocks.keys - 1, spec.blocks.keys)),
    )


def visible_keys(first: Any, last: Any, begin: Any, end: Any, spec: Specialization) -> tuple[Any, Any]:
    """Keys `[begin, end)` of a sequence that rows between two positions see; empty where the end is not above."""
    scoring = spec.scoring
    if scoring.window_left is not None:
        begin = jnp.maximum(begin, first - scoring.window_left)
    if scoring.window_right is not None:
        end = jnp.minimum(end, last + (scoring.window_right + 1))
    return begin, end


def following(place: Place, item: Item) -> Place:
    """The step after `place`, which belongs to `item`; past the last one, a segment that does not exist."""
    more_blocks = place.block + 1 < item.num_blocks
    leaves = jnp.logical_not(more_blocks) & item.is_last
    next_token = jnp.where(item.is_last, 0, place.token + item.tile_tokens)
    return Place(
        segment=place.segment + leaves.astype(jnp.int32),
        token=jnp.where(more_blocks, place.token, next_token),
        block=jnp.where(more_blocks, place.block + 1, 0),
    )
