"""`explain`: what a call of any operation takes, and why nothing else."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge import MaskInfo
from jax_bridge.configs import PLATFORMS
from jax_bridge.device import KNOWN_DEVICES
from jax_bridge.registry import OPERATIONS as OBJECTS
from tests.small_calls import HQ, OPERATIONS, arguments, call, function

NAMES = [platform for platform in PLATFORMS if platform != "auto"]


def explained(operation: str, named: Any, op: Any = None, **options: Any) -> Any:
    return call(lambda *a, **k: jax_bridge.explain(op or operation, *a, **k), operation, named, **options)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_by_name_function_object_and_class(operation: str) -> None:
    named = arguments(operation)
    forms = (operation, function(operation), OBJECTS[operation], type(OBJECTS[operation]))
    texts = {str(explained(operation, named, op)) for op in forms}
    assert len(texts) == 1
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in named.items()}
    texts.add(str(explained(operation, shapes)))
    assert len(texts) == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_platform_is_accounted_for(operation: str) -> None:
    """Chosen or passed over, with a reason; asked for by name, it is the one."""
    explanation = explained(operation, arguments(operation))
    text = str(explanation)
    assert f"{operation}[{explanation.platform}]" in text
    assert f"platform {explanation.platform}: chosen for the {jax.default_backend()} backend" in text
    for platform in NAMES:
        passed_over = re.search(rf"not {platform}: (.+)", text)
        assert (passed_over is None) == (platform == explanation.platform)
    assert isinstance(explanation.cfg, OBJECTS[operation].config_type)
    named = str(explained(operation, arguments(operation), platform="xla"))
    assert "platform xla: the argument says so" in named
    assert "not triton, pallas, cuda: the call names its platform" in named


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": np.zeros((1, 1, 3, 8), np.float32)}, "bias"),
    "return_weights": ({"return_weights": True}, "return_weights"),
    "softmax_dtype": ({"softmax_dtype": jnp.float16}, "softmax_dtype=float16"),
    "mask": ({"mask_info": MaskInfo.from_attention_mask(np.ones((2, 1, 3, 8), bool))}, "a boolean mask in mask_info"),
}


@pytest.mark.parametrize("feature", ASKED)
def test_attention_says_what_the_kernels_lack(feature: str) -> None:
    options, words = ASKED[feature]
    explanation = explained("attention", arguments("attention"), **options)
    assert explanation.platform == "xla"
    for platform in ("triton", "cuda"):
        assert re.search(rf"not {platform}: it does not support .*{re.escape(words)}", str(explanation))


@pytest.mark.compile  # with kernels that are not interpreted
def test_attention_for_a_gpu_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax_bridge.device, "_local_gpu", lambda: KNOWN_DEVICES["a100"])
    explanation = explained("attention", arguments("attention"))
    assert explanation.platform == "triton"
    assert explanation.cfg.block_q is not None
    assert "by heuristics for NVIDIA A100" in str(explanation)
    assert "not cuda: it is taken only where the call names it" in str(explanation)
    assert "not xla: it comes last" in str(explanation)
    cfg = jax_bridge.AttentionConfig(block_q=32)
    explanation = explained("attention", arguments("attention"), cfg=cfg)
    assert explanation.cfg.block_q == 32
    assert "configuration: given fields, the others by heuristics" in str(explanation)


@pytest.mark.parametrize("operation", ["prefill_page_attention", "ragged_decode_attention"])
def test_a_mesh_is_explained_by_one_shard(operation: str) -> None:
    named = arguments(operation)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    if operation == "prefill_page_attention":
        heads = jax.P(None, "batch")
        specs = [heads, jax.P("batch"), jax.P("batch"), jax.P(), jax.P()]
    else:
        heads, specs = jax.P("batch"), [jax.P("batch")] * 5
    explanation = explained(operation, named, mesh=mesh, in_specs=tuple(specs), out_specs=heads)
    assert explanation.platform == {"cpu": "xla"}.get(jax.default_backend(), explanation.platform)
    with pytest.raises(TypeError, match=rf"{operation}: mesh is .*expected a Mesh with both specs"):
        explained(operation, named, mesh=mesh)


def test_a_mesh_where_none_is_taken_is_refused() -> None:
    named = arguments("attention")
    with pytest.raises(TypeError, match="attention: mesh given, expected none"):
        jax_bridge.explain("attention", *named.values(), mesh=object())


@pytest.mark.compile  # with kernels that are not interpreted
def test_a_kernel_that_does_not_run_here_is_explained_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """For those who lower for another machine; the call itself raises."""
    named = arguments("page_attention")
    words = "here it can only be lowered for a GPU: where it runs, the cpu backend raises NotImplementedError"
    assert words in str(explained("page_attention", named, platform="triton"))
    with pytest.raises(NotImplementedError, match=r"page_attention\[triton\] does not support CPU devices"):
        call(jax_bridge.page_attention, "page_attention", named, platform="triton")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert words not in str(explained("page_attention", named, platform="triton"))


def test_blocks_of_a_pallas_kernel_are_configured() -> None:
    named = arguments("ragged_decode_attention")
    cfg = jax_bridge.RaggedDecodeAttentionConfig(jax_bridge.FwdParams(kv_blocksize=16))
    text = str(explained("ragged_decode_attention", named, platform="pallas", cfg=cfg))
    assert re.search(r"configuration: given fields, .*kv_blocksize=16.*, and otherwise the kernel's own choice", text)
    text = str(explained("ragged_decode_attention", named, platform="pallas"))
    assert "configuration: the kernel's own choice of blocks" in text


def test_what_the_call_raises_is_raised() -> None:
    named = arguments("attention")
    with pytest.raises(NotImplementedError, match=r"attention\[pallas\] does not support this operation"):
        explained("attention", named, platform="pallas")
    with pytest.raises(ValueError, match="attention: softmax_aux has shape"):
        explained("attention", {**named, "softmax_aux": np.zeros((HQ + 1, 2), np.float32)})
    with pytest.raises(ValueError, match="op is 'attend', expected an operation or one of the names"):
        jax_bridge.explain("attend")
