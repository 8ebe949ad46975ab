"""Bugs for the Triton kernels: a line of their source written wrongly, and the case of the matrix that must fail then.

A bug is text. A kernel that is written anew and holds the text no longer fails the test that plants it, so that the bug
moves along.
"""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import triton_kernels
from jax_bridge import interpreter, launch
from tests.cases import CASES, Case
from tests.implementations import small_tiles

SOURCE = Path(str(triton_kernels.__file__)).parent


@dataclass(frozen=True)
class KernelBug:
    """Replacements of text in a module of `triton_kernels`, and the case that they break."""

    module: str
    replacements: tuple[tuple[str, str], ...]
    operation: str
    case_name: str
    dtype: str = "float32"
    fields: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        """The case, with the changes that bring the bug to light."""
        (case,) = (case for case in CASES if (case.operation, case.name) == (self.operation, self.case_name))
        return dataclasses.replace(case, dtype=self.dtype, **self.changes)

    @property
    def cfg(self) -> Any:
        """The configuration to run the case with."""
        return small_tiles(self.operation, **self.fields)

    def applied_to(self, source: str) -> str:
        """The source with the bug."""
        for right, wrong in self.replacements:
            if source.count(right) != 1:
                raise AssertionError(f"{self.module}.py holds {source.count(right)} times, expected once: {right!r}")
            source = source.replace(right, wrong)
        return source


def _page(module: str, right: str, wrong: str, case: str = "everything", **options: Any) -> KernelBug:
    return KernelBug(module, ((right, wrong),), "page_attention", case, **options)


def _unified(module: str, right: str, wrong: str, case: str = "everything", **options: Any) -> KernelBug:
    """In 16 bits: float32 runs in decode tiles only."""
    options = {"fields": {"num_par_softmax_segments": 1}} | options
    return KernelBug(module, ((right, wrong),), "unified_attention", case, "float16", **options)


def _dense(module: str, right: str, wrong: str, case: str = "causal", **options: Any) -> KernelBug:
    return KernelBug(module, ((right, wrong),), "attention", case, **options)


def _ragged(module: str, right: str, wrong: str, case: str = "shared_sinks", **options: Any) -> KernelBug:
    return KernelBug(module, ((right, wrong),), "ragged_decode_attention", case, **options)


SPLIT = {"num_par_softmax_segments": 3}
BALANCED: dict[str, Any] = {
    "changes": {"query_lens": (1,) * 5, "kv_lens": (97, 90, 97, 97, 80), "window": None, "num_splits": 0}
}

