"""Launch configurations of the paged operations at the sizes where they change: pure functions of shapes and device."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings, strategies

import jax_bridge
from jax_bridge import paged_candidates
from jax_bridge import paged_heuristics as heuristics
from jax_bridge.device import KNOWN_DEVICES, Device
from jax_bridge.paged_launch import ANY_ROWS, RowClass, work_bounds
from jax_bridge.tiles import padded_head_dim
from jax_bridge.validation import PagedSizes

H100 = KNOWN_DEVICES["h100"]


def sizes(num_seqs: int, num_tokens: int, **changes: Any) -> PagedSizes:
    """Llama 3 8B over pages of 16 tokens."""
    base = PagedSizes(
        num_seqs=num_seqs,
        num_tokens=num_tokens,
        num_q_heads=32,
        num_kv_heads=8,
        group_size=4,
        head_dim=128,
        value_head_dim=128,
        num_pages=4096,
        page_size=16,
        table_width=256,
    )
    return dataclasses.replace(base, **changes)


def unified(call: PagedSizes, dtype: str = "bfloat16", device: Device = H100, **fields: Any) -> list[RowClass]:
    """The classes of the launch, in order."""
    chosen = heuristics.unified_attention_config(call, dtype, dtype, device)
    cfg = dataclasses.replace(chosen, **fields)
    return list(heuristics.unified_attention_classes(cfg, call, dtype, device))


def test_one_token_a_sequence_is_decoding() -> None:
    (rows,) = unified(sizes(8, 8))
    assert (rows.fewest_rows, rows.most_rows) == (1, ANY_ROWS)
    assert rows.num_splits == 0
    assert not rows.skip_masks


def test_one_token_more_may_be_prefilling() -> None:
    few, many = unified(sizes(8, 9))
    assert many.fewest_rows == few.most_rows + 1 == few.block_m + 1
    assert many.most_rows == ANY_ROWS
    assert many.skip_masks
    assert many.block_m > few.block_m


@pytest.mark.parametrize("num_tokens", [8, 9, 500])
def test_float32_is_never_prefilling(num_tokens: int) -> None:
    """Its products run on FMA units: large tiles would spill."""
    (rows,) = unified(sizes(8, num_tokens), "float32")
    assert rows.block_m == 16
    assert rows.most_rows == ANY_ROWS


@pytest.mark.parametrize(("num_tokens", "is_decoding"), [(1, True), (16, True), (17, False)])
def test_one_sequence(num_tokens: int, is_decoding: bool) -> None:
    """Up to 64 rows, 16 tokens of 4 heads, fit a decode tile."""
    (rows,) = unified(sizes(1, num_tokens))
    assert rows.skip_masks != is_decoding
    assert rows.most_rows == ANY_ROWS


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_decoding_leaves_room_where_much_is_prefilling(more: int) -> None:
    """Then its programs take share after share beside prefilling ones; else each has one, and they go first."""
    few, many = unified(sizes(8, 8 * heuristics._SHORT_TOKENS + more))
    assert (few.shares_per_program > 0) == (more >= 0)
    assert many.shares_per_program == 0


def test_specialised_warps_decode_and_prefill_in_one_launch() -> None:
    """Whose sequences are cut by themselves, into splits as long for the whole batch."""
    call = sizes(33, 2080)
    cfg = heuristics.unified_attention_config(call, "bfloat16", "bfloat16", H100, warp_specialized=True)
    few, many = heuristics.unified_attention_classes(cfg, call, "bfloat16", H100)
    assert few.warp_specialized
    assert many.warp_specialized
    assert (few.most_rows, many.fewest_rows) == (few.block_m, few.block_m + 1)
    assert (few.block_n, few.num_stages, few.num_warps) == (many.block_n, many.num_stages, many.num_warps)
    work = work_bounds(few, call, True, 4096, H100)
    assert work.even_shares == 2 * (132 // 8)


@settings(max_examples=200, deadline=None)
@given(
    lengths=strategies.lists(strategies.integers(0, 4096), min_size=1, max_size=40),
    prompt=strategies.integers(17, 3000),
)
def test_even_splits_are_no_more_than_there_is_room_for(lengths: list[int], prompt: int) -> None:
    """The arithmetic of `triton_kernels.schedule` in integers of Python, at lengths that are not known when tracing."""
    call = sizes(len(lengths) + 1, len(lengths) + prompt)
    cfg = heuristics.unified_attention_config(call, "bfloat16", "bfloat16", H100, warp_specialized=True)
    few, many = heuristics.unified_attention_classes(cfg, call, "bfloat16", H100)
    tiles_of_few = [max(1, math.ceil(length / few.block_n)) for length in lengths]
    rows_of_many = math.ceil(4 * prompt / many.block_m)
    tiles_of_many = max(1, math.ceil(prompt / many.block_n))
    total = sum(tiles_of_few) + rows_of_many * tiles_of_many
    for rows, tiles in ((few, tiles_of_few), (many, [tiles_of_many] * rows_of_many)):
        work = work_bounds(rows, call, True, 4096, H100)
        if not work.even_shares:
            continue
        split_tiles = max(rows.min_tiles, math.ceil(total / work.even_shares))
        splits = [max(1, (each + split_tiles // 2) // split_tiles) for each in tiles]
        assert max(splits) <= work.splits
        assert sum(splits) <= work.shares == work.partials


@pytest.mark.parametrize(("num_seqs", "pages", "is_whole"), [(64, 32, True), (64, 33, False), (32, 32, False)])
def test_many_short_sequences_are_not_divided(num_seqs: int, pages: int, is_whole: bool) -> None:
    """Nothing could be gained, and the reduction costs microseconds also where there is nothing to reduce."""
    call = sizes(num_seqs, num_seqs, table_width=pages)
    (rows,) = unified(call)
    assert (work_bounds(rows, call, True, 16 * pages, H100).splits == 1) == is_whole
    page = heuristics.page_attention_config(call, "bfloat16", "bfloat16", H100)
    assert page.min_tiles_per_split == rows.min_tiles
    (rows,) = unified(call, min_tiles_per_split=2)
    assert work_bounds(rows, call, True, 16 * pages, H100).splits > 1


@pytest.mark.parametrize(("threshold", "num_splits"), [(None, 5), (8, 5), (7, 1), (0, 1)])
def test_threshold_of_splits(threshold: int | None, num_splits: int) -> None:
    """Keys are divided up to so many sequences."""
    classes = unified(sizes(8, 40), seq_threshold_3d=threshold, num_par_softmax_segments=5)
    assert {rows.num_splits for rows in classes} == {num_splits}


def test_keys_of_a_chunk_are_divided_where_its_rows_leave_the_device_idle() -> None:
    for num_tokens, num_splits in ((64, 0), (100_000, 1)):
        call = sizes(1, num_tokens)
        cfg = heuristics.prefill_page_attention_config(call, "bfloat16", "bfloat16", H100)
        (rows,) = heuristics.prefill_page_attention_classes(cfg, call, H100)
        assert rows.num_splits == num_splits


@pytest.mark.parametrize(("num_tokens", "is_prefill_tile"), [(16, False), (17, True)])
def test_chunks_of_few_rows_take_a_decode_tile(num_tokens: int, is_prefill_tile: bool) -> None:
    cfg = heuristics.prefill_page_attention_config(sizes(1, num_tokens), "bfloat16", "bfloat16", H100)
    assert cfg.skip_masks == is_prefill_tile


@pytest.mark.parametrize(("tokens", "block_m"), [(127, 64), (128, 128)])
def test_long_chunks_take_the_larger_tile(tokens: int, block_m: int) -> None:
    cfg = heuristics.prefill_page_attention_config(sizes(1, tokens), "bfloat16", "bfloat16", H100)
    assert cfg.block_m == block_m


def _bytes(call: PagedSizes, itemsize: int, rows: int, keys: int, tiles: int) -> int:
    """Shared memory of a tile's queries and of the K and V tiles in flight."""
    widths = padded_head_dim(call.head_dim) + padded_head_dim(call.value_head_dim)
    return rows * padded_head_dim(call.head_dim) * 2 + keys * widths * itemsize * tiles


