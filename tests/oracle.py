"""What the operations mean, in float64 numpy and plain loops: the judge of every implementation.

Written from the contract alone, importing no code of this project. Signatures are those of the operations, without what
cannot change a result. Every function answers float64, except the write, which answers the caches.
"""

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np

Float64 = np.ndarray


def float64(array: Any) -> Float64:
    return np.asarray(array).astype(np.float64)


def attend_row(
    query: Float64,
    keys: Float64,
    values: Float64,
    biases: Float64,
    sinks: Float64,
    softmax_scale: float,
    soft_cap: float | None,
) -> tuple[Float64, float, Float64]:
    """Output, LSE and weights of one row of one head over the keys that it sees."""
    logits = []
    for key, bias in zip(keys, biases, strict=True):
        score = softmax_scale * float(np.dot(query, key))
        if soft_cap:
            score = soft_cap * math.tanh(score / soft_cap)
        logits.append(score + float(bias))
    everything = [*logits, *(float(sink) for sink in sinks)]
    largest = max(everything, default=-math.inf)
    if largest == -math.inf:
        return np.zeros(values.shape[-1]), -math.inf, np.zeros(len(logits))
    denominator = math.fsum(math.exp(logit - largest) for logit in everything)
    weights = np.array([math.exp(logit - largest) / denominator for logit in logits])
    out = np.zeros(values.shape[-1])
    for weight, value in zip(weights, values, strict=True):
        out += weight * value if weight > 0 else 0.0
    return out, largest + math.log(denominator), weights


def head_scale(scale: Any, kv_head: int) -> float:
    """The scale of a KV head from none, a scalar, `[1]` or `[Hkv]`."""
    if scale is None:
        return 1.0
    flat = float64(scale).reshape(-1)
    return float(flat[kv_head] if flat.size > 1 else flat[0])


def head_sinks(sinks: Any, head: int, num_heads: int, one_a_head: bool) -> Float64:
    if sinks is None:
        return np.zeros(0)
    sinks = float64(sinks)
    if sinks.ndim == 2:
        return sinks[head]
    return sinks[head : head + 1] if one_a_head and sinks.size == num_heads else sinks


def token_of(cache: Float64, kv_layout: str, page: int, offset: int, kv_head: int) -> Float64:
    at: dict[str, Any] = {"P": page, "T": offset, "H": kv_head, "D": slice(None)}
    return cache[tuple(at[axis] for axis in kv_layout)]


def in_window(position: int, row: int, window: Any, right_of_int: bool) -> bool:
    """Whether a window lets the row at `row` see `position`; an integer W is W tokens with the row's own."""
    if window is None:
        return True
    if isinstance(window, tuple):
        left, right = window
        return (left is None or row - left <= position) and (right is None or position <= row + right)
    return row - window < position and (not right_of_int or position <= row)


