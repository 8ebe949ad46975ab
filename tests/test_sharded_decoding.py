"""Decoding spread over devices by the documented recipes equals one device."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from bench import sharded
from jax_bridge import page_attention
from tests import judge
from tests.cases import Case
from tests.implementations import CACHE_PLATFORMS, MARKS, Implementation, implementations_of
from tests.inputs import build

pytestmark = [
    *MARKS,
    pytest.mark.usefixtures("small_device"),
    pytest.mark.skipif("jax.device_count() < 2", reason="conftest makes eight devices out of a CPU; this GPU is alone"),
]

each_platform = pytest.mark.parametrize(
    "implementation",
    [row for row in implementations_of("page_attention") if row.platform in CACHE_PLATFORMS],
    ids=str,
)


def mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("devices",))


@each_platform
@pytest.mark.parametrize(("devices", "fields"), [(2, {}), (4, {"sinks": 1, "soft_cap": 5.0})], ids=str)
def test_keys_of_a_sequence_on_many_devices(
    implementation: Implementation, devices: int, fields: dict[str, Any]
) -> None:
    """Some devices hold no key of a sequence, and one sequence has no keys at all."""
    if devices > jax.device_count():
        pytest.skip(f"{devices} devices")
    sizes: dict[str, Any] = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 16, "page_size": 8}
    lens = (75, 3, 0, 8)
    call = build(Case(name="spread", operation="page_attention", query_lens=(1,) * 4, kv_lens=lens, **sizes, **fields))
    key_cache, value_cache, tables = (call.array(name) for name in ("key_cache", "value_cache", "block_tables"))
    width = -(-tables.shape[1] // devices)
    padded = np.zeros((len(lens), width * devices), np.int32)
    padded[:, : tables.shape[1]] = tables
    own_tables = padded.reshape(len(lens), devices, width).transpose(1, 0, 2)
    begins = np.arange(devices)[:, None] * width * sizes["page_size"]
    own_lens = np.clip(np.array(lens)[None] - begins, 0, width * sizes["page_size"]).astype(np.int32)

    def attend(query: Any, keys: Any, values: Any, lens: Any, tables: Any, sinks: Any) -> Any:
        return sharded.attend_sharded_sequences(
            query,
            keys,
            values,
            lens[0],
            tables[0],
            axis_name="devices",
            attention_sink=sinks,
            attn_logits_soft_cap=call.case.soft_cap,
            platform=implementation.platform,
        )

    everywhere, parts = PartitionSpec(), PartitionSpec("devices")
    specs = (everywhere, everywhere, everywhere, parts, parts, everywhere)
    spread = jax.shard_map(attend, mesh=mesh(devices), in_specs=specs, out_specs=everywhere, check_vma=False)
    sinks = call.arrays["attention_sink"]
    out = spread(call.array("query"), key_cache, value_cache, own_lens, own_tables, sinks)
    np.testing.assert_allclose(np.asarray(out), implementation(call).out, rtol=1e-5, atol=1e-5)


@each_platform
def test_kv_heads_on_two_devices_need_no_collective(implementation: Implementation) -> None:
    call = build(
        Case(
            name="heads", operation="page_attention", query_lens=(1, 1), kv_lens=(40, 9), num_q_heads=4, num_kv_heads=2
        )
    )
    way = sharded.ways(implementation.platform)["KV heads"]
    named = [call.array(name) for name in ("query", "key_cache", "value_cache", "context_lens", "block_tables")]
    arrays = [jnp.asarray(array) for array in named]
    arrays[1:3] = [cache.transpose(0, 2, 1, 3) for cache in arrays[1:3]]  # to PTHD
    attend = jax.jit(jax.shard_map(way.attend, mesh=mesh(2), in_specs=way.specs, out_specs=way.answer, check_vma=False))
    assert not sharded.COLLECTIVES.search(attend.lower(*arrays).compile().as_text() or "")
    alone = functools.partial(page_attention, kv_layout=sharded.LAYOUT, platform=implementation.platform)
    np.testing.assert_allclose(attend(*arrays), alone(*arrays), rtol=1e-6, atol=1e-6)
    judge.check(call, implementation(call))


@each_platform
def test_data_on_another_device(implementation: Implementation) -> None:
    """The answer comes from where the arrays lie."""
    call = build(Case(name="elsewhere", operation="page_attention", query_lens=(1, 1), kv_lens=(40, 9)))
    elsewhere = jax.devices()[1]
    moved = {name: jax.device_put(array, elsewhere) for name, array in call.arrays.items() if array is not None}
    out = implementation.raw(call.with_arrays(**moved))
    assert out.devices() == {elsewhere}
    np.testing.assert_allclose(np.asarray(out), implementation(call).out, rtol=1e-6, atol=1e-6)


def test_documentation_shows_the_recipe_as_it_is_tested() -> None:
    page = Path(__file__).parent.parent / "docs" / "sharding.md"
    assert inspect.getsource(sharded.attend_sharded_sequences) in page.read_text()


def test_benchmark_runs_and_notices_wrong_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--case",
        "2x64",
        "--platform",
        "xla",
        "--pool-gb",
        "0.02",
        "--repeats",
        "2",
        "--max-calls",
        "4",
        "--sample-ms",
        "1",
    ]
    assert sharded.main(options) == 0
    assert "| KV heads |" in capsys.readouterr().out
    attend = sharded.page_attention
    monkeypatch.setattr(sharded, "page_attention", lambda q, k, v, lens, t, **o: attend(q, k, v, lens - 1, t, **o))
    with pytest.raises(ArithmeticError, match="2x64 on 2 devices: row error"):
        sharded.main(options)
