"""Which rows are mine, and which keys do they see: query heads of a KV head packed with the tokens of a segment."""

import triton
import triton.language as tl


@triton.jit
def unpack_rows(rows, first_row, kv_head, num_tokens, QUERIES: tl.constexpr):
    """Tokens and query heads of packed `rows`, their output rows counted from the token of `first_row`, their mask."""
    tokens = rows // QUERIES.group_size
    heads = kv_head * QUERIES.group_size + rows % QUERIES.group_size
    out_rows = (tokens - first_row // QUERIES.group_size) * QUERIES.num_q_heads + heads
    return tokens, heads, out_rows, tokens < num_tokens


@triton.jit
def visible_keys(first_position, last_position, num_keys, SCORING: tl.constexpr):
    """Keys `[begin, end)` that a row between two positions sees, and those `[begin, end)` that every such row sees."""
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