def paged(
    queries: Any,
    key_cache: Any,
    value_cache: Any,
    lengths: Any,
    tables: Any,
    row_starts: Any,
    *,
    softmax_scale: float | None,
    causal: bool,
    sliding_window: Any,
    soft_cap: float | None,
    alibi_slopes: Any,
    qq_bias: Any,
    attention_sink: Any,
    k_scale: Any,
    v_scale: Any,
    kv_layout: str,
) -> tuple[Float64, Float64]:
    queries, key_cache, value_cache = float64(queries), float64(key_cache), float64(value_cache)
    num_rows, num_heads, head_dim = queries.shape
    size = dict(zip(kv_layout, key_cache.shape, strict=True))
    value_dim = value_cache.shape[kv_layout.index("D")]
    group = num_heads // size["H"]
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    lengths, tables, row_starts = np.asarray(lengths), np.asarray(tables), np.asarray(row_starts)
    out = np.zeros((num_rows, num_heads, value_dim))
    lse = np.full((num_rows, num_heads), -np.inf)
    for head in range(num_heads):
        sinks = head_sinks(attention_sink, head, num_heads, one_a_head=True)
        lse[:, head] = attend_row(np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0), sinks, 1.0, None)[1]
    for sequence in range(tables.shape[0]):
        first, last, length = int(row_starts[sequence]), int(row_starts[sequence + 1]), int(lengths[sequence])
        context = length - (last - first)
        for packed_row in range(first, last):
            row = packed_row - first
            position = context + row
            seen = [
                key
                for key in range(length)
                if (not causal or key <= position) and in_window(key, position, sliding_window, right_of_int=False)
            ]
            for head in range(num_heads):
                kv_head = head // group
                keys, values, biases = [], [], []
                for key in seen:
                    page, offset = int(tables[sequence, key // size["T"]]), key % size["T"]
                    keys.append(token_of(key_cache, kv_layout, page, offset, kv_head) * head_scale(k_scale, kv_head))
                    values.append(
                        token_of(value_cache, kv_layout, page, offset, kv_head) * head_scale(v_scale, kv_head)
                    )
                    bias = 0.0
                    if alibi_slopes is not None:
                        bias += float(float64(alibi_slopes)[head]) * (key - position)
                    column = key - context
                    if qq_bias is not None and row < qq_bias.shape[0] and 0 <= column < qq_bias.shape[1]:
                        bias += float(float64(qq_bias)[row, column])
                    biases.append(bias)
                out[packed_row, head], lse[packed_row, head], _ = attend_row(
                    queries[packed_row, head],
                    np.array(keys).reshape(-1, head_dim),
                    np.array(values).reshape(-1, value_dim),
                    np.array(biases),
                    head_sinks(attention_sink, head, num_heads, one_a_head=True),
                    scale,
                    soft_cap,
                )
    return out, lse


def unified_attention(
    queries: Any,
    key_cache: Any,
    value_cache: Any,
    kv_lens: Any,
    block_tables: Any,
    query_start_loc: Any,
    /,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: Any = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    qq_bias: Any = None,
    attention_sink: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_layout: str = "PTHD",
    return_lse: bool = False,
) -> Any:
    out, lse = paged(
        queries,
        key_cache,
        value_cache,
        kv_lens,
        block_tables,
        query_start_loc,
        softmax_scale=softmax_scale,
        causal=causal,
        sliding_window=sliding_window,
        soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        qq_bias=qq_bias,
        attention_sink=attention_sink,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
    )
    return (out, lse) if return_lse else out


def page_attention(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    context_lens: Any,
    block_tables: Any,
    attn_scale: float | None = None,
    *,
    attn_logits_soft_cap: float | None = None,
    sliding_window: Any = None,
    attention_sink: Any = None,
    alibi_slopes: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_layout: str = "PHTD",
    return_lse: bool = False,
) -> Any:
    out, lse = paged(
        query,
        key_cache,
        value_cache,
        context_lens,
        block_tables,
        np.arange(query.shape[0] + 1),
        softmax_scale=attn_scale,
        causal=True,
        sliding_window=sliding_window,
        soft_cap=attn_logits_soft_cap,
        alibi_slopes=alibi_slopes,
        qq_bias=None,
        attention_sink=attention_sink,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
    )
    return (out, lse) if return_lse else out


def prefill_page_attention(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    context_len: Any,
    page_indices: Any,
    /,
    *,
    softmax_scale: float | None = None,
    attn_logits_soft_cap: float | None = None,
    sliding_window: Any = None,
    attention_sink: Any = None,
    alibi_slopes: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_layout: str = "HPTD",
    return_lse: bool = False,
) -> Any:
    out, lse = paged(
        query,
        key_cache,
        value_cache,
        np.asarray(context_len).reshape(1),
        np.asarray(page_indices)[None],
        [0, query.shape[0]],
        softmax_scale=softmax_scale,
        causal=True,
        sliding_window=sliding_window,
        soft_cap=attn_logits_soft_cap,
        alibi_slopes=alibi_slopes,
        qq_bias=None,
        attention_sink=attention_sink,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
    )
    return (out, lse) if return_lse else out


def ragged_decode_attention(
    query: Any,
    key: Any,
    value: Any,
    sequence_start: Any,
    sequence_end: Any,
    softmax_aux: Any = None,
    /,
    *,
    softmax_scale: float | None = None,
    sliding_window: Any = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
) -> Any:
    shape = np.shape(query)
    key, value = float64(key), float64(value)
    batch, length, num_kv_heads, head_dim = key.shape
    num_heads = shape[-2]
    queries = float64(query).reshape(batch, num_heads, head_dim)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    out, lse = np.zeros((batch, num_heads, value.shape[-1])), np.zeros((batch, num_heads))
    for b in range(batch):
        start = min(max(int(sequence_start[b]), 0), length)
        end = min(max(int(sequence_end[b]), 0), length)
        seen = [j for j in range(start, end) if in_window(j, end - 1, sliding_window, right_of_int=True)]
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            sinks = head_sinks(softmax_aux, head, num_heads, one_a_head=False)
            out[b, head], lse[b, head], _ = attend_row(
                queries[b, head],
                key[b, seen, kv_head],
                value[b, seen, kv_head],
                np.zeros(len(seen)),
                sinks,
                scale,
                logits_soft_cap,
            )
    out, lse = out.reshape(*shape[:-1], value.shape[-1]), lse.reshape(shape[:-1])
    return (out, lse) if return_lse else out


def attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    dropout_rng: None = None,
    softmax_aux: Any = None,
    /,
    *,
    mask: Any = None,
    dtype: Any = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    causal: bool = False,
    sliding_window: Any = None,
    return_weights: bool = False,
) -> Any:
    """Dense attention without dropout."""
    if dtype is not None:
        query, key, value = (np.asarray(x).astype(dtype) for x in (query, key, value))
    query, key, value = float64(query), float64(key), float64(value)
    batch, num_rows, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    window = (sliding_window, sliding_window) if isinstance(sliding_window, int) else sliding_window
    full = (batch, num_heads, num_rows, num_keys)
    biases = np.broadcast_to(np.zeros(()) if bias is None else float64(bias), full)
    allowed = np.broadcast_to(np.ones((), bool) if mask is None else np.asarray(mask), full)
    out = np.zeros((batch, num_rows, num_heads, value.shape[-1]))
    weights = np.zeros(full)
    for b in range(batch):
        for row in range(num_rows):
            for head in range(num_heads):
                seen = [
                    j
                    for j in range(num_keys)
                    if allowed[b, head, row, j]
                    and (not causal or j <= row)
                    and in_window(j, row, window, right_of_int=True)
                ]
                kv_head = head // (num_heads // num_kv_heads)
                out[b, row, head], _, weights[b, head, row, seen] = attend_row(
                    query[b, row, head],
                    key[b, seen, kv_head],
                    value[b, seen, kv_head],
                    biases[b, head, row, seen],
                    head_sinks(softmax_aux, head, num_heads, one_a_head=True),
                    scale,
                    logits_soft_cap,
                )
    return (out, weights) if return_weights else out


@functools.cache
def representable(dtype: Any) -> Float64:
    """All finite values of an 8-bit dtype, ascending."""
    values = np.arange(256, dtype=np.uint8).view(np.dtype(dtype)).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def nearest(value: float, dtype: Any) -> float:
    """The value of an 8-bit dtype nearest to `value`, the one with an even last digit at a tie, saturating."""
    finite = representable(dtype)
    distances = np.abs(finite - np.clip(value, finite[0], finite[-1]))
    candidates = finite[distances == distances.min()]
    if len(candidates) == 1:
        return float(candidates[0])
    return next(float(v) for v in candidates if np.array(v).astype(dtype).view(np.uint8) % 2 == 0)


def write_kv_pages(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    /,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_layout: str = "PTHD",
) -> tuple[np.ndarray, np.ndarray]:
    """The caches after the write, in their dtypes."""
    written = []
    for tokens, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        cache = np.array(cache)
        size = dict(zip(kv_layout, cache.shape, strict=True))
        for token, slot in zip(float64(tokens), np.asarray(slot_mapping).tolist(), strict=True):
            if not 0 <= slot < size["P"] * size["T"]:
                continue
            for head in range(size["H"]):
                stored = token[head] / head_scale(scale, head)
                if cache.dtype.itemsize == 1:
                    stored = np.array([nearest(x, cache.dtype) for x in stored])
                elif scale is not None or np.asarray(tokens).dtype != cache.dtype:
                    largest = float(ml_dtypes.finfo(cache.dtype).max)
                    stored = np.clip(stored, -largest, largest)
                token_of(cache, kv_layout, slot // size["T"], slot % size["T"], head)[:] = stored.astype(cache.dtype)
        written.append(cache)
    return written[0], written[1]


def merge_attention_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, /) -> tuple[Float64, Float64]:
    out_a, lse_a, out_b, lse_b = float64(out_a), float64(lse_a), float64(out_b), float64(lse_b)
    out, lse = np.zeros(out_a.shape), np.full(lse_a.shape, -np.inf)
    for at in np.ndindex(lse_a.shape):
        largest = max(lse_a[at], lse_b[at])
        if largest == -np.inf:
            continue
        shares = [math.exp(lse_a[at] - largest), math.exp(lse_b[at] - largest)]
        lse[at] = largest + math.log(sum(shares))
        for share, part in zip(shares, (out_a, out_b), strict=True):
            if share > 0:
                out[at] += share / sum(shares) * part[at]
    return out, lse