@pytest.mark.parametrize("device", KNOWN_DEVICES)
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_tiles_fit_shared_memory_everywhere(device: str, cache_dtype: str) -> None:
    chip, itemsize = KNOWN_DEVICES[device], 1 if cache_dtype == "int8" else 2
    for head_dim, group_size, tokens in itertools.product((16, 64, 80, 128, 192, 256, 512), (1, 3, 8, 71), (1, 5, 300)):
        heads = {"num_q_heads": 2 * group_size, "num_kv_heads": 2, "group_size": group_size}
        call = sizes(4, 4 * tokens, head_dim=head_dim, value_head_dim=head_dim, **heads)
        cfg = heuristics.unified_attention_config(call, "bfloat16", cache_dtype, chip)
        assert cfg.num_stages is not None
        assert cfg.block_m is not None
        assert cfg.block_n is not None
        assert _bytes(call, itemsize, cfg.block_m, cfg.block_n, cfg.num_stages - 1) <= chip.shared_memory
        decode = heuristics.page_attention_config(call, "bfloat16", cache_dtype, chip)
        assert decode.block_n is not None
        assert decode.num_stages is not None
        assert _bytes(call, itemsize, 16, decode.block_n, decode.num_stages - 1) <= chip.shared_memory


@pytest.mark.parametrize(
    "operation", ["unified_attention", "prefill_page_attention", "page_attention", "ragged_decode_attention"]
)
def test_candidates_are_distinct_complete_and_begin_with_the_heuristic(operation: str) -> None:
    call = sizes(4, 100) if operation == "unified_attention" else sizes(1, 100)
    heuristic = getattr(heuristics, f"{operation}_config")(call, "bfloat16", "bfloat16", H100)
    dtypes = ["bfloat16"] * (2 if operation == "unified_attention" else 1)
    candidates = getattr(paged_candidates, f"{operation}_candidates")(call, *dtypes, heuristic, H100)
    assert candidates[0] == heuristic
    assert len(set(candidates)) == len(candidates) > 3