KERNEL_BUGS: dict[str, KernelBug] = {
    # Scores.
    "hide_one_too_few": _page("scores", "keys[None, :] < row_end", "keys[None, :] <= row_end"),
    "hide_one_too_many": _page("scores", "keys[None, :] >= row_begin", "keys[None, :] > row_begin", "window_splits"),
    "hide_with_finite_value": _page("scores", 'scores, float("-inf")', "scores, -1.0"),
    "no_cap": _page(
        "scores",
        "logits = soft_cap(products, scale, SCORING, IS_EXACT)",
        "logits = products * (scale * LOG2_E)",
    ),
    "alibi_mirrored": _page("scores", "keys[None, :] - positions[:, None]", "positions[:, None] - keys[None, :]"),
    "k_scale_of_first_head": _page("scores", "kv_head * K_SCALE_STRIDE", "kv_head * 0", "head_scale"),
    "v_scale_of_first_head": _page("online_softmax", "heads // GROUP_SIZE * V_SCALE_STRIDE", "heads * 0", "head_scale"),
    "qq_bias_one_column_more": _unified(
        "scores", "(columns < SIZE)", "(columns <= SIZE)", "qq_bias_small", changes={"causal": False}
    ),
    "qq_bias_one_column_before": _unified("scores", "(columns >= 0)", "(columns >= -1)", "qq_bias_small"),
    "qq_bias_transposed": _unified(
        "scores", "rows[:, None] * SIZE + columns[None, :]", "rows[:, None] + columns[None, :] * SIZE"
    ),
    "qq_bias_counts_context": _unified("attend", "keys - context, row_positions", "keys, row_positions"),
    # Softmax.
    "no_rescale": _page("attend", "acc * rescale[:, None], input", "acc, input", "peaked"),
    "maximum_unguarded": _unified(
        "online_softmax", 'tl.where(row_max == float("-inf"), 0.0, row_max)', "row_max", "far_below_zero"
    ),
    "maximum_of_masked_tile": _unified(
        "online_softmax", "return weights, rescale, new_max,", "return weights, rescale, pivot,", "far_below_zero"
    ),
    "sinks_twice": _page("online_softmax", "tl.exp2(sinks - pivot), rescale", "2.0 * tl.exp2(sinks - pivot), rescale"),
    "sinks_in_base_e": _page(
        "online_softmax",
        "in_base_2(tl.load(sink_ptr + heads, mask=mask, other=0.0).to(tl.float32))",
        "tl.load(sink_ptr + heads, mask=mask, other=0.0).to(tl.float32)",
    ),
    "lse_in_base_2": _page("online_softmax", "base2_lse(row_max, row_sum) * LN_2", "base2_lse(row_max, row_sum)"),
    "divided_twice": _page("online_softmax", "return acc / tl.where", "return acc / row_sum[:, None] / tl.where"),
    # Which keys.
    "nan_leak": _page("pages", "mask=in_range[:, None], other=0.0", "mask=None"),
    "stale_page_ids": _page("attend", "start + TILE.block_n, key_begin", "start, key_begin", "peaked"),
    "stale_page_ids_in_deep_pipeline": _unified(
        "attend",
        "load_page_ids(table_ptr, start, key_begin",
        "load_page_ids(table_ptr, begin, key_begin",
        "long_prompt",
        fields={"decode_num_stages": 5, "num_par_softmax_segments": 1},
    ),
    "tail_lost": _page("schedule", "tl.cdiv(key_end, BLOCK_N) - first", "key_end // BLOCK_N - first"),
    "window_begins_late": _page(
        "rows", "first_position - SCORING.window_left, 0", "first_position - SCORING.window_left + 1, 0"
    ),
    "window_begins_early": _page(
        "rows", "first_position - SCORING.window_left, 0", "first_position - SCORING.window_left - 1, 0"
    ),
    "future_key_visible": _unified(
        "rows",
        "tl.minimum(positions + (SCORING.window_right + 1), num_keys)",
        "positions + (SCORING.window_right + 2)",
    ),
    "right_window_one_narrower": _unified(
        "rows",
        "positions + (SCORING.window_right + 1)",
        "positions + SCORING.window_right",
        "bidirectional_both_sides",
    ),
    "diagonal_taken_for_whole": _unified(
        "rows", "whole_end = tl.minimum(first_position", "whole_end = tl.minimum(last_position"
    ),
    "window_edge_taken_for_whole": _unified(
        "rows", "whole_begin = tl.maximum(last_position", "whole_begin = tl.maximum(first_position"
    ),
    "tail_taken_for_whole": _unified("rows", "whole_end = num_keys\n", "whole_end = num_keys + 99\n", "bidirectional"),
    "context_of_zero": _unified("paged_attention", "context = num_keys - num_tokens", "context = num_keys * 0"),
    "context_one_too_long": _unified(
        "paged_attention", "context = num_keys - num_tokens", "context = num_keys - num_tokens + 1"
    ),
    "keys_of_first_token_only": _unified("rows", "(first_row + (NUM_ROWS - 1)) // QUERIES", "first_row // QUERIES"),
    # Which rows.
    "positions_from_tile": _unified(
        "paged_attention",
        "positions = context + tokens",
        "positions = context + tokens - first_row // QUERIES.group_size",
    ),
    "group_size_taken_for_power_of_two": _unified(
        "rows", "rows % QUERIES.group_size", "(rows & (QUERIES.group_size - 1))", "grok1"
    ),
    "rows_of_next_sequence_written": _unified("rows", "tokens < num_tokens", "tokens <= num_tokens"),
    "table_of_next_sequence": _unified("paged_attention", "clamp(segment - 1, 0,", "clamp(segment, 0,"),
    "trailing_padding_forgotten": _unified("schedule", "other=QUERIES.num_tokens", "other=0"),
    "class_of_many_begins_late": _unified(
        "schedule",
        "num_rows >= SCHEDULE.fewest_rows",
        "num_rows > SCHEDULE.fewest_rows",
        "class_boundary",
        changes={"num_q_heads": 2, "query_lens": (7, 17, 9, 1, 16)},
    ),
    "class_of_few_ends_early": _unified(
        "schedule", "num_rows <= SCHEDULE.most_rows", "num_rows < SCHEDULE.most_rows", "class_boundary"
    ),
    "tickets_for_one_head": _unified(
        "paged_attention", "ticket % QUERIES.num_kv_heads", "ticket % 1", "long_prompt", fields=SPLIT
    ),
    # Splits.
    "split_remainder_lost": _page(
        "schedule", " * split + tl.minimum(split, tiles % num_splits)", " * split", changes={"window": None}
    ),
    "splits_begin_before_window": _page(
        "schedule",
        "return first_tile + tile_begin,",
        "return tile_begin,",
        "window_splits",
        changes={"window": 40},
    ),
    "splits_end_before_window": _page("schedule", "first_tile + tile_end", "tile_end", "window_splits"),
    "natural_partial_lse": _page(
        "split_reduce", "base2_lse(row_max, row_sum), mask=row_mask", "base2_lse(row_max, row_sum) * 0.7, mask=row_mask"
    ),
    "last_split_lost": _page("split_reduce", "shares <= last_share)", "shares < last_share)", "window_splits"),
    "partials_not_normalised": _page("split_reduce", "divide_by_sum(acc, row_sum),", "acc,"),
    "maximum_unguarded_in_merge": _unified(
        "split_reduce",
        "pivot = guard(new_max)",
        "pivot = new_max",
        "long_prompt",
        fields=SPLIT,
        changes={"kv_lens": (40, 45, 18), "sinks": 0},
    ),
    "v_scale_forgotten_where_split": _page(
        "split_reduce",
        "v_scale_ptr,\n            out_ptr + tile_row",
        "None,\n            out_ptr + tile_row",
        "head_scale",
        changes={"num_splits": 3},
    ),
    "sinks_forgotten_where_split": _page(
        "split_reduce",
        "sink_ptr,\n            v_scale_ptr,\n            out_ptr + tile_row",
        "None,\n            v_scale_ptr,\n            out_ptr + tile_row",
    ),
    "sinks_in_every_split": KernelBug(
        "paged_attention",
        (
            ("import store_rows", "import add_sinks, store_rows"),
            ("import load_score_scale", "import LOG2_E, load_score_scale"),
            (
                "    else:\n        store_partial(",
                "    else:\n"
                "        if sink_ptr is not None:\n"
                "            sinks = tl.load(sink_ptr + heads, mask=row_mask, other=0.0) * LOG2_E\n"
                "            row_max, row_sum, factor = add_sinks(row_max, row_sum, sinks)\n"
                "            acc *= factor[:, None]\n"
                "        store_partial(",
            ),
        ),
        "page_attention",
        "sinks_splits",
    ),
    "first_rows_reduced_alone": _page(
        "split_reduce", "program % blocks * BLOCK_ROWS", "0", changes={"num_q_heads": 8, "num_kv_heads": 1}
    ),
    "partials_of_both_classes_in_one_place": _unified(
        "schedule", "return SCHEDULE.first_partial + number", "return number", "long_prompt", fields=SPLIT
    ),
    # Shares.
    "share_ends_with_its_first_row_tile": _page(
        "paged_attention", "done = end + cost + (SCHEDULE.unit - 1)", "done = position + share_length", **BALANCED
    ),
    "row_tile_begins_without_a_tile": _page(
        "schedule",
        "(begin + (SCHEDULE.unit - 1)) // share_length",
        "begin // share_length",
        changes=BALANCED["changes"] | {"query_lens": (1,) * 3, "kv_lens": (128, 97, 65)},
    ),
    "row_tile_ends_without_a_tile": _page(
        "schedule",
        "(end - 1) // share_length",
        "end // share_length",
        changes=BALANCED["changes"] | {"query_lens": (1, 1), "kv_lens": (96, 96)},
    ),
    "both_partials_of_a_share_in_one_place": _page(
        "schedule", "tl.where(share == first_share, SCHEDULE.num_shares, 0)", "0", **BALANCED
    ),
    "row_tiles_of_a_segment_far_apart": KernelBug(
        "schedule",
        (("begin += number * length", "begin += number * (length + SCHEDULE.unit)"),),
        "unified_attention",
        "long_prompt",
        changes={"query_lens": (1, 20, 2)},
    ),
    "shares_of_whole_batch_begin_at_zero": _page(
        "schedule", "share.to(SCHEDULE.line_type) * share_length - begin", "share * share_length", **BALANCED
    ),
    # Dense rows.
    "keys_before_the_range_read": _ragged(
        "paged_attention", "key_begin = tl.maximum(key_begin, first_key)", "key_begin += first_key * 0"
    ),
    "keys_before_the_range_visible": _ragged(
        "paged_attention", "row_begin = tl.maximum(row_begin, first_key)", "row_begin += first_key * 0"
    ),
    "window_forgotten_where_rows_begin": _ragged(
        "paged_attention",
        "row_begin = tl.maximum(row_begin, first_key)",
        "row_begin = row_begin * 0 + first_key",
        "everything",
    ),
    "range_edge_taken_for_whole": _ragged(
        "paged_attention",
        "whole_begin = tl.maximum(whole_begin, first_key)",
        "whole_begin += first_key * 0",
        fields={"skip_masks": True},
    ),
    "range_of_first_row": _ragged("schedule", "tl.load(begins_ptr + segments", "tl.load(begins_ptr + segments * 0"),
    "keys_of_first_row": _ragged(
        "paged_attention", "k_ptr += sequence.to(tl.int64) * CACHE.k_page_stride", "k_ptr += 0"
    ),
    "values_of_first_row": _ragged(
        "paged_attention", "v_ptr += sequence.to(tl.int64) * CACHE.v_page_stride", "v_ptr += 0"
    ),
    "ranges_unknown_to_the_reduction": KernelBug(
        "split_reduce",
        (
            (
                "measure_shares(lanes, starts_ptr, lens_ptr, begins_ptr,",
                "measure_shares(lanes, starts_ptr, lens_ptr, None,",
            ),
            ("line, lanes, starts_ptr, lens_ptr, begins_ptr,", "line, lanes, starts_ptr, lens_ptr, None,"),
        ),
        "ragged_decode_attention",
        "shared_sinks",
    ),
}
"""By name."""


