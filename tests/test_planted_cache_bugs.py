"""Bugs planted in the kernels that write caches and merge states: the problem of each bug notices it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.cache_problems import MergeCase, WriteCase, check_rounding
from tests.implementations import ON_GPU
from tests.planted_kernels import KernelBug, planted

if ON_GPU:
    pytest.skip("planted bugs say nothing about a GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("small_device")


def _write(**fields: Any) -> Callable[[], None]:
    # No slots so far outside that a kernel which follows them would leave the memory around the caches.
    return functools.partial(WriteCase(**{"kv_layout": "HPTD", "outside": (), **fields}).check, "triton")


def _round(cache_dtype: str) -> Callable[[], None]:
    return functools.partial(check_rounding, "triton", cache_dtype)


def _merge(**fields: Any) -> Callable[[], None]:
    return functools.partial(MergeCase(**fields).check, "triton")


SCALED = {"cache_dtype": "int8", "scale": "head"}

BUGS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "negative_slots_written": ("kv_pages", "(slots >= 0) & ", "", _write()),
    "slots_beyond_the_cache_written": ("kv_pages", "PAGE_SIZE < NUM_PAGES", "PAGE_SIZE <= NUM_PAGES", _write()),
    "tokens_beyond_the_last_written": ("kv_pages", "mask=tokens < NUM_TOKENS, other=-1", "mask=None", _write()),
    "place_in_page_from_slot": ("kv_pages", "(slots % PAGE_SIZE)", "slots", _write(kv_layout="PHTD")),
    "heads_next_to_each_other": ("kv_pages", ".to(tl.int64) * ROWS.head_stride", " * ROWS.head_dim", _write()),
    "features_beyond_the_last_written": (
        "kv_pages",
        "tile_mask & (features < num_features)[None, :]",
        "tile_mask",
        _write(kv_layout="PTHD", num_kv_heads=3),
    ),
    "values_in_blocks_of_keys": ("kv_pages", "block - k_blocks, V_ROWS", "block, V_ROWS", _write()),
    "scale_of_first_head": ("kv_pages", "heads * ROWS.scale_stride", "heads * 0", _write(**SCALED)),
    "scale_of_keys_for_values": ("kv_pages", "v_scale_ptr, value_cache", "k_scale_ptr, value_cache", _write(**SCALED)),
    "scale_multiplied": (
        "kv_pages",
        "tl.div_rn(values.to(tl.float32), tl.broadcast_to(scales[None, :], values.shape))",
        "values.to(tl.float32) * scales[None, :]",
        _write(**SCALED),
    ),
    "wrapped_round": (
        "kv_pages",
        "tl.clamp(values, ROWS.format.lowest, ROWS.format.largest, propagate_nan=tl.PropagateNan.ALL)",
        "values",
        _write(**SCALED),
    ),
    "nan_saturated": (
        "kv_pages",
        ", propagate_nan=tl.PropagateNan.ALL",
        "",
        _round("float8_e5m2"),
    ),
    "rounded_by_the_conversion": (
        "kv_pages",
        "if ROWS.format.mantissa_bits is not None:",
        "if False:",
        _round("float8_e5m2"),
    ),
    "subnormals_rounded_too_finely": (
        "kv_pages",
        "tl.maximum(binade, FORMAT.smallest_normal)",
        "binade",
        _round("float8_e4m3fn"),
    ),
    "a_bit_less": (
        "kv_pages",
        "2.0 ** (23 - FORMAT.mantissa_bits))",
        "2.0 ** (24 - FORMAT.mantissa_bits))",
        _round("int8"),
    ),
    "sign_lost": ("kv_pages", "(rounded | (bits ^ magnitude))", "rounded", _round("float8_e4m3fn")),
    "nan_becomes_a_number": ("kv_pages", "nan, rounded)", "rounded, rounded)", _round("float8_e4m3fn")),
    "pivot_unguarded": ("states", "guard(tl.maximum(lse_a, lse_b))", "tl.maximum(lse_a, lse_b)", _merge()),
    "lse_in_base_2": ("states", "base2_lse(0.0, total) * LN_2", "base2_lse(0.0, total)", _merge()),
    "share_in_base_2": ("states", "(lse_b - pivot) * LOG2_E", "(lse_b - pivot)", _merge()),
    "base_changed_too_early": (
        "states",
        "tl.exp2((lse_a - pivot) * LOG2_E)",
        "tl.exp2(lse_a * LOG2_E - pivot * LOG2_E)",
        _merge(),
    ),
    "nan_beside_no_share": ("states", "mask & (share_a != 0.0)[:, None]", "mask", _merge()),
    "shares_not_divided": ("states", "out_b, total)", "out_b, total * 0.0)", _merge()),
    "one_part_twice": ("states", "tl.load(out_b_ptr + offsets", "tl.load(out_a_ptr + offsets", _merge()),
    "first_dims_only": ("states", "start + tl.arange(0, BLOCK_D)", "tl.arange(0, BLOCK_D)", _merge(head_dim=320)),
}
"""Module, text, what it is replaced by, and the problem that must notice."""


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_noticed(name: str, tmp_path: Path) -> None:
    module, right, wrong, problem = BUGS[name]
    with planted(KernelBug(module, ((right, wrong),), "", ""), tmp_path), pytest.raises(AssertionError):
        problem()


def test_nothing_planted_nothing_noticed() -> None:
    for problem in {repr(bug[3]): bug[3] for bug in BUGS.values()}.values():
        problem()
