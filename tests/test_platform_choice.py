"""Which platform and configuration a call takes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge.operation import Implementation, Invocation
from jax_bridge.page_attention import PageAttention
from jax_bridge.registry import OPERATIONS as OBJECTS
from tests.new_process import run_python
from tests.small_calls import HQ, OPERATIONS, arguments, assert_close, run


def fake_kernel(platform: str, lacks: Callable[[Invocation], str | None], **fields: Any) -> Implementation:
    """An implementation that answers with twos."""

    def call(invocation: Invocation, cfg: Any, device: Any) -> Any:
        del cfg, device
        return jnp.full_like(invocation.arrays["query"], 2.0)

    return Implementation(platform, call, lacks=lacks, **fields)


def with_kernel(**fields: Any) -> PageAttention:
    kernel = fake_kernel(
        "triton", lambda invocation: "a sink" if invocation.arrays["attention_sink"] is not None else None, **fields
    )

    class PageAttentionWithKernel(PageAttention):
        implementations: ClassVar[tuple[Implementation, ...]] = (
            kernel,
            *(row for row in PageAttention.implementations if row.platform == "xla"),
        )

    return PageAttentionWithKernel()


def lowered_for(platform: str, operation: PageAttention, **options: Any) -> str:
    jitted = jax.jit(lambda named: operation.run(**named, **options))
    return jitted.trace(arguments("page_attention")).lower(lowering_platforms=(platform,)).as_text()


def test_auto_follows_the_platform_that_is_lowered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a CPU host: the kernel for CUDA where it supports the call and is not interpreted; `xla` elsewhere."""
    operation = with_kernel()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    twos = "dense<2.0"
    assert twos in lowered_for("cuda", operation)
    assert "dot_general" not in lowered_for("cuda", operation)
    for platform in ("cpu", "tpu"):
        assert "dot_general" in lowered_for(platform, operation)
    sink = np.zeros(HQ, np.float32)
    assert "dot_general" in lowered_for("cuda", operation, attention_sink=sink)
    assert "dot_general" in lowered_for("cuda", operation, cfg=jax_bridge.PageAttentionConfig(backend="cpu"))
    assert "dot_general" not in lowered_for("cpu", operation, cfg=jax_bridge.PageAttentionConfig(backend="gpu"))
    assert "dot_general" in lowered_for("cuda", with_kernel(is_available=lambda: False))
    for asked in ("1", "true", "on"):
        monkeypatch.setenv("TRITON_INTERPRET", asked)
        assert "dot_general" in lowered_for("cuda", operation)


def test_explicit_platform_that_lacks_a_feature_is_refused() -> None:
    operation = with_kernel()
    named = arguments("page_attention")
    assert np.all(operation.run(**named, platform="triton") == 2.0)
    with pytest.raises(
        NotImplementedError, match=r'page_attention\[triton\] does not support a sink; use platform="xla"'
    ):
        operation.run(**named, attention_sink=np.zeros(HQ, np.float32), platform="triton")


def test_auto_transforms_like_xla_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`jit`, `vmap`, `grad` and `shard_map` of a call that would take the kernel on a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    operation, named = with_kernel(), jax.device_put(arguments("page_attention"))
    rest = {name: array for name, array in named.items() if name != "query"}

    def loss(query: jax.Array, **options: Any) -> jax.Array:
        return jnp.sum(operation.run(query, **rest, **options) ** 2)

    expected = jax.grad(lambda query: loss(query, platform="xla"))(named["query"])
    assert_close(jax.jit(jax.grad(loss))(named["query"]), expected)
    queries = jnp.stack([named["query"], 2 * named["query"]])
    mapped = jax.jit(jax.vmap(lambda query: operation.run(query, **rest)))(queries)
    assert_close(mapped[1], operation.run(queries[1], **rest, platform="xla"))


def test_configuration_is_explicit_before_heuristic() -> None:
    heuristic = jax_bridge.PageAttentionConfig(num_warps=8, num_stages=2)
    operation = with_kernel(heuristic_cfg=lambda invocation, device: heuristic)
    invocation = operation.invocation(**arguments("page_attention"))
    assert operation.heuristic_cfg(invocation) == heuristic
    given = jax_bridge.PageAttentionConfig(num_warps=2)
    (branch,) = operation.branches(invocation, "triton", given)
    assert (branch.cfg.num_warps, branch.cfg.num_stages) == (2, 2)  # type: ignore[attr-defined]
    assert np.all(
        operation.get_impl(jax_bridge.PageAttentionConfig(platform="triton"))(**arguments("page_attention")) == 2
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_platform_forms_agree(operation: str) -> None:
    """The function, the object and its `get_impl` are one operation."""
    named = arguments(operation)
    config_type: Any = OBJECTS[operation].config_type
    answers = [run(operation, named, platform=platform) for platform in (None, "auto", "xla")]
    given = list(named.values())
    answers.append(OBJECTS[operation].run(*given))
    answers.append(OBJECTS[operation].get_impl(config_type(platform="xla"))(*given))
    for answer in answers[1:]:
        assert_close(answer, answers[0])


def test_import_needs_neither_triton_nor_a_gpu() -> None:
    """In a process where Triton cannot be imported; and JAX's backends are not started by the import."""
    program = (
        "import sys; sys.modules['triton'] = sys.modules['jax_triton'] = None\n"
        "import jax_bridge, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
        "import numpy as np\n"
        "cache = np.ones((4, 2, 8, 16), np.float32)\n"
        "query, lens, tables = np.ones((1, 2, 16), np.float32), np.array([9]), np.array([[2, 1]])\n"
        "out = jax_bridge.page_attention(query, cache, cache, lens, tables)\n"
        "np.testing.assert_allclose(out, 1, rtol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_auto_leaves_out_a_jax_triton_that_does_not_fit(tmp_path: Path) -> None:
    """Versions that fail when imported: "auto" warns and takes `xla`; by name, an error says what is needed."""
    pytest.importorskip("triton")
    (tmp_path / "jax_triton.py").write_text("import triton\n\ntriton.gone_in_this_version\n")
    program = (
        "import jax, jax_bridge, numpy as np, pytest\n"
        "cache = np.ones((4, 2, 8, 16), np.float32)\n"
        "arrays = np.ones((1, 2, 16), np.float32), cache, cache, np.array([9]), np.array([[2, 1]])\n"
        "traced = jax.jit(jax_bridge.page_attention).trace\n"
        "with pytest.warns(RuntimeWarning, match='gone_in_this_version'):\n"
        "    lowered = traced(*arrays).lower(lowering_platforms=('cuda',))\n"
        "assert 'dot_general' in lowered.as_text()\n"
        "with pytest.raises(ImportError, match='jax-triton >= '):\n"
        "    jax.jit(lambda *a: jax_bridge.page_attention(*a, platform='triton')).lower(*arrays)\n"
    )
    run_python(program, "-W", "error", first=(tmp_path,), interprets=False)
