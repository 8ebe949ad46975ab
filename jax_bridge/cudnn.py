"""Dense attention by cuDNN, for the calls that it answers as `docs/semantics.md` says.

Left out is what comes out otherwise or is not promised: masks are added as large finite numbers, which is wrong for
rows that see no key and for extreme scores; and a tile may multiply values that no row sees by 0, NaN included.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_bridge.dense_launch import AttentionOptions, DenseSizes
from jax_bridge.device import current_device

_HOPPER = 90
_HEAD_DIM_UNIT = 8


def lacks(arrays: Mapping[str, Any], sizes: DenseSizes, options: AttentionOptions) -> str | None:
    """Words for the first thing asked for that cuDNN cannot do exactly, or None."""
    widest = 256 if current_device().compute_capability >= _HOPPER else 128
    head_dim, (_, right) = sizes.head_dim, options.bounds
    missing = {
        "bias": arrays["bias"] is not None,
        "a boolean mask in mask_info (key lengths it does)": arrays["mask"] is not None,
        "segments in mask_info (key lengths it does)": arrays["q_segment_ids"] is not None,
        "softmax_aux": arrays["softmax_aux"] is not None,
        "logits_soft_cap": options.soft_cap is not None,
        "dropout_prob": options.dropout_prob > 0,
        "return_weights": options.return_weights,
        f"dtype={options.dtype} (float16 and bfloat16 it does)": options.dtype == jnp.float32,
        f"softmax_dtype={options.softmax_dtype}": options.softmax_dtype != jnp.float32,
        f"softmax_scale={options.softmax_scale}, which is not positive": options.softmax_scale <= 0,
        f"values of another width than keys ({sizes.value_head_dim} and {head_dim})": sizes.value_head_dim != head_dim,
        f"a head dim of {head_dim} (multiples of {_HEAD_DIM_UNIT} up to {widest} it does)": (
            head_dim % _HEAD_DIM_UNIT != 0 or head_dim > widest
        ),
    }
    if options.window is not None:
        missing |= {
            "a sliding_window to the right of the row": right != 0,
            "a sliding_window with more rows than keys": sizes.q_len > sizes.kv_len,
            "a sliding_window with key lengths": arrays["key_lengths"] is not None,
        }
    return next((words for words, is_missing in missing.items() if is_missing), None)


def attend(arrays: Mapping[str, Any], sizes: DenseSizes, options: AttentionOptions) -> jax.Array:
    """The output `[B, Q, Hq, D]`; differentiable.

    Raises:
        NotImplementedError: this machine has no cuDNN or no GPU, or its cuDNN refuses the call.
    """
    query, key, value = (arrays[name].astype(options.dtype) for name in ("query", "key", "value"))
    _, right = options.bounds
    is_causal = right == 0
    if is_causal:  # no row sees the keys behind the last row
        key, value = key[:, : sizes.q_len], value[:, : sizes.q_len]
    lengths = arrays["key_lengths"]
    if lengths is not None:
        lengths = jnp.clip(lengths, 0, key.shape[1])
        is_key = (jnp.arange(key.shape[1]) < lengths[:, None])[:, :, None, None]
        key, value = jnp.where(is_key, key, 0), jnp.where(is_key, value, 0)
    try:
        out: jax.Array = jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=options.softmax_scale,
            is_causal=is_causal,
            key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1),
            local_window_size=None if options.window is None else (options.window[0], 0),
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        why = str(error).rstrip(".")
        raise NotImplementedError(
            f'attention[cuda] does not support this call on this machine: {why}; use platform="xla"'
        ) from error
    # A row without a key: cuDNN saw one of zeros in its place.
    return out if lengths is None else jnp.where((lengths > 0)[:, None, None, None], out, 0)
