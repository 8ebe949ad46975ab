"""Attention of one token a row over a range of that row's dense keys."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import reference
from jax_bridge import launch, ragged_launch, tpu_launch
from jax_bridge.configs import RaggedDecodeAttentionConfig
from jax_bridge.device import Device, current_device
from jax_bridge.operation import Implementation, Invocation, Operation, Outputs, window_argument
from jax_bridge.sharding import BATCH, HEADS, shard_map_wrapper
from jax_bridge.validation import ANY_FLOAT, FLOAT, Arguments, Window


@dataclasses.dataclass(frozen=True)
class RaggedDecodeOptions:
    """Static arguments of `ragged_decode_attention`, normalised.

    Attributes:
        softmax_scale: factor on the scores.
        soft_cap: None for off, never 0.
        window: bounds `(left, 0)` around `end - 1`, or None.
        return_lse: whether the LSE is answered too.
        has_query_axis: whether the query is `[B, 1, Hq, D]`; implementations answer in three axes.
    """

    softmax_scale: float
    soft_cap: float | None
    window: Window | None
    return_lse: bool
    has_query_axis: bool


@dataclasses.dataclass(frozen=True)
class RaggedSizes:
    """Sizes of one call; `kv_len` is `L`, the rest as in `PagedSizes`."""

    batch: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    value_head_dim: int


def in_three_axes(call: Callable[[Invocation, Any, Any], Outputs]) -> Callable[..., Outputs]:
    """An implementation for queries `[B, Hq, D]` as one that also takes `[B, 1, Hq, D]`."""

    def adapted(invocation: Invocation, cfg: Any, device: Device | None) -> Outputs:
        if not invocation.options.has_query_axis:
            return call(invocation, cfg, device)
        arrays = {**invocation.arrays, "query": invocation.arrays["query"][:, 0]}
        answers = call(dataclasses.replace(invocation, arrays=arrays), cfg, device)
        return jax.tree.map(lambda answer: answer[:, None], answers)

    return adapted


def _xla(invocation: Invocation, cfg: RaggedDecodeAttentionConfig, device: Device | None) -> Outputs:
    del cfg, device
    arrays, options = invocation.arrays, invocation.options
    return reference.ragged_decode_attention(
        arrays["query"],
        arrays["key"],
        arrays["value"],
        arrays["sequence_start"],
        arrays["sequence_end"],
        arrays["softmax_aux"],
        softmax_scale=options.softmax_scale,
        sliding_window=window_argument(options.window),
        logits_soft_cap=options.soft_cap,
        return_lse=options.return_lse,
    )


def _pallas(invocation: Invocation, cfg: RaggedDecodeAttentionConfig, device: Device | None) -> Outputs:
    del device
    keys = None if cfg.fwd_params is None else cfg.fwd_params.kv_blocksize
    return tpu_launch.attend_rows(invocation, tpu_launch.BlockSizes(keys=keys, source="cfg.fwd_params.kv_blocksize"))


class RaggedDecodeAttention(Operation):
    """The operation object of `ragged_decode_attention`."""

    name = "ragged_decode_attention"
    config_type = RaggedDecodeAttentionConfig
    implementations = (
        Implementation(
            "triton",
            in_three_axes(ragged_launch.attend_rows),
            lacks=ragged_launch.lacks,
            heuristic_cfg=ragged_launch.heuristic_cfg,
            candidate_cfgs=ragged_launch.candidate_cfgs,
            is_available=launch.available,
        ),
        Implementation("pallas", in_three_axes(_pallas), lacks=tpu_launch.ragged_lacks),
        Implementation("xla", in_three_axes(_xla)),
    )

    def invocation(
        self,
        query: Any,
        key: Any,
        value: Any,
        sequence_start: Any,
        sequence_end: Any,
        softmax_aux: Any = None,
        /,
        *,
        softmax_scale: float | None = None,
        sliding_window: int | Sequence[int] | None = None,
        logits_soft_cap: float | None = None,
        return_lse: bool = False,
    ) -> Invocation:
        """Check the arguments of `ragged_decode_attention`."""
        check = Arguments(self.name)
        has_query_axis = len(getattr(query, "shape", ())) == 4
        check.array("query", query, ("B", "Q", "Hq", "D") if has_query_axis else ("B", "Hq", "D"), FLOAT)
        if has_query_axis and check.sizes["Q"] != 1:
            raise check.value_error("query", f"has shape {tuple(query.shape)}", "[B, Hq, D] or [B, 1, Hq, D]")
        check.array("key", key, ("B", "L", "Hkv", "D"), FLOAT)
        check.values("value", value, ("B", "L", "Hkv", "Dv"), FLOAT, same_width=True)
        check.same_dtype("key", key, "query", query)
        check.same_dtype("value", value, "query", query)
        group_size = check.heads("query")
        check.not_empty("D")
        arrays = {
            "query": query,
            "key": key,
            "value": value,
            "sequence_start": check.index("sequence_start", sequence_start, ("B",)),
            "sequence_end": check.index("sequence_end", sequence_end, ("B",)),
            "softmax_aux": check.sinks("softmax_aux", softmax_aux, ANY_FLOAT),
        }
        options = RaggedDecodeOptions(
            softmax_scale=check.scale("softmax_scale", softmax_scale),
            soft_cap=check.soft_cap("logits_soft_cap", logits_soft_cap),
            window=check.window("sliding_window", sliding_window, from_width="width", right=0),
            return_lse=check.flag("return_lse", return_lse),
            has_query_axis=has_query_axis,
        )
        sizes = check.sizes
        ragged = RaggedSizes(
            sizes["B"],
            sizes["L"],
            sizes["Hq"],
            sizes["Hkv"],
            group_size,
            head_dim=sizes["D"],
            value_head_dim=sizes["Dv"],
        )
        return Invocation(self.name, arrays, options, ragged)

    @staticmethod
    def outputs(invocation: Invocation) -> Any:
        """The query's shape, and the LSE without its last axis if asked for."""
        query = invocation.arrays["query"]
        out = jax.ShapeDtypeStruct((*query.shape[:-1], invocation.sizes.value_head_dim), query.dtype)
        return (out, jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32)) if invocation.options.return_lse else out

    def candidate_cfgs_gpu(self, invocation: Invocation) -> tuple[RaggedDecodeAttentionConfig, ...]:
        """The configurations worth timing on the GPU at hand or the target device; none if `triton` lacks the call."""
        row = self.implementation("triton")
        if row is None or row.missing(invocation) is not None:
            return ()
        return ragged_launch.candidate_cfgs(invocation, current_device())

    def create_shard_map_wrapper(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        sequence_start: jax.Array,
        sequence_end: jax.Array,
        softmax_aux: jax.Array | None = None,
        /,
        *,
        mesh: Any,
        in_specs: Any,
        out_specs: Any,
        platform: str | None = None,
        cfg: RaggedDecodeAttentionConfig | None = None,
        **options: Any,
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The operation under `jax.shard_map`, sharded over batch or heads, and the arrays to call it with.

        Args:
            query: as in `ragged_decode_attention`, and so the other arrays.
            key: likewise.
            value: likewise.
            sequence_start: likewise.
            sequence_end: likewise.
            softmax_aux: likewise.
            mesh: the mesh.
            in_specs: a `PartitionSpec` for every array argument in order; without one for an absent `softmax_aux`.
            out_specs: a `PartitionSpec`; with `return_lse` a pair of them.
            platform: as in `ragged_decode_attention`.
            cfg: likewise.
            **options: the other arguments of `ragged_decode_attention`.

        Returns:
            `(function, arrays)` so that `function(*arrays)` is the result.

        Raises:
            ValueError: the specs do not fit the arrays, disagree, or shard an axis whose parts depend on one another.
        """
        invocation = self.invocation(query, key, value, sequence_start, sequence_end, softmax_aux, **options)
        rows = (BATCH, "1", HEADS) if invocation.options.has_query_axis else (BATCH, HEADS)
        axes: Mapping[str, tuple[str, ...]] = {
            "query": (*rows, "D"),
            "key": (BATCH, "L", HEADS, "D"),
            "value": (BATCH, "L", HEADS, "D"),
            "sequence_start": (BATCH,),
            "sequence_end": (BATCH,),
            "softmax_aux": (HEADS, "n") if getattr(softmax_aux, "ndim", 0) == 2 else ("n",),
        }
        return shard_map_wrapper(
            self,
            invocation,
            axes,
            ((*rows, "D"), rows),
            6,
            options,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            platform=platform,
            cfg=cfg,
        )


_OPERATION = RaggedDecodeAttention()


def ragged_decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sequence_start: jax.Array,
    sequence_end: jax.Array,
    softmax_aux: jax.Array | None = None,
    /,
    *,
    softmax_scale: float | None = None,
    sliding_window: int | Sequence[int] | None = None,
    logits_soft_cap: float | None = None,
    platform: str | None = None,
    cfg: RaggedDecodeAttentionConfig | None = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention of one token a row over the keys `[start, end)` of that row; the token stands at `end - 1`.

    Args:
        query: `[B, Hq, D]` or `[B, 1, Hq, D]`, float32, float16 or bfloat16; answered in the same rank.
        key: `[B, L, Hkv, D]`, of the query's dtype; what lies outside the range may hold anything.
        value: `[B, L, Hkv, D]`, likewise.
        sequence_start: integers `[B]`, first position that a row sees.
        sequence_end: integers `[B]`, one past the last; at or before the start for a row without keys.
        softmax_aux: sink logits that join the softmax without a value: `[n]` for every head, or `[Hq, n]`.
        softmax_scale: factor on the scores, `1 / sqrt(D)` by default; a static number.
        sliding_window: a pair `(l, r)`: the token and `l` before it; an int `W` is `(W - 1, 0)`.
        logits_soft_cap: `c` in `c * tanh(scores / c)`; None or 0 is off.
        platform: `"triton"`, `"pallas"`, `"xla"`, or `"auto"` (None): the best that supports the call.
        cfg: launch configuration; open fields are chosen.
        mesh: runs under `jax.shard_map` over this mesh; `in_specs` and `out_specs` are needed then.
        in_specs: a `PartitionSpec` for every array argument in order; only batch and heads may be sharded.
        out_specs: a `PartitionSpec`; with `return_lse` a pair of them.
        return_lse: also answer the natural logarithm of the softmax denominator.

    Returns:
        An array like `query`; with `return_lse` a pair of it and the float32 LSE `[B, Hq]` (`[B, 1, Hq]`). Rows without
        a key are zeros.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or values that do not fit.
        NotImplementedError: the platform does not support what is asked for.
    """
    return _OPERATION.run(
        query,
        key,
        value,
        sequence_start,
        sequence_end,
        softmax_aux,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        platform=platform,
        cfg=cfg,
        return_lse=return_lse,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
    )
