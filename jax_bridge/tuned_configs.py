"""Configurations that tuning found: in the memory of this process, and in JSON files under the user's cache directory.

There is one file for each GPU model and operation. Only tuning writes; a file that is not ours is never touched.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import platformdirs

from jax_bridge import launch
from jax_bridge.configs import Config, FwdParams, completed
from jax_bridge.device import Device

DIRECTORY_VARIABLE = "JAX_BRIDGE_CACHE_DIR"
POLICY_VARIABLE = "JAX_BRIDGE_AUTOTUNE"
POLICIES = ("heuristics", "autotune")
LOCK_SECONDS = 30.0
_FORMAT = "jax_bridge tuned configurations, version 1"
_DISTRIBUTIONS = ("jax", "jaxlib", "jax-triton", "triton", "jax-paged-attention")

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A configuration, and where it comes from, in words."""

    cfg: Any
    source: str


_remembered: dict[Key, Choice] = {}
_absent: set[Key] = set()  # keys that the files were asked for in vain
_read: dict[Path, dict[str, Any]] = {}


def policy() -> str:
    """What a call without a tuned configuration does: `"heuristics"`, the default, or `"autotune"`.

    Raises:
        ValueError: JAX_BRIDGE_AUTOTUNE is neither.
    """
    chosen = os.environ.get(POLICY_VARIABLE) or POLICIES[0]
    if chosen not in POLICIES:
        raise ValueError(f"{POLICY_VARIABLE} is {chosen!r}, expected {' or '.join(POLICIES)}")
    return chosen


def directory() -> Path:
    """Where the files lie: JAX_BRIDGE_CACHE_DIR, or `jax_bridge` in the user's cache directory; it may not exist."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_cache_path("jax_bridge", appauthor=False)


def path_for(operation: str, platform: str, device: Device | None) -> Path:
    """The file of an operation on what runs it: a GPU model, Triton's interpreter, or for `xla` what JAX runs on."""
    if platform == "triton" and launch.interpreting():
        model = "triton interpreter"
    elif device is not None:
        model = device.name
    else:
        model = jax.devices()[0].device_kind
    return directory() / re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-") / f"{operation}.json"


def find(
    invocation: Any, platform: str, device: Device | None, defaults: Callable[[], Config] | None = None
) -> Choice | None:
    """The tuned configuration for a call, from memory or else from its file.

    Args:
        invocation: the checked call.
        platform: the platform that runs it.
        device: the device that it is specialised for, if the platform has one.
        defaults: gives fields that an entry of a file, perhaps of an older version, does not have.
    """
    key = call_key(invocation, platform, device)
    if (choice := _remembered.get(key)) is not None:
        return choice
    if key in _absent:
        return None
    path = path_for(invocation.operation, platform, device)
    entries = _read.get(path)  # another thread may forget it meanwhile
    if entries is None:
        entries = _read[path] = _entries(path, invocation.operation) or {}
    entry = entries.get(_written_key(invocation, platform, device)) if entries else None
    if entry is not None:
        try:
            cfg = _config(invocation.operation, entry["cfg"])
            choice = Choice(cfg if defaults is None else completed(cfg, defaults()), str(path))
        except (KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path}: an entry is ignored: {error!r}", RuntimeWarning, stacklevel=2)
        else:
            _remembered[key] = choice
            return choice
    _absent.add(key)
    return None


def remember(invocation: Any, platform: str, device: Device | None, choice: Choice) -> None:
    """Take `choice` from now on, in this process, for calls like this one that name no configuration."""
    _remembered[call_key(invocation, platform, device)] = choice


def forget() -> None:
    """Empty the memory of this process; files are read again."""
    _remembered.clear()
    _absent.clear()
    _read.clear()


def store(
    invocation: Any, platform: str, device: Device | None, cfg: Config, facts: Mapping[str, Any] | None = None
) -> Path | None:
    """Write a configuration to its file, beside what other processes wrote there meanwhile.

    Args:
        invocation: the checked call.
        platform: the platform that runs it.
        device: the device that it is specialised for, if the platform has one.
        cfg: the configuration.
        facts: what else the entry says, for people; nothing reads it.

    Returns:
        The file, or None where it could not be written.

    Warns:
        RuntimeWarning: the file is not ours or damaged, and stays as it is; or it cannot be written.
    """
    path = path_for(invocation.operation, platform, device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            entries = _entries(path, invocation.operation)
            if entries is None:
                return None
            entries[_written_key(invocation, platform, device)] = {"cfg": _fields(cfg), **(facts or {})}
            _replace(path, {"format": _FORMAT, "operation": invocation.operation, "entries": entries})
    except (OSError, filelock.Timeout) as error:
        warnings.warn(
            f"{path}: cannot be written, so the configuration serves this process only: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    _read[path] = entries
    return path


def _entries(path: Path, operation: str) -> dict[str, Any] | None:
    """The entries of a file, empty where there is none; None, with a warning, where it is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    else:
        is_ours = isinstance(content, dict) and content.get("format") == _FORMAT
        entries = content.get("entries") if is_ours and content.get("operation") == operation else None
        if isinstance(entries, dict):
            return entries
        problem = f"expected {_FORMAT!r} of {operation}"
    warnings.warn(
        f"{path}: ignored, and left as it is; move it away to let tuning write there: {problem}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file so that readers see the old or the new one, whole."""
    # Not by `tempfile`, whose files no other user may read.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _arrays(invocation: Any) -> tuple[tuple[str, tuple[int, ...], Any], ...]:
    return tuple(
        (name, tuple(array.shape), array.dtype) for name, array in invocation.arrays.items() if array is not None
    )


def call_key(invocation: Any, platform: str, device: Device | None) -> Key:
    """What calls share that one configuration serves, in this process."""
    return (invocation.operation, platform, _arrays(invocation), invocation.options, device, launch.interpreting())


def _written_key(invocation: Any, platform: str, device: Device | None) -> str:
    """The key in a file: text, with everything that the best configuration may depend on."""
    facts = {
        "platform": platform,
        "arrays": {name: [str(dtype), *shape] for name, shape, dtype in _arrays(invocation)},
        "options": dataclasses.asdict(invocation.options),
        "device": None if device is None else dataclasses.asdict(device),
        "versions": versions(),
    }
    return json.dumps(facts, sort_keys=True, default=_as_text)


def _as_text(value: Any) -> str:
    return np.dtype(value).name


@functools.cache
def versions() -> dict[str, str | None]:
    """The installed versions that a kernel's speed depends on, by distribution; None where one is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in _DISTRIBUTIONS}


def _fields(cfg: Config) -> dict[str, Any]:
    fields = dataclasses.asdict(cfg)  # type: ignore[call-overload]
    return {name: value for name, value in fields.items() if value is not None}


def _config(operation: str, fields: Any) -> Config:
    from jax_bridge.registry import OPERATIONS

    if not isinstance(fields, dict):
        raise TypeError(f"cfg is {fields!r}, expected an object")
    given = dict(fields)
    if isinstance(given.get("fwd_params"), dict):
        given["fwd_params"] = FwdParams(**given["fwd_params"])
    return OPERATIONS[operation].config_type(**given)
