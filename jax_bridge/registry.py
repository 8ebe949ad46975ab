"""The operations by name."""

from typing import Any

from jax_bridge.attention import Attention
from jax_bridge.kv_pages import WriteKVPages
from jax_bridge.operation import Operation
from jax_bridge.page_attention import PageAttention
from jax_bridge.prefill_page_attention import PrefillPageAttention
from jax_bridge.ragged_decode_attention import RaggedDecodeAttention
from jax_bridge.states import MergeAttentionStates
from jax_bridge.unified_attention import UnifiedAttention

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        PageAttention(),
        PrefillPageAttention(),
        UnifiedAttention(),
        RaggedDecodeAttention(),
        Attention(),
        WriteKVPages(),
        MergeAttentionStates(),
    )
}


def find_operation(op: Any) -> Operation:
    """The operation that a name, a public function, an operation object or its class stands for.

    Raises:
        ValueError: there is no such operation.
    """
    name = op if isinstance(op, str) else getattr(op, "name", None) or getattr(op, "__name__", None)
    if name not in OPERATIONS:
        raise ValueError(f"op is {op!r}, expected an operation or one of the names {', '.join(OPERATIONS)}")
    return OPERATIONS[name]