@contextmanager
def planted(bug: KernelBug, folder: Path) -> Iterator[None]:
    """Within, the bridge launches kernels with the bug: those of a copy of `triton_kernels` in `folder`."""
    copy = folder / SOURCE.name
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    module = copy / f"{bug.module}.py"
    module.write_text(bug.applied_to(module.read_text()))
    right = _taken_out()
    sys.path.insert(0, str(folder))
    _forget()
    try:
        with mock.patch.multiple(
            interpreter, _widened=_amid(interpreter._widened), _unwritten=_amid(interpreter._unwritten)
        ):
            yield
    finally:
        sys.path.remove(str(folder))
        _taken_out()
        sys.modules.update(right)
        _forget()


def _amid(make: Any) -> Any:
    """`make`, whose arrays then lie in the middle of larger ones: kernels with a bug may leave them."""

    def made(of: Any) -> np.ndarray:
        array: np.ndarray = make(of)
        margin = max(4096, array.nbytes) // array.itemsize
        room = np.full(array.size + 2 * margin, 0, array.dtype)
        inner = room[margin : margin + array.size].reshape(array.shape)
        inner[...] = array
        return inner

    return made


def _taken_out() -> dict[str, Any]:
    """Removes the loaded modules of `triton_kernels`, and returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] == SOURCE.name]
    return {name: sys.modules.pop(name) for name in names}


def _forget() -> None:
    """Nothing imported or traced before is used again."""
    importlib.invalidate_caches()
    launch.kernels.cache_clear()
    jax.clear_caches()
