"""A small Llama-style decoder over a paged KV cache: grouped queries, rotary positions, RMSNorm, SwiGLU.

One call computes one step of the replay. The caches of all layers lie in one array, `[layers * P, ps, Hkv, D]`: layer
`l` uses pages `l * P ...`. So the scan over the layers carries one buffer that is updated in place; caches sliced a
layer at a time would be copied whole in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bench import jax_paged
from jax_bridge import page_attention, unified_attention, write_kv_pages
from jax_bridge.layouts import CacheSizes, cache_shape

KV_LAYOUT = "PTHD"
ATTENTION_CHOICES = ("unified", "page", "pallas")


@dataclass(frozen=True)
class AttentionChoice:
    """How a step attends.

    Attributes:
        operation: "unified": one call of `unified_attention` for any step; "page": `page_attention` for the steps that
            only decode; "pallas": JAX's own operation for these.
        platform: of our operations.
    """

    operation: str
    platform: str

    @property
    def kv_layout(self) -> str:
        """The layout of the caches: JAX's operation knows one only."""
        return jax_paged.KV_LAYOUT if self.operation == "pallas" else KV_LAYOUT


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    dtype: str
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5


class LayerWeights(NamedTuple):
    """Weights of one layer, arrays of their own: XLA would copy the part of an array of all layers before each use."""

    attention_norm: Array  # [hidden]
    query: Array  # [hidden, Hq * D]
    key: Array  # [hidden, Hkv * D]
    value: Array  # [hidden, Hkv * D]
    output: Array  # [Hq * D, hidden]
    mlp_norm: Array  # [hidden]
    gate: Array  # [hidden, intermediate]
    up: Array  # [hidden, intermediate]
    down: Array  # [intermediate, hidden]


class Weights(NamedTuple):
    embedding: Array  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Array  # [hidden]
    unembedding: Array  # [hidden, vocabulary]


class Caches(NamedTuple):
    """K and V of every layer, each `[layers * P, ps, Hkv, D]`, or in the layout that an `AttentionChoice` has."""

    key: Array
    value: Array


class StepInputs[Integers](NamedTuple):
    """One step: `T` packed rows of `S` sequences, those that decode one token first.

    Padding comes last: sequences without rows, of length 0, and rows of no sequence, with slot -1. Where `T == S` no
    sequence has more than one row. On the host the arrays are numpy's.
    """

    tokens: Integers  # int32 [T]
    positions: Integers  # int32 [T]
    slots: Integers  # int32 [T], page * ps + offset
    kv_lens: Integers  # int32 [S], the new tokens included
    block_tables: Integers  # int32 [S, MP]
    query_start_loc: Integers  # int32 [S + 1]


class StepOutputs(NamedTuple):
    """The greedy token after each sequence's last row, and its logit, each `[S]`; of no meaning for padding."""

    tokens: Array
    logits: Array


class StepProbe(NamedTuple):
    """Queries and attention outputs of every layer of a step, `[layers, T, Hq, D]`."""

    queries: Array
    outputs: Array


def init_weights(config: ModelConfig, seed: int) -> Weights:
    """Random weights that keep activations and logits near unit size."""

    def normal(key: Array, *shape: int, fan_in: int) -> Array:
        return (jax.random.normal(key, shape, jnp.float32) / fan_in**0.5).astype(config.dtype)

    hidden, intermediate = config.hidden, config.intermediate
    query_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim

    @jax.jit
    def build_layer(key: Array) -> LayerWeights:
        keys = iter(jax.random.split(key, 7))
        return LayerWeights(
            attention_norm=jnp.ones((hidden,), config.dtype),
            query=normal(next(keys), hidden, query_width, fan_in=hidden),
            key=normal(next(keys), hidden, kv_width, fan_in=hidden),
            value=normal(next(keys), hidden, kv_width, fan_in=hidden),
            output=normal(next(keys), query_width, hidden, fan_in=query_width),
            mlp_norm=jnp.ones((hidden,), config.dtype),
            gate=normal(next(keys), hidden, intermediate, fan_in=hidden),
            up=normal(next(keys), hidden, intermediate, fan_in=hidden),
            down=normal(next(keys), intermediate, hidden, fan_in=intermediate),
        )

    @jax.jit
    def build_ends(key: Array) -> tuple[Array, Array]:
        first, last = jax.random.split(key)
        shape = (config.vocabulary, hidden)
        return normal(first, *shape, fan_in=1), normal(last, *shape[::-1], fan_in=hidden)

    # This generator compiles in a fraction of the time.
    key, *keys = jax.random.split(jax.random.key(seed, impl="rbg"), 1 + config.layers)
    embedding, unembedding = build_ends(key)
    layers = tuple(build_layer(key) for key in keys)
    return Weights(embedding, layers, jnp.ones((hidden,), config.dtype), unembedding)


