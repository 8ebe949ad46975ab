"""Launches of the paged Triton kernels over dense rows: a row of the batch is a page, and there is no page table."""

import dataclasses
from typing import Any

import jax

from jax_bridge import paged_candidates, paged_heuristics, paged_launch
from jax_bridge.configs import RaggedDecodeAttentionConfig
from jax_bridge.dense_launch import merged_sinks
from jax_bridge.device import Device
from jax_bridge.launch import kernel_operation
from jax_bridge.operation import Invocation, Outputs
from jax_bridge.paged_launch import Arrays, PagedCall
from jax_bridge.tiles import next_power_of_two
from jax_bridge.validation import PagedOptions, PagedSizes

_DENSE_LAYOUT = "PTHD"  # of `[B, L, Hkv, D]`
_MOST_KEYS = 1 << 29  # of a sequence in the paged kernels: `triton_kernels.schedule.LONGEST`


def lacks(invocation: Invocation) -> str | None:
    """Words for what the kernels cannot do of a call, or None."""
    if (kv_len := invocation.sizes.kv_len) > _MOST_KEYS:
        return f"more than {_MOST_KEYS} keys a row (here {kv_len})"
    return paged_launch.lacks(paged_sizes(invocation), invocation.arrays["key"].dtype)


def paged_sizes(invocation: Invocation) -> PagedSizes:
    """The sizes of a call as those of a cache whose pages are the rows of the batch.

    A page is as long as a power of two that holds a row, so that no tile of keys leaves it.
    """
    sizes = invocation.sizes
    return PagedSizes(
        num_seqs=sizes.batch,
        num_tokens=sizes.batch,
        num_q_heads=sizes.num_q_heads,
        num_kv_heads=sizes.num_kv_heads,
        group_size=sizes.group_size,
        head_dim=sizes.head_dim,
        value_head_dim=sizes.value_head_dim,
        num_pages=sizes.batch,
        page_size=next_power_of_two(sizes.kv_len),
        table_width=1,
    )


def heuristic_cfg(invocation: Invocation, device: Device) -> RaggedDecodeAttentionConfig:
    """The configuration for a call's static sizes and a device."""
    dtype = invocation.arrays["key"].dtype
    return paged_heuristics.ragged_decode_attention_config(paged_sizes(invocation), dtype, dtype, device)


def candidate_cfgs(invocation: Invocation, device: Device) -> tuple[RaggedDecodeAttentionConfig, ...]:
    """Configurations worth timing for a call, all of which fit the device."""
    heuristic, dtype = heuristic_cfg(invocation, device), invocation.arrays["key"].dtype
    return paged_candidates.ragged_decode_attention_candidates(paged_sizes(invocation), dtype, heuristic, device)


def attend_rows(invocation: Invocation, cfg: RaggedDecodeAttentionConfig, device: Device) -> Outputs:
    """The answers of ragged decode, whose queries have three axes, for a complete configuration."""
    operation, options, kv_len = invocation.operation, invocation.options, invocation.sizes.kv_len
    (rows,) = paged_heuristics.ragged_decode_attention_classes(cfg)
    sizes = paged_sizes(invocation)
    sizes = dataclasses.replace(sizes, page_size=max(sizes.page_size, rows.block_n))
    scoring = PagedOptions(
        softmax_scale=options.softmax_scale,
        soft_cap=options.soft_cap,
        window=options.window,
        kv_layout=_DENSE_LAYOUT,
        return_lse=options.return_lse,
    )

    def attend(arrays: Arrays) -> tuple[jax.Array, jax.Array | None]:
        operands: dict[str, Any] = {
            "q_ptr": arrays["query"],
            "k_ptr": arrays["key"],
            "v_ptr": arrays["value"],
            "starts_ptr": None,
            "lens_ptr": arrays["sequence_end"],
            "table_ptr": None,
            "alibi_ptr": None,
            "qq_bias_ptr": None,
            "sink_ptr": merged_sinks(arrays["softmax_aux"], sizes.num_q_heads, one_a_head=False),
            "k_scale_ptr": None,
            "v_scale_ptr": None,
        }
        call = PagedCall(
            operation,
            operands,
            sizes,
            scoring,
            device,
            max_keys=kv_len,
            begins=arrays["sequence_start"],
        )
        return call.attend([rows])

    out, lse = kernel_operation(f"{operation}[triton]", attend)(dict(invocation.arrays))
    return (out, lse) if lse is not None else out
