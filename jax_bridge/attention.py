"""Dense attention with masks, biases, sinks and dropout."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import reference
from jax_bridge import cudnn, dense_launch, launch
from jax_bridge.configs import AttentionConfig
from jax_bridge.dense_launch import AttentionOptions, DenseSizes
from jax_bridge.device import Device
from jax_bridge.masks import MaskInfo
from jax_bridge.operation import Implementation, Invocation, Operation, Outputs, window_argument
from jax_bridge.validation import ANY_FLOAT, BOOLEAN, FLOAT, INDEX, Arguments, describe

_MASKS = ("mask", "q_segment_ids", "kv_segment_ids", "key_lengths")


def _xla(invocation: Invocation, cfg: AttentionConfig, device: Device | None) -> Outputs:
    del cfg, device
    arrays, options, sizes = invocation.arrays, invocation.options, invocation.sizes
    mask = arrays["mask"]
    if arrays["q_segment_ids"] is not None:
        mask = MaskInfo.from_segments(arrays["q_segment_ids"], arrays["kv_segment_ids"]).get_or_compute_attention_mask()
    elif arrays["key_lengths"] is not None:
        lengths = MaskInfo.from_key_lengths(arrays["key_lengths"], sizes.q_len, sizes.kv_len)
        mask = lengths.get_or_compute_attention_mask()
    return reference.attention(
        arrays["query"],
        arrays["key"],
        arrays["value"],
        arrays["bias"],
        arrays["dropout_rng"],
        arrays["softmax_aux"],
        mask=mask,
        deterministic=options.dropout_prob == 0,
        softmax_scale=options.softmax_scale,
        logits_soft_cap=options.soft_cap,
        dtype=options.dtype,
        softmax_dtype=options.softmax_dtype,
        dropout_prob=options.dropout_prob,
        causal=options.causal,
        sliding_window=window_argument(options.window),
        return_weights=options.return_weights,
    )


def _triton(invocation: Invocation, cfg: AttentionConfig, device: Device) -> Outputs:
    sizes, options = invocation.sizes, invocation.options
    if sizes.kv_len == 0:
        return jnp.zeros((*invocation.arrays["query"].shape[:3], sizes.value_head_dim), options.dtype)

    def attend(arrays: Any) -> jax.Array:
        return dense_launch.attend(arrays, sizes, options, cfg, device)

    out: jax.Array = launch.kernel_operation("attention[triton]", attend)(dict(invocation.arrays))
    return out


def _triton_lacks(invocation: Invocation) -> str | None:
    return dense_launch.lacks(invocation.arrays, invocation.sizes, invocation.options)


def _triton_heuristics(invocation: Invocation, device: Device) -> AttentionConfig:
    has_segments = invocation.arrays["q_segment_ids"] is not None
    return dense_launch.heuristic_cfg(invocation.sizes, invocation.options, device, has_segments=has_segments)


def _triton_candidates(invocation: Invocation, device: Device) -> tuple[AttentionConfig, ...]:
    has_segments = invocation.arrays["q_segment_ids"] is not None
    return dense_launch.candidate_cfgs(invocation.sizes, invocation.options, device, has_segments=has_segments)


def _cuda(invocation: Invocation, cfg: AttentionConfig, device: Device | None) -> Outputs:
    del cfg, device
    sizes, options = invocation.sizes, invocation.options
    if sizes.kv_len == 0:
        return jnp.zeros((*invocation.arrays["query"].shape[:3], sizes.value_head_dim), options.dtype)
    return cudnn.attend(invocation.arrays, sizes, options)


def _cuda_lacks(invocation: Invocation) -> str | None:
    return cudnn.lacks(invocation.arrays, invocation.sizes, invocation.options)


class Attention(Operation):
    """The operation object of `attention`."""

    name = "attention"
    config_type = AttentionConfig
    implementations: ClassVar[tuple[Implementation, ...]] = (
        Implementation(
            "triton",
            _triton,
            lacks=_triton_lacks,
            heuristic_cfg=_triton_heuristics,
            candidate_cfgs=_triton_candidates,
            is_available=launch.available,
        ),
        Implementation("cuda", _cuda, lacks=_cuda_lacks),
        Implementation("xla", _xla),
    )

    def invocation(
        self,
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        dropout_rng: Any = None,
        softmax_aux: Any = None,
        /,
        *,
        mask_info: Any = None,
        init_bias: Callable[[], Any] | None = None,
        deterministic: bool = True,
        softmax_scale: float | None = None,
        logits_soft_cap: float | None = None,
        dtype: DTypeLike | None = jnp.bfloat16,
        softmax_dtype: DTypeLike | None = None,
        dropout_prob: float = 0.0,
        causal: bool = False,
        sliding_window: int | Sequence[int] | None = None,
        return_weights: bool = False,
    ) -> Invocation:
        """Check the arguments of `attention`; takes the mask out of `mask_info` and the bias out of `init_bias`."""
        check = Arguments(self.name)
        check.array("query", query, ("B", "Q", "Hq", "D"), ANY_FLOAT)
        check.array("key", key, ("B", "K", "Hkv", "D"), ANY_FLOAT)
        check.array("value", value, ("B", "K", "Hkv", "Dv"), ANY_FLOAT)
        group_size = check.heads("query")
        check.not_empty("D", "Dv")
        init_bias = check.by("init_bias", init_bias, _checked_function)
        bias_argument = "bias"
        if callable(init_bias) and bias is None and mask_info is None:
            bias, bias_argument = init_bias(), "init_bias()"
        probability = check.number("dropout_prob", dropout_prob, minimum=0.0, below=1.0)
        if check.flag("deterministic", deterministic):
            probability = 0.0
        if dropout_rng is not None or probability > 0:
            dropout_rng = check.by("dropout_rng", dropout_rng, _checked_rng)
        is_causal = check.flag("causal", causal)
        right = 0 if is_causal else None
        dtype = query.dtype if dtype is None else dtype
        softmax_dtype = "float32" if softmax_dtype is None else softmax_dtype
        options = AttentionOptions(
            softmax_scale=check.scale("softmax_scale", softmax_scale),
            soft_cap=check.soft_cap("logits_soft_cap", logits_soft_cap),
            window=check.window("sliding_window", sliding_window, from_width="radius", right=right),
            causal=is_causal,
            dtype=check.by("dtype", dtype, _checked_dtype),
            softmax_dtype=check.by("softmax_dtype", softmax_dtype, _checked_dtype),
            dropout_prob=probability,
            return_weights=check.flag("return_weights", return_weights),
        )
        arrays = {
            "query": query,
            "key": key,
            "value": value,
            "bias": None if bias is None else check.by(bias_argument, bias, _checked_bias),
            "dropout_rng": dropout_rng if probability > 0 else None,
            "softmax_aux": check.sinks("softmax_aux", softmax_aux, ANY_FLOAT),
            **check.by("mask_info", mask_info, _checked_mask),
        }
        sizes = check.sizes
        dense = DenseSizes(
            batch=sizes["B"],
            q_len=sizes["Q"],
            kv_len=sizes["K"],
            num_q_heads=sizes["Hq"],
            num_kv_heads=sizes["Hkv"],
            group_size=group_size,
            head_dim=sizes["D"],
            value_head_dim=sizes["Dv"],
        )
        return Invocation(self.name, arrays, options, dense)

    @staticmethod
    def outputs(invocation: Invocation) -> Any:
        """`[B, Q, Hq, Dv]`, and the weights `[B, Hq, Q, K]` if asked for."""
        sizes, options = invocation.sizes, invocation.options
        shape = (sizes.batch, sizes.q_len, sizes.num_q_heads, sizes.value_head_dim)
        out = jax.ShapeDtypeStruct(shape, options.dtype)
        if not options.return_weights:
            return out
        return out, jax.ShapeDtypeStruct((sizes.batch, sizes.num_q_heads, sizes.q_len, sizes.kv_len), options.dtype)


def _checked_function(check: Arguments, argument: str, function: Any) -> Any:
    if function is not None and not callable(function):
        raise check.type_error(argument, f"is {describe(function)}", "a function without arguments or None")
    return function


def _checked_rng(check: Arguments, argument: str, rng: Any) -> Any:
    if rng is None:
        raise check.value_error(argument, "is None", "a random key, as deterministic=False and dropout_prob > 0")
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
    is_key = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    is_raw_key = dtype == jnp.uint32 and shape == jax.eval_shape(jax.random.PRNGKey, 0).shape
    if not is_key and not is_raw_key:
        raise check.type_error(argument, f"is {describe(rng)}", "one random key of jax.random")
    return rng


def _checked_bias(check: Arguments, argument: str, bias: Any) -> Any:
    shape, dtype = getattr(bias, "shape", None), getattr(bias, "dtype", None)
    full = tuple(check.sizes[axis] for axis in ("B", "Hq", "Q", "K"))
    expected = f"an array broadcastable to [B, Hq, Q, K] = {full}"
    if shape is None or dtype is None:
        raise check.type_error(argument, f"is {describe(bias)}", expected)
    if not ANY_FLOAT.accepts(dtype):
        raise check.type_error(argument, f"has dtype {dtype}", ANY_FLOAT.expected)
    fits = len(shape) <= 4 and all(size in (1, limit) for size, limit in zip(shape[::-1], full[::-1], strict=False))
    if not fits:
        raise check.value_error(argument, f"has shape {tuple(shape)}", expected)
    return bias


def _checked_mask(check: Arguments, argument: str, mask_info: Any) -> dict[str, Any]:
    """The mask, or the segments or lengths of a `MaskInfo` that has none, by name."""
    masks: dict[str, Any] = dict.fromkeys(_MASKS)
    if mask_info is None:
        return masks
    is_ours = type(mask_info) is MaskInfo and mask_info.attention_mask is None
    if is_ours and mask_info.key_lengths is not None:
        lengths = check.index(f"{argument}.key_lengths", mask_info.key_lengths, ("B",))
        for axis, length in (("Q", mask_info.q_len), ("K", mask_info.kv_len)):
            if length != check.sizes[axis]:
                got = f"stands for a mask of {axis} = {length}"
                raise check.value_error(argument, got, f"{axis} = {check.sizes[axis]} as in the other arrays")
        return masks | {"key_lengths": lengths}
    if is_ours and mask_info.q_segment_ids is not None and mask_info.kv_segment_ids is not None:
        return masks | {
            "q_segment_ids": check.array(f"{argument}.q_segment_ids", mask_info.q_segment_ids, ("B", "Q"), INDEX),
            "kv_segment_ids": check.array(f"{argument}.kv_segment_ids", mask_info.kv_segment_ids, ("B", "K"), INDEX),
        }
    compute = getattr(mask_info, "get_or_compute_attention_mask", None)
    if not callable(compute):
        expected = "a MaskInfo or another object with get_or_compute_attention_mask()"
        raise check.type_error(argument, f"is {describe(mask_info)}", expected)
    mask = compute()
    if mask is None:
        got = "answers None from get_or_compute_attention_mask()"
        raise check.type_error(argument, got, "a boolean mask [B, 1 or Hq, Q, K], or mask_info=None")
    shape = tuple(getattr(mask, "shape", ()))
    heads = "1" if shape[1:2] == (1,) else "Hq"
    return masks | {"mask": check.array(argument, mask, ("B", heads, "Q", "K"), BOOLEAN)}


def _checked_dtype(check: Arguments, argument: str, dtype: Any) -> Any:
    expected = f"one of {FLOAT.expected}, or None"
    try:
        checked = jnp.dtype(dtype)
    except TypeError:
        raise check.type_error(argument, f"is {dtype!r}", expected) from None
    if not FLOAT.accepts(checked):
        raise check.type_error(argument, f"is {checked}", expected)
    return jax.dtypes.canonicalize_dtype(checked)


_OPERATION = Attention()


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    dropout_rng: jax.Array | None = None,
    softmax_aux: jax.Array | None = None,
    /,
    *,
    mask_info: Any = None,
    init_bias: Callable[[], jax.Array] | None = None,
    deterministic: bool = True,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    dtype: DTypeLike | None = jnp.bfloat16,
    softmax_dtype: DTypeLike | None = None,
    dropout_prob: float = 0.0,
    causal: bool = False,
    sliding_window: int | Sequence[int] | None = None,
    platform: str | None = None,
    cfg: AttentionConfig | None = None,
    return_weights: bool = False,
) -> Any:
    """Dense attention.

    On `triton` a flash kernel, forward only, whose memory does not grow with `Q * K`: for calls without bias, boolean
    mask, dropout and weights. On `cuda` cuDNN, for the calls that it answers exactly (docs/compatibility.md). On `xla`
    everything, with all scores at once. `xla` and `cuda` are differentiable; `"auto"` differentiates `xla`.

    Args:
        query: `[B, Q, Hq, D]`, any floating dtype.
        key: `[B, K, Hkv, D]`.
        value: `[B, K, Hkv, Dv]`.
        bias: broadcastable to `[B, Hq, Q, K]`, added to the scores after scale and cap; -inf hides a key.
        dropout_rng: random key, needed for dropout.
        softmax_aux: sink logits that join the softmax without a value: `[n]` for every head (`[Hq]`: one a head), or
            `[Hq, n]`.
        mask_info: a `MaskInfo` of a mask, of segments or of key lengths, or any object whose
            `get_or_compute_attention_mask()` answers bool `[B, 1 or Hq, Q, K]`, True = may attend; it adds to the bias.
        init_bias: makes the bias; called only where neither `bias` nor `mask_info` is given.
        deterministic: whether dropout is off.
        softmax_scale: factor on the scores, `1 / sqrt(D)` by default; a static number.
        logits_soft_cap: `c` in `c * tanh(scores / c)`; None or 0 is off.
        dtype: what query, key and value are cast to first, and the dtype of the results; None is the query's.
        softmax_dtype: dtype of the softmax; float32 by default.
        dropout_prob: share of the weights that dropout drops, in [0, 1).
        causal: whether row `i` sees no key after `i`, both counted from the first.
        sliding_window: a pair `(l, r)`: the `l` keys before the row's own and the `r` after it; an int `W` is `(W, W)`.
        platform: `"triton"`, `"xla"`, `"cuda"`, or `"auto"` (None): the best that supports the call.
        cfg: launch configuration; open fields are chosen.
        return_weights: also answer the weights, as dropout left them.

    Returns:
        `[B, Q, Hq, Dv]`; with `return_weights` a pair of it and the weights `[B, Hq, Q, K]`. Rows without a key
        are zeros.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or values that do not fit.
        NotImplementedError: the platform does not support what is asked for.
    """
    return _OPERATION.run(
        query,
        key,
        value,
        bias,
        dropout_rng,
        softmax_aux,
        mask_info=mask_info,
        init_bias=init_bias,
        deterministic=deterministic,
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        dtype=dtype,
        softmax_dtype=softmax_dtype,
        dropout_prob=dropout_prob,
        causal=causal,
        sliding_window=sliding_window,
        platform=platform,
        cfg=cfg,
        return_weights=return_weights,
    )
