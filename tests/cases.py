"""Named shapes of real models, and the small problems that the tests derive from them.

`MODELS` is shared with `bench`: it imports nothing but the standard library.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

OPERATIONS = (
    "page_attention",
    "prefill_page_attention",
    "unified_attention",
    "ragged_decode_attention",
    "attention",
)
PAGED = OPERATIONS[:3]
NATIVE_LAYOUT = {"page_attention": "PHTD", "prefill_page_attention": "HPTD", "unified_attention": "PTHD"}
LAYOUTS = ("PTHD", "PHTD", "HPTD")
FLOATS = ("float32", "bfloat16", "float16")
QUANTISED = ("float8_e4m3fn", "float8_e5m2", "int8")

Window = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The attention layer of a model. Sizes are those of one device; `window` counts the token itself."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    page_size: int = 16
    softmax_scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None
    sinks: bool = False
    alibi: bool = False

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    def __str__(self) -> str:
        return self.name

    def small(self, max_kv_heads: int = 2, max_window: int = 128) -> Model:
        """The same layer at a size for a CPU: fewer KV heads and a shorter window; G, D, pages and features stay."""
        heads = min(self.num_kv_heads, max_kv_heads)
        window = self.window
        if window is not None and window > max_window:
            window = 24
        return dataclasses.replace(self, num_kv_heads=heads, num_q_heads=heads * self.group_size, window=window)


_MODELS = (
    Model(name="llama3_8b", num_q_heads=32, num_kv_heads=8, head_dim=128),
    Model(name="llama3_70b_tp8", num_q_heads=8, num_kv_heads=1, head_dim=128),
    Model(name="llama2_7b", num_q_heads=32, num_kv_heads=32, head_dim=128),
    Model(
        name="gemma2_9b",
        num_q_heads=16,
        num_kv_heads=8,
        head_dim=256,
        softmax_scale=256**-0.5,
        soft_cap=50.0,
        window=4096,
    ),
    Model(name="gpt_oss_20b", num_q_heads=64, num_kv_heads=8, head_dim=64, window=128, sinks=True),
    Model(name="mistral_7b", num_q_heads=32, num_kv_heads=8, head_dim=128, window=4096),
    Model(name="grok1", num_q_heads=48, num_kv_heads=8, head_dim=128, soft_cap=30.0),
    Model(name="falcon_7b", num_q_heads=71, num_kv_heads=1, head_dim=64),
    Model(name="phi2", num_q_heads=32, num_kv_heads=32, head_dim=80),
    Model(name="phi3_mini", num_q_heads=32, num_kv_heads=32, head_dim=96, page_size=32),
    Model(name="qwen2_7b", num_q_heads=28, num_kv_heads=4, head_dim=128),
    Model(name="bloom_7b", num_q_heads=32, num_kv_heads=32, head_dim=128, alibi=True),
    Model(name="mla_like", num_q_heads=16, num_kv_heads=16, head_dim=192, value_head_dim=128, page_size=64),
)
MODELS: dict[str, Model] = {model.name: model for model in _MODELS}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one operation: everything but the numbers, which `inputs.build` draws from a seed.

    `query_lens` and `kv_lens` hold one entry a sequence (paged) or a batch row (ragged: `kv_lens` are the lengths of
    ranges inside `dense_len`; attention: one query length and one KV length, repeated `batch` times).
    """

    name: str
    operation: str
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    value_head_dim: int | None = None
    query_lens: tuple[int, ...] = (1,)
    kv_lens: tuple[int, ...] = (40,)
    batch: int = 1
    dense_len: int = 64
    page_size: int = 16
    spare_pages: int = 3
    table_slack: int = 2
    page_order: Literal["shuffled", "shared", "duplicate"] = "shuffled"
    kv_layout: str | None = None
    dtype: str = "float32"
    cache_dtype: str | None = None
    index_dtype: str = "int32"
    softmax_scale: float | None = None
    soft_cap: float | None = None
    window: Window | None = None
    causal: bool = True
    alibi: bool = False
    qq_bias: int = 0
    """Side of the query-query bias; 0 is none."""
    sinks: int = 0
    """Sink logits a head; 0 is none, paged operations take 1."""
    shared_sinks: bool = False
    """Ragged and dense: sinks of shape [n] for all heads."""
    kv_scale: Literal["none", "scalar", "head"] = "none"
    bias: tuple[bool, bool, bool] | None = None
    """Dense: which of the axes B, Hq, Q of the bias have their full size; None is no bias."""
    mask: Literal["none", "shared", "heads", "segments", "lengths"] = "none"
    """Dense: a boolean mask for all heads or one a head, segments, or key lengths."""
    return_lse: bool = False
    return_weights: bool = False
    num_splits: int = 0
    max_context_len: int | None = None
    query_gain: float = 1.0
    negative_logits: bool = False
    leading_rows: int = 0
    trailing_rows: int = 0
    """Unified: padding rows before the first and behind the last sequence."""
    rank_four: bool = False
    """Ragged: query of shape [B, 1, Hq, D]."""

    def __str__(self) -> str:
        return self.name

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def value_dim(self) -> int:
        return self.value_head_dim or self.head_dim

    @property
    def stored_dtype(self) -> str:
        return self.cache_dtype or self.dtype

    @property
    def layout(self) -> str:
        return self.kv_layout or NATIVE_LAYOUT[self.operation]

    @property
    def features(self) -> frozenset[str]:
        """What the call asks for beyond plain attention, by the argument names of the operation."""
        cap = "attn_logits_soft_cap" if self.operation in PAGED[:2] else "logits_soft_cap"
        sink = "attention_sink" if self.operation in PAGED else "softmax_aux"
        asked = {
            cap: self.soft_cap is not None,
            sink: self.sinks > 0,
            "sliding_window": self.window is not None,
            "alibi_slopes": self.alibi,
            "qq_bias": self.qq_bias > 0,
            "k_scale": self.kv_scale != "none",
            "v_scale": self.kv_scale != "none",
            "bias": self.bias is not None,
            "mask_info": self.mask in ("shared", "heads"),
            "segments": self.mask == "segments",
            "key_lengths": self.mask == "lengths",
            "return_lse": self.return_lse,
            "return_weights": self.return_weights,
            "causal": not self.causal and self.operation == "unified_attention",
        }
        return frozenset(name for name, present in asked.items() if present)

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


