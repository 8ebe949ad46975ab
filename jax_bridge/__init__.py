"""Attention over paged and ragged KV caches for JAX, on GPU, TPU and CPU, with one contract.

Importing this package needs neither a GPU nor Triton.
"""

from jax_bridge.attention import Attention, attention
from jax_bridge.checks import check_values
from jax_bridge.configs import (
    AttentionConfig,
    FwdParams,
    PageAttentionConfig,
    PrefillPageAttentionConfig,
    RaggedDecodeAttentionConfig,
    UnifiedAttentionConfig,
)
from jax_bridge.explanation import explain
from jax_bridge.kv_pages import write_kv_pages
from jax_bridge.masks import MaskInfo
from jax_bridge.operation import Invocation
from jax_bridge.page_attention import PageAttention, page_attention
from jax_bridge.prefill_page_attention import PrefillPageAttention, prefill_page_attention
from jax_bridge.ragged_decode_attention import RaggedDecodeAttention, ragged_decode_attention
from jax_bridge.states import merge_attention_states
from jax_bridge.tuning import tune
from jax_bridge.unified_attention import UnifiedAttention, unified_attention

__all__ = [
    "Attention",
    "AttentionConfig",
    "FwdParams",
    "Invocation",
    "MaskInfo",
    "PageAttention",
    "PageAttentionConfig",
    "PrefillPageAttention",
    "PrefillPageAttentionConfig",
    "RaggedDecodeAttention",
    "RaggedDecodeAttentionConfig",
    "UnifiedAttention",
    "UnifiedAttentionConfig",
    "attention",
    "check_values",
    "explain",
    "merge_attention_states",
    "page_attention",
    "prefill_page_attention",
    "ragged_decode_attention",
    "tune",
    "unified_attention",
    "write_kv_pages",
]
