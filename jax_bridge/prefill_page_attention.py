"""Attention of one chunk of one sequence over its pages: chunked prefill."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import reference
from jax_bridge import hopper_launch, launch, paged_candidates, paged_heuristics, paged_launch, tpu_launch
from jax_bridge.configs import PrefillPageAttentionConfig
from jax_bridge.device import Device
from jax_bridge.operation import Implementation, Invocation, Operation, Outputs, window_argument
from jax_bridge.sharding import HEADS, cache_axes, scale_axes, shard_map_wrapper
from jax_bridge.validation import DEFAULT_MASK_VALUE, FLOAT, Arguments, PagedOptions, paged_outputs


def _xla(invocation: Invocation, cfg: PrefillPageAttentionConfig, device: Device | None) -> Outputs:
    del cfg, device
    arrays, options = invocation.arrays, invocation.options
    return reference.prefill_page_attention(
        arrays["query"],
        arrays["key_cache"],
        arrays["value_cache"],
        arrays["context_len"],
        arrays["page_indices"],
        softmax_scale=options.softmax_scale,
        attn_logits_soft_cap=options.soft_cap,
        sliding_window=window_argument(options.window),
        attention_sink=arrays["attention_sink"],
        alibi_slopes=arrays["alibi_slopes"],
        k_scale=arrays["k_scale"],
        v_scale=arrays["v_scale"],
        kv_layout=options.kv_layout,
        return_lse=options.return_lse,
    )


def _triton(invocation: Invocation, cfg: PrefillPageAttentionConfig, device: Device) -> Outputs:
    sizes, options = invocation.sizes, invocation.options

    def attend(arrays: paged_launch.Arrays) -> tuple[jax.Array, jax.Array | None]:
        operands = paged_launch.operands_of(
            arrays,
            query="query",
            lengths="context_len",
            table="page_indices",
            starts=jnp.array([0, sizes.num_tokens], jnp.int32),
        )
        call = paged_launch.PagedCall("prefill_page_attention", operands, sizes, options, device)
        return call.attend(paged_heuristics.prefill_page_attention_classes(cfg, sizes, device))

    out, lse = launch.kernel_operation("prefill_page_attention[triton]", attend)(dict(invocation.arrays))
    return (out, lse) if options.return_lse else out


_PALLAS_NAMES = tpu_launch.PagedNames("query", "context_len", "page_indices")


def _pallas(invocation: Invocation, cfg: PrefillPageAttentionConfig, device: Device | None) -> Outputs:
    del device
    blocks = tpu_launch.block_sizes(cfg, invocation.sizes.group_size)
    return tpu_launch.attend_pages(invocation, _PALLAS_NAMES, blocks)


def _pallas_lacks(invocation: Invocation) -> str | None:
    return tpu_launch.lacks(invocation, _PALLAS_NAMES)


def _triton_lacks(invocation: Invocation) -> str | None:
    return paged_launch.lacks(invocation.sizes, invocation.arrays["key_cache"].dtype)


_triton_heuristics = functools.partial(paged_heuristics.configuration, paged_heuristics.prefill_page_attention_config)


def _triton_candidates(invocation: Invocation, device: Device) -> tuple[PrefillPageAttentionConfig, ...]:
    return tuple(
        candidate
        for heuristic in paged_candidates.heuristics_of_both_kernels(_triton_heuristics, invocation, device)
        for candidate in paged_candidates.prefill_page_attention_candidates(
            invocation.sizes, invocation.arrays["key_cache"].dtype, heuristic, device
        )
    )


class PrefillPageAttention(Operation):
    """The operation object of `prefill_page_attention`."""

    name = "prefill_page_attention"
    config_type = PrefillPageAttentionConfig
    implementations: ClassVar[tuple[Implementation, ...]] = (
        Implementation(
            "triton",
            _triton,
            lacks=_triton_lacks,
            heuristic_cfg=_triton_heuristics,
            candidate_cfgs=_triton_candidates,
            is_available=launch.available,
            check_cfg=hopper_launch.check,
        ),
        Implementation("pallas", _pallas, lacks=_pallas_lacks),
        Implementation("xla", _xla),
    )

    def invocation(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        context_len: Any,
        page_indices: Any,
        /,
        *,
        softmax_scale: float | None = None,
        mask_value: float = DEFAULT_MASK_VALUE,
        attn_logits_soft_cap: float | None = None,
        sliding_window: int | Sequence[int] | None = None,
        attention_sink: Any = None,
        alibi_slopes: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        kv_layout: str = "HPTD",
        return_lse: bool = False,
    ) -> Invocation:
        """Check the arguments of `prefill_page_attention`."""
        check = Arguments(self.name)
        layout = check.layout(kv_layout)
        check.array("query", query, ("C", "Hq", "D"), FLOAT)
        check.caches(key_cache, value_cache, layout, same_width=True)
        check.query_matches_cache("query", query, key_cache)
        check.heads("query")
        arrays = {
            "query": query,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "context_len": check.length("context_len", context_len),
            "page_indices": check.index("page_indices", page_indices, ("MP",)),
            "attention_sink": check.optional("attention_sink", attention_sink, ("Hq",)),
            "alibi_slopes": check.optional("alibi_slopes", alibi_slopes, ("Hq",)),
            "k_scale": check.kv_scale("k_scale", k_scale),
            "v_scale": check.kv_scale("v_scale", v_scale),
        }
        check.mask_value("mask_value", mask_value)
        options = PagedOptions(
            softmax_scale=check.scale("softmax_scale", softmax_scale),
            soft_cap=check.soft_cap("attn_logits_soft_cap", attn_logits_soft_cap),
            window=check.window("sliding_window", sliding_window, from_width="width", right=0),
            kv_layout=layout,
            return_lse=check.flag("return_lse", return_lse),
        )
        return Invocation(self.name, arrays, options, check.paged_sizes(1, "C"))

    @staticmethod
    def outputs(invocation: Invocation) -> Any:
        """`[C, Hq, D]`, and the LSE `[C, Hq]` if asked for."""
        return paged_outputs(invocation.sizes, invocation.options, invocation.arrays["query"].dtype)

    def create_shard_map_wrapper(
        self,
        query: jax.Array,
        key_cache: jax.Array,
        value_cache: jax.Array,
        context_len: jax.Array | int,
        page_indices: jax.Array,
        /,
        *,
        mesh: Any,
        in_specs: Any,
        out_specs: Any,
        platform: str | None = None,
        cfg: PrefillPageAttentionConfig | None = None,
        **options: Any,
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The operation under `jax.shard_map`, sharded over heads, and the arrays to call it with.

        Args:
            query: as in `prefill_page_attention`, and so the other arrays.
            key_cache: likewise.
            value_cache: likewise.
            context_len: likewise.
            page_indices: likewise.
            mesh: the mesh.
            in_specs: a `PartitionSpec` for every array argument in order; absent ones may be left out.
            out_specs: a `PartitionSpec`; with `return_lse` a pair of them.
            platform: as in `prefill_page_attention`.
            cfg: likewise.
            **options: the other arguments of `prefill_page_attention`.

        Returns:
            `(function, arrays)` so that `function(*arrays)` is the result.

        Raises:
            ValueError: the specs do not fit the arrays, disagree, or shard an axis whose parts depend on one another.
        """
        invocation = self.invocation(query, key_cache, value_cache, context_len, page_indices, **options)
        cache = cache_axes(invocation.options.kv_layout)
        axes: Mapping[str, tuple[str, ...]] = {
            "query": ("C", HEADS, "D"),
            "key_cache": cache,
            "value_cache": cache,
            "context_len": ("1",) * invocation.arrays["context_len"].ndim,
            "page_indices": ("MP",),
            "attention_sink": (HEADS,),
            "alibi_slopes": (HEADS,),
            "k_scale": scale_axes(invocation, "k_scale"),
            "v_scale": scale_axes(invocation, "v_scale"),
        }
        return shard_map_wrapper(
            self,
            invocation,
            axes,
            (("C", HEADS, "D"), ("C", HEADS)),
            5,
            options,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            platform=platform,
            cfg=cfg,
        )