_LENGTHS: dict[str, dict[str, Any]] = {
    "page_attention": {"query_lens": (1, 1, 1), "kv_lens": (0, 1, 97)},
    "prefill_page_attention": {"query_lens": (13,), "kv_lens": (45,)},
    "unified_attention": {
        "query_lens": (1, 0, 18, 5, 3),
        "kv_lens": (33, 7, 50, 5, 2),
        "leading_rows": 1,
        "trailing_rows": 2,
    },
    "ragged_decode_attention": {"query_lens": (1, 1, 1, 1), "kv_lens": (0, 1, 70, 33), "dense_len": 72},
    "attention": {"query_lens": (9,), "kv_lens": (37,), "batch": 2},
}


def _of_model(operation: str, model: Model) -> Case | None:
    small = model.small(max_window=128 if operation == "page_attention" else 24)
    alibi = small.alibi and operation in PAGED
    value_head_dim = small.value_head_dim if operation in ("unified_attention", "attention") else None
    window: Window | None = small.window
    if window is not None and not isinstance(window, tuple) and operation in ("ragged_decode_attention", "attention"):
        window = (window - 1, 0)
    case = Case(
        name=model.name,
        operation=operation,
        num_q_heads=small.num_q_heads,
        num_kv_heads=small.num_kv_heads,
        head_dim=small.head_dim,
        value_head_dim=value_head_dim,
        page_size=small.page_size,
        softmax_scale=small.softmax_scale,
        soft_cap=small.soft_cap,
        window=window,
        sinks=int(small.sinks),
        alibi=alibi,
        query_gain=6.0 if small.soft_cap else 1.0,
        causal=operation != "ragged_decode_attention",
        return_lse=operation != "attention",
    ).replace(**_LENGTHS[operation])
    if small.group_size > 32 and operation == "page_attention":
        case = case.replace(query_lens=(1,), kv_lens=(40,))
    if small.window and small.window >= 64:
        case = case.replace(kv_lens=(0, 128, 150))
    if small.window and operation == "attention":
        case = case.replace(query_lens=(37,))
    return case


MODEL_CASES: tuple[Case, ...] = tuple(
    case for operation in OPERATIONS for model in _MODELS if (case := _of_model(operation, model)) is not None
)


def _page(name: str, **changes: Any) -> Case:
    case = Case(name=name, operation="page_attention").replace(**(_LENGTHS["page_attention"] | changes))
    return case.replace(query_lens=(1,) * len(case.kv_lens))


def _prefill(name: str, **changes: Any) -> Case:
    return Case(name=name, operation="prefill_page_attention").replace(**(_LENGTHS["prefill_page_attention"] | changes))


def _unified(name: str, **changes: Any) -> Case:
    return Case(name=name, operation="unified_attention").replace(**(_LENGTHS["unified_attention"] | changes))


def _ragged(name: str, **changes: Any) -> Case:
    return Case(name=name, operation="ragged_decode_attention", causal=False).replace(
        **(_LENGTHS["ragged_decode_attention"] | changes)
    )


