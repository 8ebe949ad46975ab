"""Files of tuned configurations: read back, shared by processes, and never overwritten where they are not ours."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_bridge
from jax_bridge import tuned_configs
from jax_bridge.device import KNOWN_DEVICES, Device
from jax_bridge.registry import OPERATIONS

CONFIGS: dict[str, Any] = {
    "page_attention": jax_bridge.PageAttentionConfig(num_warps=2, block_n=32, skip_masks=False),
    "ragged_decode_attention": jax_bridge.RaggedDecodeAttentionConfig(jax_bridge.FwdParams(kv_blocksize=32)),
    "attention": jax_bridge.AttentionConfig(block_q=128, kv_heads_at_once=3),
}
DEVICE = KNOWN_DEVICES["h100"]
OTHER = Device("NVIDIA H100 with less memory", 90, 114, 227 * 1024)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(tuned_configs.DIRECTORY_VARIABLE, str(tmp_path))
    for memory in ("_remembered", "_read"):
        monkeypatch.setattr(tuned_configs, memory, {})
    monkeypatch.setattr(tuned_configs, "_absent", set())
    return tmp_path


def invocation(operation: str = "page_attention", rows: int = 2) -> Any:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    given = {
        "page_attention": (array(rows, 2, 16), *[array(6, 1, 16, 16)] * 2, integers(rows), integers(rows, 3)),
        "ragged_decode_attention": (array(rows, 2, 16), *[array(rows, 64, 1, 16)] * 2, *[integers(rows)] * 2),
        "attention": (array(rows, 5, 2, 16), *[array(rows, 64, 1, 16)] * 2),
    }
    return OPERATIONS[operation].invocation(*given[operation])


def found(operation: str = "page_attention", device: Device = DEVICE, rows: int = 2) -> Any:
    """What a process that knows nothing yet finds."""
    tuned_configs.forget()
    choice = tuned_configs.find(invocation(operation, rows), "triton", device)
    return None if choice is None else choice.cfg


@pytest.mark.parametrize("operation", CONFIGS)
def test_round_trip(operation: str) -> None:
    path = tuned_configs.store(invocation(operation), "triton", DEVICE, CONFIGS[operation], {"microseconds": 1.5})
    assert path is not None
    assert path.name == f"{operation}.json"
    assert found(operation) == CONFIGS[operation]
    assert found(operation, rows=3) is None
    assert found(operation, OTHER) is None


def test_one_file_a_gpu_model_and_operation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_configs.launch, "interpreting", lambda: False)
    for operation, device, rows in (
        ("page_attention", DEVICE, 2),
        ("page_attention", DEVICE, 3),
        ("attention", OTHER, 2),
    ):
        tuned_configs.store(invocation(operation, rows), "triton", device, CONFIGS[operation])
    names = {path.relative_to(folder).as_posix() for path in folder.glob("**/*.json")}
    assert names == {"nvidia-h100/page_attention.json", "nvidia-h100-with-less-memory/attention.json"}


def test_the_interpreter_tells_nothing_about_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_configs.launch, "interpreting", lambda: True)
    tuned_configs.store(invocation(), "triton", DEVICE, CONFIGS["page_attention"])
    assert found() is not None
    monkeypatch.setattr(tuned_configs.launch, "interpreting", lambda: False)
    assert found() is None


def test_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tuned_configs.DIRECTORY_VARIABLE)
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
        assert tuned_configs.directory() == tmp_path / "caches" / "jax_bridge"
    assert not tuned_configs.directory().exists()


def test_looking_writes_nothing(folder: Path) -> None:
    assert found() is None
    arrays = [array for array in invocation().arrays.values() if array is not None]
    jax_bridge.explain("page_attention", *arrays, platform="triton")
    assert list(folder.iterdir()) == []


def test_an_entry_without_some_field_is_completed() -> None:
    """As one that was written before the field existed."""
    tuned_configs.store(invocation(), "triton", DEVICE, CONFIGS["page_attention"])
    tuned_configs.forget()
    arrays = [array for array in invocation().arrays.values() if array is not None]
    cfg: Any = jax_bridge.explain("page_attention", *arrays, platform="triton").cfg
    assert (cfg.num_warps, cfg.block_n) == (2, 32)
    assert None not in (cfg.num_stages, cfg.block_m)


FOREIGN: dict[str, str | bytes] = {
    "empty": "",
    "cut off": '{"format": "jax_bridge tuned conf',
    "not an object": "[1, 2]",
    "another program's": '{"entries": {}}',
    "a later version": '{"format": "jax_bridge tuned configurations, version 2", "operation": "page_attention"}',
    "another operation's": json.dumps({"format": tuned_configs._FORMAT, "operation": "attention", "entries": {}}),
    "without entries": json.dumps({"format": tuned_configs._FORMAT, "operation": "page_attention"}),
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_not_ours_is_ignored_and_kept(kind: str) -> None:
    content = FOREIGN[kind]
    data = content if isinstance(content, bytes) else content.encode()
    path = tuned_configs.path_for("page_attention", "triton", DEVICE)
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="ignored, and left as it is; move it away"):
        assert found() is None
    with pytest.warns(RuntimeWarning, match="ignored, and left as it is; move it away"):
        assert tuned_configs.store(invocation(), "triton", DEVICE, CONFIGS["page_attention"]) is None
    assert path.read_bytes() == data


def test_a_file_is_complained_of_once() -> None:
    path = tuned_configs.path_for("page_attention", "triton", DEVICE)
    path.parent.mkdir()
    path.write_text("damaged")
    with pytest.warns(RuntimeWarning, match="ignored"):
        tuned_configs.find(invocation(), "triton", DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned_configs.find(invocation(rows=3), "triton", DEVICE) is None


@pytest.mark.parametrize(
    "cfg", [{"block_n": "many"}, {"block_n": 3}, {"from_the_future": 1}, {"fwd_params": {}}, [], None]
)
def test_an_entry_that_is_damaged_is_ignored(cfg: Any) -> None:
    path = tuned_configs.store(invocation(), "triton", DEVICE, CONFIGS["page_attention"])
    assert path is not None
    content = json.loads(path.read_text())
    (key,) = content["entries"]
    content["entries"][key] = {"cfg": cfg} if cfg is not None else 3
    path.write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match="an entry is ignored"):
        assert found() is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_serves_the_process_only(folder: Path) -> None:
    folder.chmod(0o500)
    with pytest.warns(RuntimeWarning, match="cannot be written, so the configuration serves this process only"):
        assert tuned_configs.store(invocation(), "triton", DEVICE, CONFIGS["page_attention"]) is None


def test_a_directory_that_cannot_be_made_serves_the_process_only(folder: Path) -> None:
    (folder / tuned_configs.path_for("page_attention", "triton", DEVICE).parent.name).write_text("in the way")
    with pytest.warns(RuntimeWarning, match="cannot be written, so the configuration serves this process only"):
        assert tuned_configs.store(invocation(), "triton", DEVICE, CONFIGS["page_attention"]) is None


def test_failing_to_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned_configs.store(invocation(), "triton", DEVICE, CONFIGS["page_attention"])
    assert path is not None
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(RuntimeWarning, match="disk full"):
        tuned_configs.store(invocation(rows=3), "triton", DEVICE, CONFIGS["page_attention"])
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


WRITER = """
import pathlib, sys, time
from tests.test_tuned_configs import CONFIGS, DEVICE, invocation
from jax_bridge import tuned_configs
first = int(sys.argv[1])
pathlib.Path(sys.argv[2], f"ready-{first}").touch()
while not pathlib.Path(sys.argv[2], "go").exists():
    time.sleep(0.001)
for rows in range(first, first + 25):
    assert tuned_configs.store(invocation(rows=rows), "triton", DEVICE, CONFIGS["page_attention"])
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    signals = tmp_path_factory.mktemp("signals")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "JAX_PLATFORMS": "cpu"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(first), str(signals)], env=environment)
        for first in (100, 200)
    ]
    while len(list(signals.glob("ready-*"))) < 2 and all(writer.poll() is None for writer in writers):
        time.sleep(0.01)
    (signals / "go").touch()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    path = tuned_configs.path_for("page_attention", "triton", DEVICE)
    assert len(json.loads(path.read_text())["entries"]) == 50
