"""The operations in pure `jax.numpy`: what they mean, and how they run where no kernel does.

Everything is float32 inside, works under `jax.jit` with all lengths, tables and scales traced, and reads nothing that
the lengths, tables and windows exclude. Arguments are not validated here.
"""

from reference.attention import attention
from reference.kv_pages import write_kv_pages
from reference.page_attention import page_attention
from reference.prefill_page_attention import prefill_page_attention
from reference.ragged_decode_attention import ragged_decode_attention
from reference.states import merge_attention_states
from reference.unified_attention import unified_attention

__all__ = [
    "attention",
    "merge_attention_states",
    "page_attention",
    "prefill_page_attention",
    "ragged_decode_attention",
    "unified_attention",
    "write_kv_pages",
]