def _dense(name: str, **changes: Any) -> Case:
    return Case(name=name, operation="attention", causal=False).replace(**(_LENGTHS["attention"] | changes))


_EVERYTHING: dict[str, Any] = {
    "soft_cap": 3.0,
    "query_gain": 4.0,
    "window": 21,
    "sinks": 1,
    "return_lse": True,
}

EDGE_CASES: tuple[Case, ...] = (
    # Features together, each large enough to matter.
    _page("everything", alibi=True, num_splits=3, **_EVERYTHING),
    _page("cap_alibi", soft_cap=2.0, alibi=True, query_gain=4.0),
    _page("sinks_splits", sinks=1, num_splits=5, return_lse=True, kv_lens=(0, 3, 65, 150)),
    _page("window_splits", window=17, num_splits=7, return_lse=True, kv_lens=(16, 17, 18, 150)),
    _page("window_tuple", window=(9, 0)),
    _page("window_one", window=1, return_lse=True),
    _page("alibi_lse", alibi=True, return_lse=True, sinks=1),
    # Logits at the ends of the range.
    _page("cap_huge_logits", soft_cap=5.0, query_gain=3000.0, return_lse=True),
    _page("cap_beyond_logits", soft_cap=1e6, query_gain=4.0, return_lse=True),
    _page("far_below_zero", negative_logits=True, num_splits=4, return_lse=True, window=40),
    _page("peaked", query_gain=40.0, num_splits=2),
    # Shapes.
    _page("tile_edges", num_q_heads=2, num_kv_heads=1, kv_lens=(31, 32, 33, 63, 64, 65, 128, 129)),
    _page("page_one", page_size=1, kv_lens=(0, 1, 17, 50)),
    _page("page_odd", page_size=5, kv_lens=(4, 5, 6, 77)),
    _page("page_wide", page_size=144, kv_lens=(143, 145)),
    _page("head_dim_16", head_dim=16, num_q_heads=6, num_kv_heads=2),
    _page("head_dim_72", head_dim=72, num_q_heads=5, num_kv_heads=1),
    _page("head_dim_512", head_dim=512, num_q_heads=2, num_kv_heads=1, kv_lens=(0, 3, 20, 40)),
    _page("group_17", num_q_heads=17, num_kv_heads=1, kv_lens=(40,)),
    _page("fewer_pages_than_heads", num_q_heads=8, num_kv_heads=8, kv_lens=(3,), spare_pages=0),
    _page("shared_pages", page_order="shared", kv_lens=(70, 70, 33, 100)),
    _page("duplicate_pages", page_order="duplicate", kv_lens=(70, 70, 33, 100)),
    _page("bound", max_context_len=130, return_lse=True),
    _page("indices_uint8", index_dtype="uint8"),
    _page("scalar_scale", kv_scale="scalar", return_lse=True),
    _page("head_scale", kv_scale="head", sinks=1),
    _prefill("everything", alibi=True, **_EVERYTHING),
    _prefill("more_rows_than_keys", query_lens=(12,), kv_lens=(5,), sinks=1, return_lse=True),
    _prefill("no_keys", kv_lens=(0,), return_lse=True),
    _prefill("one_row", query_lens=(1,), kv_lens=(33,), window=16),
    _prefill("one_shot", query_lens=(40,), kv_lens=(40,), window=7, return_lse=True),
    _prefill("cap_alibi", soft_cap=2.0, alibi=True, query_gain=4.0),
    _prefill("window_tuple", window=(9, 0), page_size=5),
    _prefill("cap_huge_logits", soft_cap=5.0, query_gain=3000.0),
    _prefill("cap_beyond_logits", soft_cap=2e3, query_gain=4.0),
    _prefill("far_below_zero", negative_logits=True, return_lse=True, window=10),
    _prefill("duplicate_pages", page_order="duplicate", kv_lens=(90,)),
    _prefill("head_dim_72", head_dim=72, num_q_heads=5, num_kv_heads=1),
    _prefill("head_scale", kv_scale="head", return_lse=True),
    _unified("everything", alibi=True, qq_bias=18, **_EVERYTHING),
    _unified("qq_bias_small", qq_bias=4, soft_cap=2.0, query_gain=4.0),
    _unified("bidirectional", causal=False, return_lse=True),
    _unified("bidirectional_window", causal=False, window=9),
    _unified("bidirectional_both_sides", causal=False, window=(6, 3), return_lse=True),
    _unified("window_tuple", window=(9, 2)),
    _unified("one_token_each", query_lens=(1, 1, 1), kv_lens=(33, 0, 50), sinks=1, return_lse=True),
    _unified("alibi_sinks", alibi=True, sinks=1, return_lse=True),
    _unified("cap_huge_logits", soft_cap=5.0, query_gain=3000.0),
    _unified("cap_beyond_logits", soft_cap=1e8, query_gain=4.0),
    _unified("far_below_zero", negative_logits=True, return_lse=True, window=10),
    _unified("wide_values", head_dim=32, value_head_dim=48, return_lse=True),
    _unified("shared_pages", page_order="shared"),
    _unified("page_odd", page_size=5),
    _unified("head_scale", kv_scale="head"),
    _unified("long_prompt", query_lens=(1, 52, 2), kv_lens=(40, 60, 18), return_lse=True, sinks=1),
    _unified("class_boundary", query_lens=(7, 8, 9, 1, 16), kv_lens=(7, 30, 20, 40, 17), return_lse=True),
    _ragged("everything", **(_EVERYTHING | {"window": (20, 0), "sinks": 2})),
    _ragged("rank_four", rank_four=True, return_lse=True),
    _ragged("window_int", window=9),
    _ragged("window_right", window=(9, 5)),
    _ragged("shared_sinks", sinks=3, shared_sinks=True, return_lse=True),
    _ragged("cap_huge_logits", soft_cap=5.0, query_gain=3000.0),
    _ragged("cap_beyond_logits", soft_cap=1e20, query_gain=4.0),
    _ragged("far_below_zero", negative_logits=True, return_lse=True),
    _ragged("head_dim_72", head_dim=72, num_q_heads=5, num_kv_heads=1),
    _dense("causal", causal=True, query_lens=(37,)),
    _dense("everything", causal=True, query_lens=(30,), bias=(True, True, True), mask="shared", sinks=1,
           soft_cap=3.0, query_gain=4.0, window=11),
    _dense("bias_mask", bias=(False, True, True), mask="heads"),
    _dense("bias_row", bias=(True, False, False), soft_cap=2.0, query_gain=4.0),
    _dense("segments", mask="segments", query_lens=(37,)),
    _dense("segments_window", mask="segments", query_lens=(37,), causal=True, window=(6, 0)),
    _dense("lengths", mask="lengths", batch=3, sinks=1),
    _dense("lengths_causal", mask="lengths", batch=3, query_lens=(37,), causal=True, num_q_heads=6),
    _dense("rows_behind_keys", query_lens=(60,), kv_lens=(20,), window=(7, 3), soft_cap=3.0, query_gain=4.0),
    _dense("far_below_zero", negative_logits=True, query_lens=(30,), window=(9, 2)),
    _dense("head_dim_72", head_dim=72, num_q_heads=5, num_kv_heads=1, causal=True),
    _dense("window_both_sides", window=(5, 9), query_lens=(30,)),
    _dense("window_int", window=4, query_lens=(30,)),
    _dense("shared_sinks", sinks=3, shared_sinks=True),
    _dense("weights", return_weights=True, mask="shared", sinks=2),
    _dense("cap_huge_logits", soft_cap=5.0, query_gain=3000.0),
    _dense("cap_beyond_logits", soft_cap=1e5, query_gain=4.0),
    _dense("wide_values", value_head_dim=48, mask="shared"),
)  # fmt: skip

