"""Bugs for the Triton kernels: wrong device functions, to stand in for the right ones in the interpreter."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from types import ModuleType
from typing import Any

import triton
import triton.language as tl

from triton_kernels import attend, online_softmax, page_attention, schedule, split_reduce
from triton_kernels import pages as pages_module
from triton_kernels.scores import LN_2, LOG2_E

right_base2_lse = online_softmax.base2_lse
right_count_splits = schedule.count_splits
right_load_page_ids = pages_module.load_page_ids
right_online_softmax = online_softmax.online_softmax
right_add_sinks = online_softmax.add_sinks
right_tile_range = schedule.tile_range
right_visible_keys = schedule.visible_keys


@triton.jit
def _hide_one_too_few(scores, keys, row_begin, row_end):
    visible = (keys[None, :] >= row_begin[:, None]) & (keys[None, :] <= row_end[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _hide_one_too_many(scores, keys, row_begin, row_end):
    visible = (keys[None, :] > row_begin[:, None]) & (keys[None, :] < row_end[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _hide_with_finite_value(scores, keys, row_begin, row_end):
    visible = (keys[None, :] >= row_begin[:, None]) & (keys[None, :] < row_end[:, None])
    return tl.where(visible, scores, -1.0)


@triton.jit
def _no_cap(scores, CAP: tl.constexpr):
    return scores


@triton.jit
def _alibi_mirrored(slopes, keys, positions):
    return slopes[:, None] * (positions[:, None] - keys[None, :]).to(tl.float32)


@triton.jit
def _load_everything(cache_ptr, offsets, in_range, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    return tl.load(cache_ptr + offsets[:, None] + dims[None, :], mask=(dims < SIZE)[None, :], other=0.0)


@triton.jit
def _stale_page_ids(table_ptr, start, key_begin, key_end, CACHE: tl.constexpr, BLOCK_N: tl.constexpr):
    first = key_begin // BLOCK_N * BLOCK_N
    return right_load_page_ids(table_ptr, first, key_begin, key_end, CACHE, BLOCK_N)


@triton.jit
def _no_rescale(scores, unit, row_max, row_sum):
    weights, rescale, new_max, new_sum = right_online_softmax(scores, unit, row_max, row_sum)
    return weights, tl.where(rescale == 0.0, 0.0, 1.0), new_max, new_sum


@triton.jit
def _sinks_twice(row_max, row_sum, sinks):
    return right_add_sinks(row_max, row_sum, sinks + 1.0)


@triton.jit
def _sinks_in_base_e(row_max, row_sum, sinks):
    return right_add_sinks(row_max, row_sum, sinks / LOG2_E)


@triton.jit
def _natural_lse(row_max, row_sum):
    return right_base2_lse(row_max, row_sum) * LN_2


@triton.jit
def _last_split_lost(tiles, quota, SCHEDULE: tl.constexpr):
    return tl.maximum(right_count_splits(tiles, quota, SCHEDULE) - 1, 0)


@triton.jit
def _last_tile_lost(key_begin, key_end, BLOCK_N: tl.constexpr):
    first, tiles = right_tile_range(key_begin, key_end, BLOCK_N)
    return first, tl.maximum(tiles - 1, 0)


@triton.jit
def _window_one_wider(length, MAX_KEYS: tl.constexpr, WINDOW_LEFT: tl.constexpr):
    begin, end = right_visible_keys(length, MAX_KEYS, WINDOW_LEFT)
    return tl.maximum(begin - 1, 0), end


@triton.jit
def _window_one_narrower(length, MAX_KEYS: tl.constexpr, WINDOW_LEFT: tl.constexpr):
    begin, end = right_visible_keys(length, MAX_KEYS, WINDOW_LEFT)
    return tl.where(begin > 0, begin + 1, begin), end


@triton.jit
def _not_normalised(acc, row_sum):
    return acc


@triton.jit
def _divided_twice(acc, row_sum):
    total = tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
    return acc / total / total


KERNEL_BUGS: dict[str, tuple[ModuleType, str, Any]] = {
    "hide_one_too_few": (attend, "hide", _hide_one_too_few),
    "hide_one_too_many": (attend, "hide", _hide_one_too_many),
    "hide_with_finite_value": (attend, "hide", _hide_with_finite_value),
    "no_cap": (attend, "soft_cap", _no_cap),
    "alibi_mirrored": (attend, "alibi", _alibi_mirrored),
    "nan_leak": (attend, "load_tile", _load_everything),
    "stale_page_ids": (attend, "load_page_ids", _stale_page_ids),
    "no_rescale": (attend, "online_softmax", _no_rescale),
    "sinks_twice": (online_softmax, "add_sinks", _sinks_twice),
    "sinks_in_base_e": (online_softmax, "add_sinks", _sinks_in_base_e),
    "lse_in_base_2": (online_softmax, "LN_2", tl.constexpr(1.0)),
    "natural_partial_lse": (page_attention, "base2_lse", _natural_lse),
    "last_split_lost": (split_reduce, "count_splits", _last_split_lost),
    "last_tile_lost": (page_attention, "tile_range", _last_tile_lost),
    "window_one_wider": (page_attention, "visible_keys", _window_one_wider),
    "window_one_narrower": (page_attention, "visible_keys", _window_one_narrower),
    "partials_not_normalised": (page_attention, "divide_by_sum", _not_normalised),
    "divided_twice": (online_softmax, "divide_by_sum", _divided_twice),
}
"""By name: the module that calls the function, the name it calls, the wrong function."""
