"""Attention of one token a sequence over a paged KV cache: decoding."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

import reference
from jax_bridge import launch, paged_candidates, paged_heuristics, paged_launch, tpu_launch
from jax_bridge.configs import PageAttentionConfig
from jax_bridge.device import Device
from jax_bridge.operation import Implementation, Invocation, Operation, Outputs, window_argument
from jax_bridge.validation import DEFAULT_MASK_VALUE, FLOAT, Arguments, PagedOptions, paged_outputs


@dataclasses.dataclass(frozen=True)
class PageAttentionOptions(PagedOptions):
    """Static arguments of `page_attention`, normalised."""

    num_splits: int = 0
    max_context_len: int | None = None
    pages_per_compute_block: int | None = None
    megacore_mode: str | None = None
    inline_seq_dim: bool = True


def tpu_hint(invocation: Invocation) -> str | None:
    """Words for the first argument given that only the TPU port has, or None; every other platform lacks it."""
    options = invocation.options
    given = {
        "pages_per_compute_block": options.pages_per_compute_block is not None,
        "megacore_mode": options.megacore_mode is not None,
        "inline_seq_dim=False": not options.inline_seq_dim,
    }
    return next((f'{hint}, which belongs to platform="pallas"' for hint, is_given in given.items() if is_given), None)


def _xla(invocation: Invocation, cfg: PageAttentionConfig, device: Device | None) -> Outputs:
    del cfg, device
    arrays, options = invocation.arrays, invocation.options
    return reference.page_attention(
        arrays["query"],
        arrays["key_cache"],
        arrays["value_cache"],
        arrays["context_lens"],
        arrays["block_tables"],
        options.softmax_scale,
        attn_logits_soft_cap=options.soft_cap,
        sliding_window=window_argument(options.window),
        attention_sink=arrays["attention_sink"],
        alibi_slopes=arrays["alibi_slopes"],
        k_scale=arrays["k_scale"],
        v_scale=arrays["v_scale"],
        kv_layout=options.kv_layout,
        return_lse=options.return_lse,
    )


def _triton(invocation: Invocation, cfg: PageAttentionConfig, device: Device) -> Outputs:
    sizes, options = invocation.sizes, invocation.options
    if options.num_splits:
        cfg = dataclasses.replace(cfg, num_splits=options.num_splits)

    def attend(arrays: paged_launch.Arrays) -> tuple[jax.Array, jax.Array | None]:
        operands = paged_launch.operands_of(
            arrays, query="query", lengths="context_lens", table="block_tables", starts=None
        )
        call = paged_launch.PagedCall(
            "page_attention", operands, sizes, options, device, max_keys=options.max_context_len
        )
        return call.attend(paged_heuristics.page_attention_classes(cfg))

    out, lse = launch.kernel_operation("page_attention[triton]", attend)(dict(invocation.arrays))
    return (out, lse) if options.return_lse else out


_PALLAS_NAMES = tpu_launch.PagedNames("query", "context_lens", "block_tables", is_packed=False)


def _pallas_blocks(invocation: Invocation, cfg: PageAttentionConfig) -> tpu_launch.BlockSizes:
    pages = invocation.options.pages_per_compute_block
    if pages is None:
        return tpu_launch.BlockSizes(keys=cfg.block_n, source="cfg.block_n")
    return tpu_launch.BlockSizes(keys=pages * invocation.sizes.page_size, source="pages_per_compute_block")


def _pallas(invocation: Invocation, cfg: PageAttentionConfig, device: Device | None) -> Outputs:
    del device
    return tpu_launch.attend_pages(invocation, _PALLAS_NAMES, _pallas_blocks(invocation, cfg))


def _pallas_lacks(invocation: Invocation) -> str | None:
    return tpu_launch.lacks(invocation, _PALLAS_NAMES, _pallas_blocks(invocation, PageAttentionConfig()))


def _triton_lacks(invocation: Invocation) -> str | None:
    return tpu_hint(invocation) or paged_launch.lacks(invocation.sizes, invocation.arrays["key_cache"].dtype)


def _triton_heuristics(invocation: Invocation, device: Device) -> PageAttentionConfig:
    arrays = invocation.arrays
    return paged_heuristics.page_attention_config(
        invocation.sizes, arrays["query"].dtype, arrays["key_cache"].dtype, device
    )


def _triton_candidates(invocation: Invocation, device: Device) -> tuple[PageAttentionConfig, ...]:
    heuristic = _triton_heuristics(invocation, device)
    return paged_candidates.page_attention_candidates(
        invocation.sizes, invocation.arrays["key_cache"].dtype, heuristic, device
    )


class PageAttention(Operation):
    """The operation object of `page_attention`."""

    name = "page_attention"
    config_type = PageAttentionConfig
    implementations: ClassVar[tuple[Implementation, ...]] = (
        Implementation(
            "triton",
            _triton,
            lacks=_triton_lacks,
            heuristic_cfg=_triton_heuristics,
            candidate_cfgs=_triton_candidates,
            is_available=launch.available,
        ),
        Implementation("pallas", _pallas, lacks=_pallas_lacks),
        Implementation("xla", _xla, lacks=tpu_hint),
    )

    def invocation(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        context_lens: Any,
        block_tables: Any,
        attn_scale: float | None = None,
        max_context_len: int | None = None,
        num_splits: int = 0,
        *,
        mask_value: float = DEFAULT_MASK_VALUE,
        attn_logits_soft_cap: float | None = None,
        pages_per_compute_block: int | None = None,
        megacore_mode: str | None = None,
        inline_seq_dim: bool = True,
        sliding_window: int | Sequence[int] | None = None,
        attention_sink: Any = None,
        alibi_slopes: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        kv_layout: str = "PHTD",
        return_lse: bool = False,
    ) -> Invocation:
        """Check the arguments of `page_attention`."""
        check = Arguments(self.name)
        layout = check.layout(kv_layout)
        check.array("query", query, ("S", "Hq", "D"), FLOAT)
        check.caches(key_cache, value_cache, layout, same_width=True)
        check.query_matches_cache("query", query, key_cache)
        check.heads("query")
        arrays = {
            "query": query,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "context_lens": check.index("context_lens", context_lens, ("S",)),
            "block_tables": check.index("block_tables", block_tables, ("S", "MP")),
            "attention_sink": check.optional("attention_sink", attention_sink, ("Hq",)),
            "alibi_slopes": check.optional("alibi_slopes", alibi_slopes, ("Hq",)),
            "k_scale": check.kv_scale("k_scale", k_scale),
            "v_scale": check.kv_scale("v_scale", v_scale),
        }
        check.mask_value("mask_value", mask_value)
        check.choice("megacore_mode", megacore_mode, ("kv_head", "batch"))
        options = PageAttentionOptions(
            softmax_scale=check.scale("attn_scale", attn_scale),
            soft_cap=check.soft_cap("attn_logits_soft_cap", attn_logits_soft_cap),
            window=check.window("sliding_window", sliding_window, from_width="width", right=0),
            kv_layout=layout,
            return_lse=check.flag("return_lse", return_lse),
            num_splits=check.integer("num_splits", num_splits, minimum=0),
            max_context_len=check.optional_integer("max_context_len", max_context_len, minimum=0),
            pages_per_compute_block=check.optional_integer(
                "pages_per_compute_block", pages_per_compute_block, minimum=1
            ),
            megacore_mode=megacore_mode,
            inline_seq_dim=check.flag("inline_seq_dim", inline_seq_dim),
        )
        return Invocation(self.name, arrays, options, check.paged_sizes("S", "S"))

    @staticmethod
    def outputs(invocation: Invocation) -> Any:
        """`[S, Hq, D]`, and the LSE `[S, Hq]` if asked for."""
        return paged_outputs(invocation.sizes, invocation.options, invocation.arrays["query"].dtype)


_OPERATION = PageAttention()


def page_attention(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    context_lens: jax.Array,
    block_tables: jax.Array,
    attn_scale: float | None = None,
    max_context_len: int | None = None,
    num_splits: int = 0,
    *,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int | None = None,
    megacore_mode: str | None = None,
    inline_seq_dim: bool = True,
    sliding_window: int | Sequence[int] | None = None,
    platform: str | None = None,
    cfg: PageAttentionConfig | None = None,
    attention_sink: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    kv_layout: str = "PHTD",
    return_lse: bool = False,
) -> Any:
    """Attention of the newest token of each sequence over its pages.

    The token of sequence `s` stands at position `context_lens[s] - 1` and sees itself and what came before.

    Args:
        query: `[S, Hq, D]`, float32, float16 or bfloat16; one token a sequence.
        key_cache: `[P, Hkv, ps, D]` in the default layout; the query's dtype, float8_e4m3fn, float8_e5m2 or int8.
        value_cache: as `key_cache`, with the same dtype.
        context_lens: integers `[S]`, tokens of each sequence including the newest; 0 for an idle row.
        block_tables: integers `[S, MP]`, pages of each sequence in order; entries past its length are never used.
        attn_scale: factor on the scores, `1 / sqrt(D)` by default; a static number.
        max_context_len: tokens that no length exceeds, by promise, which shortens the launch; `MP * ps` by default.
        num_splits: pieces that the keys of a sequence are divided into; 0 chooses. Never changes a result.
        mask_value: accepted for compatibility; masked keys have weight 0 whatever it is.
        attn_logits_soft_cap: `c` in `c * tanh(scores / c)`; None or 0 is off.
        pages_per_compute_block: for the TPU port only.
        megacore_mode: for the TPU port only; `"kv_head"` or `"batch"`.
        inline_seq_dim: for the TPU port only; False is refused elsewhere.
        sliding_window: an int `W`: the last `W` tokens, the newest included; a pair `(l, r)`: it and `l` before.
        platform: `"triton"`, `"pallas"`, `"xla"`, or `"auto"` (None): the best that supports the call.
        cfg: launch configuration; open fields are chosen.
        attention_sink: `[Hq]`, a logit a head that joins the softmax without a value.
        alibi_slopes: `[Hq]`, added to the scores as `slope * (key position - query position)`.
        k_scale: factor on stored keys: a number, or an array `[1]` or `[Hkv]`.
        v_scale: factor on stored values, likewise.
        kv_layout: order of the cache's axes page, token, head, dim: `"PTHD"`, `"PHTD"` or `"HPTD"`.
        return_lse: also answer the natural logarithm of the softmax denominator.

    Returns:
        `[S, Hq, D]` in the query's dtype; with `return_lse` a pair of it and the float32 LSE `[S, Hq]`, -inf for a row
        without keys and sinks.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or values that do not fit.
        NotImplementedError: the platform does not support what is asked for.
    """
    return _OPERATION.run(
        query,
        key_cache,
        value_cache,
        context_lens,
        block_tables,
        attn_scale,
        max_context_len,
        num_splits,
        mask_value=mask_value,
        attn_logits_soft_cap=attn_logits_soft_cap,
        pages_per_compute_block=pages_per_compute_block,
        megacore_mode=megacore_mode,
        inline_seq_dim=inline_seq_dim,
        sliding_window=sliding_window,
        platform=platform,
        cfg=cfg,
        attention_sink=attention_sink,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        return_lse=return_lse,
    )