CASES: tuple[Case, ...] = MODEL_CASES + EDGE_CASES


_THOROUGH = ("llama3_8b", "gemma2_9b", "gpt_oss_20b")


def quantised(case: Case, cache_dtype: str, dtype: str = "bfloat16") -> Case:
    """The case over a cache of bytes, with a scale a KV head."""
    return case.replace(name=f"{case.name}-{cache_dtype}", dtype=dtype, cache_dtype=cache_dtype, kv_scale="head")


QUANTISED_CASES: tuple[Case, ...] = tuple(
    quantised(case, cache_dtype)
    for case in MODEL_CASES
    if case.operation in PAGED and case.name in ("llama3_8b", "gpt_oss_20b")
    for cache_dtype in QUANTISED
)


def matrix(full: bool = False) -> tuple[Case, ...]:
    """Every case in the dtypes that it is tested in: all of them if `full`.

    Otherwise three models meet them all, the others one in turn, edge cases float32 and every third a half type too: on
    a CPU the time goes into compiling.
    """
    floating = []
    for position, case in enumerate(CASES):
        dtypes: tuple[str, ...] = FLOATS
        if not full and case in EDGE_CASES:
            dtypes = ("float32", FLOATS[1 + position % 2]) if position % 3 == 0 else ("float32",)
            if case.operation == "unified_attention":  # float32 has no prefill tiles
                dtypes = ("float32", "float16")
        elif not full and case.name not in _THOROUGH:
            dtypes = (FLOATS[position % 3],)
        floating += [case.replace(name=f"{case.name}-{dtype}", dtype=dtype) for dtype in dtypes]
    return (*floating, *QUANTISED_CASES)
