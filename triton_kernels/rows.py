"""Which rows are mine, and which keys do they see: query heads of a KV head packed with the tokens of a segment."""

import triton
import triton.language as tl


@triton.jit
def head_of_program(program, programs_per_head, num_heads, HEADS_AT_ONCE: tl.constexpr):
    """The number of a program among those of its KV head, and the head.

    Groups of `HEADS_AT_ONCE` heads follow one another: the keys of a few stay in the L2 cache. Within a group the heads
    of a number are neighbours.
    """
    first_head = program // (programs_per_head * HEADS_AT_ONCE) * HEADS_AT_ONCE
    heads_at_once = tl.minimum(num_heads - first_head, HEADS_AT_ONCE)
    place = program - first_head * programs_per_head
    return place // heads_at_once, first_head + place % heads_at_once


@triton.jit
def unpack_rows(rows, first_row, kv_head, num_tokens, QUERIES: tl.constexpr):
    """Tokens and query heads of packed `rows`, their output rows counted from the token of `first_row`, their mask."""
    tokens = rows // QUERIES.group_size
    heads = kv_head * QUERIES.group_size + rows % QUERIES.group_size
    out_rows = (tokens - first_row // QUERIES.group_size) * QUERIES.num_q_heads + heads
    return tokens, heads, out_rows, tokens < num_tokens


@triton.jit
def keys_of_rows(positions, num_keys, SCORING: tl.constexpr):
    """The keys `[begin, end)` that each row of `positions` `[M]` sees."""
    row_begin = positions * 0
    row_end = row_begin + num_keys
    if SCORING.window_left is not None:
        row_begin = positions - SCORING.window_left
    if SCORING.window_right is not None:
        row_end = tl.minimum(positions + (SCORING.window_right + 1), num_keys)
    return row_begin, row_end


@triton.jit
def visible_keys(
    first_row, NUM_ROWS: tl.constexpr, context, num_tokens, num_keys, QUERIES: tl.constexpr, SCORING: tl.constexpr
):
    """Keys `[begin, end)` that some of `NUM_ROWS` packed rows see, and those `[begin, end)` that all of them see.

    `context` is the position of the sequence's first token.
    """
    last_token = tl.minimum((first_row + (NUM_ROWS - 1)) // QUERIES.group_size, num_tokens - 1)
    first_position = context + first_row // QUERIES.group_size
    last_position = context + last_token
    key_begin = num_keys * 0
    whole_begin = num_keys * 0
    if SCORING.window_left is not None:
        key_begin = tl.maximum(first_position - SCORING.window_left, 0)
        whole_begin = tl.maximum(last_position - SCORING.window_left, 0)
    key_end = num_keys
    whole_end = num_keys
    if SCORING.window_right is not None:
        key_end = tl.minimum(last_position + (SCORING.window_right + 1), num_keys)
        whole_end = tl.minimum(first_position + (SCORING.window_right + 1), num_keys)
    return key_begin, tl.maximum(key_end, key_begin), whole_begin, whole_end
