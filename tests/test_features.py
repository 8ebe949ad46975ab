"""Every operation on every platform with every optional argument is right or refused: the table of platforms."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bridge.configs import PLATFORMS
from jax_bridge.registry import OPERATIONS as OBJECTS
from tests.small_calls import OPERATIONS, arguments, optional_arrays, parameters, run
from tests.test_ignored_arguments import CHANGES, ELSEWHERE, HINTS, equal_axes

pytestmark = pytest.mark.usefixtures("small_device")

TPU_HINTS: dict[str, Any] = {"pages_per_compute_block": 2, "megacore_mode": "batch", "inline_seq_dim": False}
SKIPPED = ELSEWHERE - TPU_HINTS.keys() | {"platform"}
OTHERS: dict[str, Any] = {
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "int8 cache": jnp.int8,
    "float8_e5m2 cache": jnp.float8_e5m2,
}


def features(operation: str) -> list[str]:
    """The optional arguments, and the dtypes beside float32."""
    names = [name for name in parameters(operation) if name not in arguments(operation) and name not in SKIPPED]
    has_cache = "key_cache" in parameters(operation)
    return ["nothing", *names, *(name for name in OTHERS if has_cache or not name.endswith("cache"))]


def asked(operation: str, feature: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and options of a call with `feature`."""
    named: dict[str, Any] = arguments(operation)
    if operation == "attention" and feature != "dtype":
        named["dtype"] = None
    if feature in OTHERS:
        is_cached = feature.endswith("cache")
        changed = ("key_cache", "value_cache") if is_cached else [n for n in named if getattr(named[n], "ndim", 0) > 2]
        scaled = {name: 20 * named[name] if is_cached else named[name] for name in changed}
        named |= {name: jnp.asarray(array, OTHERS[feature]) for name, array in scaled.items()}
        return named, {"k_scale": 0.05, "v_scale": 0.05} if is_cached else {}
    if feature == "kv_layout":
        default = parameters(operation)[feature].default
        return named | equal_axes(named), {feature: "PHTD" if default == "PTHD" else "PTHD"}
    if feature == "causal":
        return named, {feature: not parameters(operation)[feature].default}
    if feature == "nothing":
        return named, {}
    if feature in {**HINTS, **TPU_HINTS}:
        return named, {feature: {**HINTS, **TPU_HINTS}[feature]}
    return named, CHANGES.get(feature) or {feature: optional_arrays(operation)[feature]}


MASKING = {"bias", "init_bias", "mask_info", "return_weights", "dropout_rng", "dropout_prob", "deterministic"}
REFUSED: dict[tuple[str, str], set[str]] = {
    ("attention", "triton"): MASKING | {"softmax_dtype"},
    ("page_attention", "triton"): set(TPU_HINTS),
}
"""What Triton kernels refuse; what the others do follows the machine, or sizes."""

CASES = [
    pytest.param(operation, platform, feature, id=f"{operation}-{platform}-{feature}".replace(" ", "_"))
    for operation in OPERATIONS
    for platform in PLATFORMS
    if platform not in ("auto", "xla") and OBJECTS[operation].implementation(platform) is not None
    for feature in features(operation)
]
every_case = pytest.mark.parametrize(("operation", "platform", "feature"), CASES)


def refusal(operation: str, platform: str, feature: str) -> str | None:
    """What the operation says against the call while it is traced."""
    if platform == "triton":
        pytest.importorskip("triton")
    named, options = asked(operation, feature)
    arrays = {name: array for name, array in named.items() if hasattr(array, "shape")}
    others = {name: value for name, value in named.items() if name not in arrays}
    try:
        jax.eval_shape(lambda arrays: run(operation, arrays | others, **options, platform=platform), arrays)
    except NotImplementedError as error:
        return str(error)
    return None


@every_case
def test_taken_or_refused(operation: str, platform: str, feature: str) -> None:
    words = refusal(operation, platform, feature)
    assert words is None or re.match(rf"{operation}\[{platform}\] does not support .+; use ", words)
    if platform == "triton":
        assert (words is not None) == (feature in REFUSED.get((operation, platform), ()))


@every_case
def test_right_where_taken(operation: str, platform: str, feature: str) -> None:
    """As `xla` answers, whose answers the matrix compares with loops in float64."""
    if refusal(operation, platform, feature) is not None:
        return
    named, options = asked(operation, feature)
    if platform == "cuda" and jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match=r"attention\[cuda\] does not support .+; use "):
            run(operation, named, **options, platform=platform)
        return
    got = run(operation, named, **options, platform=platform)
    options = {name: value for name, value in options.items() if name not in TPU_HINTS}
    expected = run(operation, named, **options, platform="xla")
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        tolerance = 4 * float(jnp.finfo(left.dtype).eps) if jnp.issubdtype(left.dtype, jnp.floating) else 0.0
        left_values, right_values = (np.asarray(array, np.float32) for array in (left, right))
        np.testing.assert_allclose(left_values, right_values, rtol=max(tolerance, 2e-5), atol=max(tolerance, 2e-5))