_OPERATION = PrefillPageAttention()


def prefill_page_attention(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    context_len: jax.Array | int,
    page_indices: jax.Array,
    /,
    *,
    softmax_scale: float | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | Sequence[int] | None = None,
    platform: str | None = None,
    cfg: PrefillPageAttentionConfig | None = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    attention_sink: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    kv_layout: str = "HPTD",
    return_lse: bool = False,
) -> Any:
    """Causal attention of one chunk of one sequence over its pages.

    The chunk is right-aligned: row `i` stands at position `context_len - C + i`.

    Args:
        query: `[C, Hq, D]`, float32, float16 or bfloat16.
        key_cache: `[Hkv, P, ps, D]` in the default layout, the chunk already written; the query's dtype, float8_e4m3fn,
            float8_e5m2 or int8.
        value_cache: as `key_cache`, with the same dtype.
        context_len: integer `[1]` or scalar, tokens including this chunk; it may be traced.
        page_indices: integers `[MP]`, pages of the sequence in order; entries past its length are never used.
        softmax_scale: factor on the scores, `1 / sqrt(D)` by default; a static number.
        mask_value: accepted for compatibility; masked keys have weight 0 whatever it is.
        attn_logits_soft_cap: `c` in `c * tanh(scores / c)`; None or 0 is off.
        sliding_window: an int `W`: the last `W` tokens, the row's own included; a pair `(l, r)`: it and `l` before.
        platform: `"triton"`, `"pallas"`, `"xla"`, or `"auto"` (None): the best that supports the call.
        cfg: launch configuration; open fields are chosen.
        mesh: runs under `jax.shard_map` over this mesh; `in_specs` and `out_specs` are needed then.
        in_specs: a `PartitionSpec` for every array argument in order; only heads may be sharded.
        out_specs: a `PartitionSpec`; with `return_lse` a pair of them.
        attention_sink: `[Hq]`, a logit a head that joins the softmax without a value.
        alibi_slopes: `[Hq]`, added to the scores as `slope * (key position - query position)`.
        k_scale: factor on stored keys: a number, or an array `[1]` or `[Hkv]`.
        v_scale: factor on stored values, likewise.
        kv_layout: order of the cache's axes page, token, head, dim: `"PTHD"`, `"PHTD"` or `"HPTD"`.
        return_lse: also answer the natural logarithm of the softmax denominator.

    Returns:
        `[C, Hq, D]` in the query's dtype; with `return_lse` a pair of it and the float32 LSE `[C, Hq]`. Rows without a
        key are zeros.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or values that do not fit.
        NotImplementedError: the platform does not support what is asked for.
    """
    return _OPERATION.run(
        query,
        key_cache,
        value_cache,
        context_len,
        page_indices,
        softmax_scale=softmax_scale,
        mask_value=mask_value,
        attn_logits_soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        platform=platform,
        cfg=cfg,
        attention_sink=attention_sink,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        return_lse=return_lse,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
    )