@pytest.mark.parametrize(("num_seqs", "num_tokens"), [(8, 8), (1, 2000), (8, 500)])
def test_no_two_candidates_of_unified_attention_launch_the_same(num_seqs: int, num_tokens: int) -> None:
    """Such as prefill tiles of another shape where everything is decoding."""
    call = sizes(num_seqs, num_tokens)
    heuristic = heuristics.unified_attention_config(call, "bfloat16", "bfloat16", H100)
    candidates = paged_candidates.unified_attention_candidates(call, "bfloat16", "bfloat16", heuristic, H100)
    classes = {heuristics.unified_attention_classes(cfg, call, "bfloat16", H100) for cfg in candidates}
    assert len(classes) == len(candidates) > 3


@pytest.mark.parametrize(
    "operation", ["unified_attention", "prefill_page_attention", "page_attention", "ragged_decode_attention"]
)
def test_heuristics_choose_every_field_that_needs_a_value(operation: str) -> None:
    call = sizes(4, 100) if operation == "unified_attention" else sizes(1, 100)
    for dtype in ("float32", "float16"):
        cfg = getattr(heuristics, f"{operation}_config")(call, dtype, dtype, H100)
        free = {"num_splits", "seq_threshold_3d", "num_par_softmax_segments", "num_key_splits"}
        cfg = getattr(cfg, "fwd_params", cfg)
        assert all(getattr(cfg, field.name) is not None for field in dataclasses.fields(cfg) if field.name not in free)


def test_configurations_are_hashable() -> None:
    assert len({jax_bridge.UnifiedAttentionConfig(), jax_bridge.UnifiedAttentionConfig(block_m=16)}) == 2