def init_caches(config: ModelConfig, num_pages: int, page_size: int, kv_layout: str = KV_LAYOUT) -> Caches:
    """Empty caches."""
    sizes = CacheSizes(config.layers * num_pages, page_size, config.kv_heads, config.head_dim)
    shape = cache_shape(kv_layout, sizes)
    return Caches(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def attend_step(queries: Array, caches: Caches, inputs: StepInputs[Array], attention: AttentionChoice) -> Array:
    """Attention of one layer's step: the one place that says which operation serves it.

    Args:
        queries: `[T, Hq, D]`.
        caches: of all layers; the tables in `inputs` name this layer's pages.
        inputs: the step.
        attention: the operation and its platform.

    Returns:
        `[T, Hq, D]`.
    """
    sequences = (queries, caches.key, caches.value, inputs.kv_lens, inputs.block_tables)
    only_decodes = queries.shape[0] == inputs.kv_lens.shape[0]
    if attention.operation == "page" and only_decodes:
        return page_attention(*sequences, kv_layout=attention.kv_layout, platform=attention.platform)
    if attention.operation == "pallas" and only_decodes:
        return jax_paged.jax_paged_attention(*sequences)
    attended: Array = unified_attention(
        *sequences, inputs.query_start_loc, kv_layout=attention.kv_layout, platform=attention.platform
    )
    return attended


def shift_to_layer(inputs: StepInputs[Array], layer: Array | int, num_pages: int, page_size: int) -> StepInputs[Array]:
    """The same step with slots and tables that name the pages of `layer`."""
    first_page = layer * num_pages
    return inputs._replace(
        slots=jnp.where(inputs.slots < 0, -1, inputs.slots + first_page * page_size),
        block_tables=inputs.block_tables + first_page,
    )


def serve_step(
    weights: Weights, caches: Caches, inputs: StepInputs[Array], *, config: ModelConfig, attention: AttentionChoice
) -> tuple[Caches, StepOutputs]:
    """Compute one step: write the new K/V, attend, pick the next tokens. Meant to be jitted with `caches` donated."""
    caches, hidden, _ = _run_layers(weights, caches, inputs, config, attention, observe=lambda queries, outputs: None)
    last_rows = jnp.maximum(inputs.query_start_loc[1:] - 1, 0)
    normed = _rms_norm(hidden[last_rows], weights.final_norm, config.norm_epsilon)
    logits = _project(normed, weights.unembedding).astype(jnp.float32)
    return caches, StepOutputs(jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(logits, axis=-1))


def probe_step(
    weights: Weights, caches: Caches, inputs: StepInputs[Array], *, config: ModelConfig, attention: AttentionChoice
) -> tuple[Caches, StepProbe]:
    """`serve_step`, answering what goes into and comes out of attention in every layer."""
    caches, _, probe = _run_layers(weights, caches, inputs, config, attention, observe=StepProbe)
    return caches, probe


def attention_only(
    queries: Array, caches: Caches, inputs: StepInputs[Array], *, config: ModelConfig, attention: AttentionChoice
) -> Array:
    """The attention calls of a step and nothing else; each layer's output is the next one's query."""
    pages, page_size = _pages_of_a_layer(caches, config, attention)

    def attend_layer(queries: Array, layer: Array) -> tuple[Array, None]:
        return attend_step(queries, caches, shift_to_layer(inputs, layer, pages, page_size), attention), None

    return lax.scan(attend_layer, queries, jnp.arange(config.layers, dtype=jnp.int32))[0]


def _pages_of_a_layer(caches: Caches, config: ModelConfig, attention: AttentionChoice) -> tuple[int, int]:
    """Pages of one layer, and tokens of a page."""
    sizes = dict(zip(attention.kv_layout, caches.key.shape, strict=True))
    return sizes["P"] // config.layers, sizes["T"]


def _run_layers[Observed](
    weights: Weights,
    caches: Caches,
    inputs: StepInputs[Array],
    config: ModelConfig,
    attention: AttentionChoice,
    *,
    observe: Callable[[Array, Array], Observed],
) -> tuple[Caches, Array, Observed]:
    """Caches, the last hidden state, and what `observe` makes of each layer's attention queries and outputs."""
    pages, page_size = _pages_of_a_layer(caches, config, attention)

    def run_layer(weights: LayerWeights, index: int, hidden: Array, caches: Caches) -> tuple[Array, Caches, Observed]:
        here = shift_to_layer(inputs, index, pages, page_size)
        normed = _rms_norm(hidden, weights.attention_norm, config.norm_epsilon)
        queries = _rotate(_split_heads(_project(normed, weights.query), config.heads), here.positions, config.rope_base)
        keys = _rotate(_split_heads(_project(normed, weights.key), config.kv_heads), here.positions, config.rope_base)
        values = _split_heads(_project(normed, weights.value), config.kv_heads)
        caches = Caches(
            *write_kv_pages(keys, values, caches.key, caches.value, here.slots, kv_layout=attention.kv_layout)
        )
        attended = attend_step(queries, caches, here, attention)
        hidden = hidden + _project(attended.reshape(hidden.shape[0], -1), weights.output)
        normed = _rms_norm(hidden, weights.mlp_norm, config.norm_epsilon)
        gated = jax.nn.silu(_project(normed, weights.gate)) * _project(normed, weights.up)
        hidden = hidden + _project(gated, weights.down)
        return hidden, caches, observe(queries, attended)

    hidden, observed = weights.embedding[inputs.tokens], []
    for index, layer in enumerate(weights.layers):
        hidden, caches, seen = run_layer(layer, index, hidden, caches)
        observed.append(seen)
    return caches, hidden, jax.tree.map(lambda *arrays: jnp.stack(arrays), *observed)


def _project(rows: Array, matrix: Array) -> Array:
    # On a GPU the default for float32 is TF32, far coarser than the attention it feeds.
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return jnp.matmul(rows, matrix, precision=precision)


def _split_heads(rows: Array, heads: int) -> Array:
    return rows.reshape(rows.shape[0], heads, -1)


def _rms_norm(rows: Array, weight: Array, epsilon: float) -> Array:
    wide = rows.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(rows.dtype) * weight


def _rotate(heads: Array, positions: Array, base: float) -> Array:
    """Rotary positions, first half of the dims paired with the second: `[T, H, D]` with `positions` `[T]`."""
    half = heads.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(heads.dtype)
