"""Attention of packed sequences, decoding and prefilling at once, over a paged KV cache."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import reference
from jax_bridge import hopper_launch, launch, paged_candidates, paged_heuristics, paged_launch, tpu_launch
from jax_bridge.configs import UnifiedAttentionConfig
from jax_bridge.device import Device
from jax_bridge.operation import Implementation, Invocation, Operation, Outputs, window_argument
from jax_bridge.validation import FLOAT, Arguments, PagedOptions, paged_outputs


@dataclasses.dataclass(frozen=True)
class UnifiedAttentionOptions(PagedOptions):
    """Static arguments of `unified_attention`, normalised."""

    causal: bool


def _xla(invocation: Invocation, cfg: UnifiedAttentionConfig, device: Device | None) -> Outputs:
    del cfg, device
    arrays, options = invocation.arrays, invocation.options
    return reference.unified_attention(
        arrays["queries"],
        arrays["key_cache"],
        arrays["value_cache"],
        arrays["kv_lens"],
        arrays["block_tables"],
        arrays["query_start_loc"],
        softmax_scale=options.softmax_scale,
        causal=options.causal,
        sliding_window=window_argument(options.window),
        logits_soft_cap=options.soft_cap,
        alibi_slopes=arrays["alibi_slopes"],
        qq_bias=arrays["qq_bias"],
        attention_sink=arrays["attention_sink"],
        k_scale=arrays["k_scale"],
        v_scale=arrays["v_scale"],
        kv_layout=options.kv_layout,
        return_lse=options.return_lse,
    )


def _triton(invocation: Invocation, cfg: UnifiedAttentionConfig, device: Device) -> Outputs:
    sizes, options, arrays = invocation.sizes, invocation.options, dict(invocation.arrays)
    if sizes.num_seqs == 0:  # all rows are padding: the same as one sequence of no tokens
        sizes = dataclasses.replace(sizes, num_seqs=1)
        starts = arrays["query_start_loc"]
        arrays |= {
            "kv_lens": jnp.zeros(1, jnp.int32),
            "block_tables": jnp.zeros((1, sizes.table_width), jnp.int32),
            "query_start_loc": jnp.concatenate([starts, starts]),
        }
    classes = paged_heuristics.unified_attention_classes(cfg, sizes, invocation.arrays["queries"].dtype, device)

    def attend(arrays: paged_launch.Arrays) -> tuple[jax.Array, jax.Array | None]:
        operands = paged_launch.operands_of(
            arrays, query="queries", lengths="kv_lens", table="block_tables", starts=arrays["query_start_loc"]
        )
        call = paged_launch.PagedCall("unified_attention", operands, sizes, options, device, is_causal=options.causal)
        return call.attend(classes)

    out, lse = launch.kernel_operation("unified_attention[triton]", attend)(arrays)
    return (out, lse) if options.return_lse else out


_PALLAS_NAMES = tpu_launch.PagedNames("queries", "kv_lens", "block_tables", starts="query_start_loc")


def _pallas(invocation: Invocation, cfg: UnifiedAttentionConfig, device: Device | None) -> Outputs:
    del device
    blocks = tpu_launch.block_sizes(cfg, invocation.sizes.group_size)
    return tpu_launch.attend_pages(invocation, _PALLAS_NAMES, blocks, is_causal=invocation.options.causal)


def _pallas_lacks(invocation: Invocation) -> str | None:
    return tpu_launch.lacks(invocation, _PALLAS_NAMES)


def _triton_lacks(invocation: Invocation) -> str | None:
    return paged_launch.lacks(invocation.sizes, invocation.arrays["key_cache"].dtype)


_triton_heuristics = functools.partial(paged_heuristics.configuration, paged_heuristics.unified_attention_config)


def _triton_candidates(invocation: Invocation, device: Device) -> tuple[UnifiedAttentionConfig, ...]:
    arrays = invocation.arrays
    return tuple(
        candidate
        for heuristic in paged_candidates.heuristics_of_both_kernels(_triton_heuristics, invocation, device)
        for candidate in paged_candidates.unified_attention_candidates(
            invocation.sizes, arrays["queries"].dtype, arrays["key_cache"].dtype, heuristic, device
        )
    )


def _check_triton_cfg(invocation: Invocation, cfg: UnifiedAttentionConfig, device: Device) -> None:
    if not paged_heuristics.only_decodes(invocation.sizes):
        hopper_launch.check(invocation, cfg, device)


class UnifiedAttention(Operation):
    """The operation object of `unified_attention`."""

    name = "unified_attention"
    config_type = UnifiedAttentionConfig
    implementations: ClassVar[tuple[Implementation, ...]] = (
        Implementation(
            "triton",
            _triton,
            lacks=_triton_lacks,
            heuristic_cfg=_triton_heuristics,
            candidate_cfgs=_triton_candidates,
            is_available=launch.available,
            check_cfg=_check_triton_cfg,
        ),
        Implementation("pallas", _pallas, lacks=_pallas_lacks),
        Implementation("xla", _xla),
    )

    def invocation(
        self,
        queries: Any,
        key_cache: Any,
        value_cache: Any,
        kv_lens: Any,
        block_tables: Any,
        query_start_loc: Any,
        /,
        *,
        softmax_scale: float | None = None,
        causal: bool = True,
        sliding_window: int | Sequence[int] | None = None,
        logits_soft_cap: float | None = None,
        alibi_slopes: Any = None,
        qq_bias: Any = None,
        attention_sink: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        kv_layout: str = "PTHD",
        return_lse: bool = False,
    ) -> Invocation:
        """Check the arguments of `unified_attention`."""
        check = Arguments(self.name)
        layout = check.layout(kv_layout)
        check.array("queries", queries, ("T", "Hq", "D"), FLOAT)
        check.caches(key_cache, value_cache, layout, same_width=False)
        check.query_matches_cache("queries", queries, key_cache)
        check.heads("queries")
        kv_lens = check.index("kv_lens", kv_lens, ("S",))
        check.known("S + 1", check.sizes["S"] + 1, "kv_lens")
        arrays = {
            "queries": queries,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "kv_lens": kv_lens,
            "block_tables": check.index("block_tables", block_tables, ("S", "MP")),
            "query_start_loc": check.index("query_start_loc", query_start_loc, ("S + 1",)),
            "alibi_slopes": check.optional("alibi_slopes", alibi_slopes, ("Hq",)),
            "qq_bias": check.optional("qq_bias", qq_bias, ("Q", "Q")),
            "attention_sink": check.optional("attention_sink", attention_sink, ("Hq",)),
            "k_scale": check.kv_scale("k_scale", k_scale),
            "v_scale": check.kv_scale("v_scale", v_scale),
        }
        is_causal = check.flag("causal", causal)
        right = 0 if is_causal else None
        options = UnifiedAttentionOptions(
            softmax_scale=check.scale("softmax_scale", softmax_scale),
            soft_cap=check.soft_cap("logits_soft_cap", logits_soft_cap),
            window=check.window("sliding_window", sliding_window, from_width="width", right=right),
            kv_layout=layout,
            return_lse=check.flag("return_lse", return_lse),
            causal=is_causal,
        )
        return Invocation(self.name, arrays, options, check.paged_sizes("S", "T"))

    @staticmethod
    def outputs(invocation: Invocation) -> Any:
        """`[T, Hq, Dv]`, and the LSE `[T, Hq]` if asked for."""
        return paged_outputs(invocation.sizes, invocation.options, invocation.arrays["queries"].dtype)


_OPERATION = UnifiedAttention()


def unified_attention(
    queries: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    query_start_loc: jax.Array,
    /,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int | Sequence[int] | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    qq_bias: jax.Array | None = None,
    attention_sink: jax.Array | None = None,
    platform: str | None = None,
    cfg: UnifiedAttentionConfig | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    kv_layout: str = "PTHD",
    return_lse: bool = False,
) -> Any:
    """Attention of packed sequences over their pages; some may decode one token, others prefill many.

    Sequence `s` owns the rows `query_start_loc[s]` up to `query_start_loc[s + 1]`; its last row stands at position
    `kv_lens[s] - 1`.

    Args:
        queries: `[T, Hq, D]`, float32, float16 or bfloat16; rows that no sequence owns are answered with zeros.
        key_cache: `[P, ps, Hkv, D]` in the default layout, new tokens already written; the queries' dtype,
            float8_e4m3fn, float8_e5m2 or int8.
        value_cache: `[P, ps, Hkv, Dv]`, with the dtype of `key_cache`.
        kv_lens: integers `[S]`, tokens of each sequence: context and new ones.
        block_tables: integers `[S, MP]`, pages of each sequence in order; entries past its length are never used.
        query_start_loc: integers `[S + 1]`, not decreasing.
        softmax_scale: factor on the scores, `1 / sqrt(D)` by default; a static number.
        causal: whether a row sees no key after its own position.
        sliding_window: an int `W`: of the keys up to its own, a row sees the last `W`; a pair `(l, r)`: `l` before its
            own and `r` after.
        logits_soft_cap: `c` in `c * tanh(scores / c)`; None or 0 is off.
        alibi_slopes: `[Hq]`, added to the scores as `slope * (key position - query position)`.
        qq_bias: `[Q, Q]`, added to the scores between the new tokens of a sequence, by their places among them.
        attention_sink: `[Hq]`, a logit a head that joins the softmax without a value.
        platform: `"triton"`, `"pallas"`, `"xla"`, or `"auto"` (None): the best that supports the call.
        cfg: launch configuration; open fields are chosen.
        k_scale: factor on stored keys: a number, or an array `[1]` or `[Hkv]`.
        v_scale: factor on stored values, likewise.
        kv_layout: order of the cache's axes page, token, head, dim: `"PTHD"`, `"PHTD"` or `"HPTD"`.
        return_lse: also answer the natural logarithm of the softmax denominator.

    Returns:
        `[T, Hq, Dv]` in the queries' dtype; with `return_lse` a pair of it and the float32 LSE `[T, Hq]`. Rows without
        a key are zeros.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or values that do not fit.
        NotImplementedError: the platform does not support what is asked for.
    """
    return _OPERATION.run(
        queries,
        key_cache,
        value_cache,
        kv_lens,
        block_tables,
        query_start_loc,
        softmax_scale=softmax_scale,
        causal=causal,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        qq_bias=qq_bias,
        attention_sink=attention_sink,
        platform=platform,
        cfg=cfg,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        return_lse=return_lse,
    )
