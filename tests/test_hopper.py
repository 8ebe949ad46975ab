"""The kernel with specialised warps, which Triton's interpreter does not know: natively, against float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_bridge
from jax_bridge.device import current_device, target_device
from tests import judge
from tests.cases import Case
from tests.implementations import SMALL_DEVICE, arguments, kernel_of, specialized
from tests.inputs import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not current_device().specializes_warps, reason="the GPU has no such warps"),
]

BASE = Case(
    name="hopper",
    operation="unified_attention",
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=128,
    dtype="bfloat16",
    query_lens=(1, 0, 200, 70, 5, 33),
    kv_lens=(33, 7, 331, 70, 2, 600),
    leading_rows=1,
    trailing_rows=2,
)
LONG_DECODES = BASE.replace(query_lens=(1, 200, 4, 1, 0), kv_lens=(4000, 2500, 3000, 9, 7))
CHUNK = BASE.replace(operation="prefill_page_attention", query_lens=(150,), leading_rows=0, trailing_rows=0)

VARIANTS: dict[str, Case] = {
    "plain": BASE,
    "float16": BASE.replace(dtype="float16"),
    "d64": BASE.replace(head_dim=64),
    "d40": BASE.replace(head_dim=40),
    "d80": BASE.replace(head_dim=80),
    "d96_no_groups": BASE.replace(num_q_heads=2, num_kv_heads=2, head_dim=96, window=100),
    "d96_heads_first": BASE.replace(head_dim=96, kv_layout="PHTD"),
    "d120_heads_outside": BASE.replace(head_dim=120, kv_layout="HPTD", dtype="float16"),
    "d192": BASE.replace(head_dim=192, return_lse=True),
    "d256": BASE.replace(head_dim=256),
    "page_8": BASE.replace(page_size=8),
    "page_64": BASE.replace(page_size=64),
    "page_256": BASE.replace(page_size=256),
    "d256_page_128": BASE.replace(head_dim=256, page_size=128),
    "heads_first": BASE.replace(kv_layout="PHTD"),
    "heads_outside": BASE.replace(kv_layout="HPTD", page_size=32),
    "heads_outside_spare_pages": BASE.replace(kv_layout="HPTD", spare_pages=200),
    "one_kv_head": BASE.replace(num_q_heads=4, num_kv_heads=1),
    "no_groups": BASE.replace(num_q_heads=2, num_kv_heads=2),
    "groups_of_three": BASE.replace(num_q_heads=9, num_kv_heads=3),
    "groups_of_seven": BASE.replace(num_q_heads=14, num_kv_heads=2),
    "groups_of_71": BASE.replace(num_q_heads=71, num_kv_heads=1, head_dim=64),
    "window": BASE.replace(window=100),
    "window_of_few": BASE.replace(window=5, page_size=64),
    "window_both_ways": BASE.replace(window=(70, 13), causal=False),
    "not_causal": BASE.replace(causal=False),
    "window_with_a_middle": BASE.replace(window=1000, query_lens=(40, 30), kv_lens=(3000, 1500)),
    "cap": BASE.replace(soft_cap=5.0, query_gain=5.0),
    "cap_window_sinks": BASE.replace(soft_cap=30.0, window=90, sinks=1),
    "cap_with_a_reference": BASE.replace(soft_cap=50.0, query_gain=5.0),
    "cap_of_large_weights": BASE.replace(soft_cap=50.0, query_gain=1000.0, sinks=1),
    "cap_d64": BASE.replace(soft_cap=30.0, head_dim=64, kv_scale="head"),
    "cap_d80": BASE.replace(soft_cap=30.0, head_dim=80, sinks=1),
    "cap_d256": BASE.replace(soft_cap=30.0, head_dim=256, softmax_scale=-0.2),
    "cap_long_decodes": LONG_DECODES.replace(soft_cap=30.0),
    "cap_and_all_far_below": BASE.replace(soft_cap=50.0, negative_logits=True),
    "cap_reached": BASE.replace(soft_cap=30.0, query_gain=1000.0),
    "cap_beyond_bounds": BASE.replace(soft_cap=60.0, query_gain=5.0),
    "cap_float16": BASE.replace(soft_cap=5.0, dtype="float16"),
    "cap_beyond_the_fast_one": BASE.replace(soft_cap=2000.0, query_gain=5.0),
    "sinks_lse": BASE.replace(sinks=1, return_lse=True),
    "lse": BASE.replace(return_lse=True),
    "everything": BASE.replace(window=(90, 0), soft_cap=30.0, sinks=1, return_lse=True, page_size=32),
    "scales": BASE.replace(kv_scale="head"),
    "negative_scale": BASE.replace(softmax_scale=-0.2),
    "far_below_zero": BASE.replace(negative_logits=True),
    "peaked": BASE.replace(query_gain=5.0),
    "shared_pages": BASE.replace(page_order="shared"),
    "duplicate_pages": BASE.replace(page_order="duplicate"),
    "one_prompt": BASE.replace(query_lens=(300,), kv_lens=(300,)),
    "many_sequences": BASE.replace(query_lens=(17, 40, 9) * 40, kv_lens=(90, 40, 10) * 40),
    "line_of_64_bits": BASE.replace(
        num_kv_heads=1, head_dim=64, query_lens=(17,) * 128, kv_lens=(30,) * 128, page_size=1024, table_slack=512
    ),
    "longer_rows_than_keys": BASE.replace(query_lens=(60, 40), kv_lens=(30, 90)),
    "long_decodes": LONG_DECODES,
    "long_decodes_window": LONG_DECODES.replace(window=1500),
    "long_decodes_sinks_lse": LONG_DECODES.replace(sinks=1, return_lse=True),
    "long_decodes_d96": LONG_DECODES.replace(head_dim=96, num_q_heads=4, num_kv_heads=4),
    "long_decodes_d64": LONG_DECODES.replace(head_dim=64, page_size=64),
    "chunk": CHUNK.replace(kv_lens=(700,)),
    "chunk_window_sinks": CHUNK.replace(kv_lens=(700,), window=130, sinks=1, return_lse=True),
    "long_chunk": CHUNK.replace(kv_lens=(3000,), query_lens=(40,)),
    "long_chunk_window": CHUNK.replace(kv_lens=(3000,), query_lens=(40,), window=1000, return_lse=True),
    "chunk_page_64": CHUNK.replace(kv_lens=(421,), page_size=64, kv_layout="PTHD"),
    "chunk_cap_float16": CHUNK.replace(kv_lens=(421,), soft_cap=5.0, dtype="float16"),
}
SPLITS: dict[str, dict[str, Any]] = {
    "unified_attention": {"num_par_softmax_segments": 3},
    "prefill_page_attention": {"num_splits": 3},
}


def check(case: Case, **fields: Any) -> None:
    """Holds the answer of the kernel to float64."""
    call, expected, bounds = judge.problem(case)
    bounds.check(kernel_of(case.operation)(call, cfg=specialized(case.operation, **fields)), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_float64(variant: str) -> None:
    check(VARIANTS[variant])


@pytest.mark.parametrize(
    "variant",
    [
        *("plain", "d64", "window", "window_with_a_middle", "cap_window_sinks"),
        *("sinks_lse", "long_decodes_sinks_lse", "chunk"),
    ],
)
def test_split_keys(variant: str) -> None:
    check(VARIANTS[variant], **SPLITS[VARIANTS[variant].operation])


@pytest.mark.parametrize("variant", ["long_chunk", "long_chunk_window", "chunk"])
def test_balanced_keys(variant: str) -> None:
    """Shares of one KV tile or more, most of which begin in the middle of a row tile."""
    check(VARIANTS[variant], min_tiles_per_split=1)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "variant", ["plain", "everything", "cap_window_sinks", "many_sequences", "long_decodes", "chunk"]
)
def test_few_multiprocessors_take_many_turns(variant: str, num_stages: int) -> None:
    with target_device(SMALL_DEVICE):
        check(VARIANTS[variant], num_stages=num_stages, block_n=64)


@pytest.mark.parametrize("block_n", [16, 32, 256])
@pytest.mark.parametrize("variant", ["everything", "cap_window_sinks"])
def test_other_tiles(variant: str, block_n: int) -> None:
    check(VARIANTS[variant], block_n=block_n, num_stages=1)


@pytest.mark.parametrize("block_m", [8, 64, 128])
def test_other_bounds_of_decoding(block_m: int) -> None:
    check(VARIANTS["long_decodes"], decode_block_m=block_m)


@pytest.mark.parametrize("variant", ["many_sequences", "long_decodes"])
def test_answers_repeat(variant: str) -> None:
    """A thousand calls in a program, each of the same bits: barriers that let a warp through early would show."""
    call = build(VARIANTS[variant])
    arrays, keywords = arguments(call)
    cfg = specialized(call.operation)
    first = kernel_of(call.operation).raw(call, cfg=cfg)

    def worst_difference(*arrays: Any) -> jax.Array:
        def again(_: Any, worst: jax.Array) -> jax.Array:
            out = jax_bridge.unified_attention(*arrays, **keywords, platform="triton", cfg=cfg)
            return jnp.maximum(worst, jnp.abs(out.astype(jnp.float32) - first.astype(jnp.float32)).max())

        return jax.lax.fori_loop(0, 1000, again, jnp.float32(0))

    assert jax.jit(worst_difference)(*arrays) == 0.0
