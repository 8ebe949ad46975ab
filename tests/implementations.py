"""A row an implementation: which operation, on which platform, what it lacks, and where it runs.

A new implementation is one line in `IMPLEMENTATIONS`. Everything in `test_matrix.py`, `test_fuzz.py` and
`test_properties.py` then applies to it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bridge
from jax_bridge.device import Device
from jax_bridge.registry import OPERATIONS as OBJECTS
from tests import tpu_interpreter
from tests.cases import OPERATIONS
from tests.dense_form import Result
from tests.inputs import POSITIONAL, Call
from tests.poison import Array

ON_GPU = os.environ.get("JAX_BRIDGE_TEST_DEVICE") == "gpu"

FULL = ON_GPU or os.environ.get("HYPOTHESIS_PROFILE") == "full"
"""Whether the matrix runs every case in every dtype."""

MARKS = [pytest.mark.gpu] if ON_GPU else []
"""The `pytestmark` of a module whose tests run on whatever device the run is for."""

CPU = "cpu"
INTERPRETER = "interpreter"
GPU = "gpu"

SMALL_TILES: dict[str, dict[str, Any]] = {
    "page_attention": {"block_n": 16, "min_tiles_per_split": 1},
    "prefill_page_attention": {"block_m": 16, "block_n": 16, "min_tiles_per_split": 1},
    "unified_attention": {
        "block_m": 16,
        "block_n": 16,
        "decode_block_m": 16,
        "decode_block_n": 16,
        "min_tiles_per_split": 1,
    },
    "ragged_decode_attention": {"kv_blocksize": 16},
    "attention": {"block_q": 16, "block_k": 16, "skip_masks": True},
}
"""Tiles with which a small call has many of them."""

SMALL_TPU_BLOCKS: dict[str, Any] = {
    "page_attention": jax_bridge.PageAttentionConfig(block_n=32),
    "prefill_page_attention": jax_bridge.PrefillPageAttentionConfig(block_m=16, block_n=32),
    "unified_attention": jax_bridge.UnifiedAttentionConfig(block_m=16, block_n=32),
    "ragged_decode_attention": jax_bridge.RaggedDecodeAttentionConfig(jax_bridge.FwdParams(kv_blocksize=16)),
}
"""Blocks with which a small call on a TPU has many of them."""

SMALL_DEVICE = Device("three multiprocessors", compute_capability=90, num_sms=3, shared_memory=227 * 1024)
"""A device with which a small call has several shares, and few of them."""


def small_tiles(operation: str, **fields: Any) -> Any:
    """A configuration of small tiles."""
    config_type = {
        "page_attention": jax_bridge.PageAttentionConfig,
        "prefill_page_attention": jax_bridge.PrefillPageAttentionConfig,
        "unified_attention": jax_bridge.UnifiedAttentionConfig,
        "ragged_decode_attention": jax_bridge.FwdParams,
        "attention": jax_bridge.AttentionConfig,
    }[operation]
    made = config_type(**(SMALL_TILES[operation] | fields))
    return jax_bridge.RaggedDecodeAttentionConfig(made) if isinstance(made, jax_bridge.FwdParams) else made


def specialized(operation: str, **fields: Any) -> Any:
    """A configuration that asks for specialised warps."""
    config_type: Any = OBJECTS[operation].config_type
    return config_type(warp_specialized=True, **fields)


@dataclass(frozen=True)
class Implementation:
    """One platform of one operation."""

    operation: str
    platform: str
    runs_on: frozenset[str]
    lacks: frozenset[str] = frozenset()
    """Features, by argument name, that it must refuse with NotImplementedError."""

    @property
    def name(self) -> str:
        return f"{self.operation}[{self.platform}]"

    @property
    def interpreted(self) -> bool:
        return not ON_GPU and INTERPRETER in self.runs_on

    def __str__(self) -> str:
        return self.name

    def runs_here(self) -> bool:
        """Whether the machine and the mode of this test run can execute it."""
        if self.platform == "triton" and importlib.util.find_spec("triton") is None:
            return False
        return GPU in self.runs_on if ON_GPU else bool(self.runs_on & {CPU, INTERPRETER})

    def __call__(self, call: Call, **options: Any) -> Result:
        """The answers as float64 rows, after a check of their shapes and dtypes."""
        return as_result(call, self.raw(call, **options))

    def raw(self, call: Call, **options: Any) -> Any:
        """What the operation itself answers; `options` go to it beside those of the call."""
        function: Callable[..., Any] = getattr(jax_bridge, self.operation)
        arrays, keywords = arguments(call)
        if self.platform != "pallas":
            return function(*arrays, **keywords, **{"platform": self.platform, **options})
        with tpu_interpreter.strict(tpu_interpreter.mode_of(call.case)):
            asked = {"platform": self.platform, "cfg": SMALL_TPU_BLOCKS[self.operation], **options}
            return jax.block_until_ready(function(*arrays, **keywords, **asked))


def to_device(array: Array | None) -> Any:
    return None if array is None else jnp.asarray(array)


def arguments(call: Call) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a call of `jax_bridge`."""
    keywords: dict[str, Any] = {**call.options, **{k: to_device(v) for k, v in call.keyword_arrays().items()}}
    if call.operation == "attention":
        keywords.pop("mask", None)
        lengths, *segments = (keywords.pop(name, None) for name in ("key_lengths", "q_segment_ids", "kv_segment_ids"))
        if segments[0] is not None:
            keywords["mask_info"] = jax_bridge.MaskInfo.from_segments(*segments)
        elif lengths is not None:
            sizes = (call.case.query_lens[0], call.case.kv_lens[0])
            keywords["mask_info"] = jax_bridge.MaskInfo.from_key_lengths(lengths, *sizes)
        elif call.arrays["mask"] is not None:
            keywords["mask_info"] = jax_bridge.MaskInfo.from_attention_mask(to_device(call.arrays["mask"]))
    return [to_device(array) for array in call.positional()], keywords


def as_result(call: Call, answer: Any) -> Result:
    """Checks what every answer must be, whatever its values, and flattens it to rows."""
    case = call.case
    query_shape = call.array(POSITIONAL[call.operation][0]).shape
    expected: list[tuple[str, tuple[int, ...], str]] = [("out", (*query_shape[:-1], case.value_dim), case.dtype)]
    if case.return_lse:
        expected.append(("lse", query_shape[:-1], "float32"))
    if case.return_weights:
        shape = (case.batch, case.num_q_heads, case.query_lens[0], case.kv_lens[0])
        expected.append(("weights", shape, case.dtype))
    parts = answer if isinstance(answer, tuple) else (answer,)
    got = [(np.shape(part), part.dtype.name) for part in parts]
    if got != [(shape, dtype) for _, shape, dtype in expected]:
        raise AssertionError(f"{call.operation} answered {got}, expected {expected}")
    return rows_of(call, *parts)


def rows_of(call: Call, out: Any, second: Any = None) -> Result:
    """Answers in the shapes of the operation, as float64 rows."""
    case = call.case
    rows = np.asarray(out).astype(np.float64).reshape(-1, case.num_q_heads, case.value_dim)
    if second is None:
        return Result(rows)
    other = np.asarray(second).astype(np.float64)
    if case.return_lse:
        return Result(rows, lse=other.reshape(-1, case.num_q_heads))
    return Result(rows, weights=other.transpose(0, 2, 1, 3).reshape(-1, case.num_q_heads, case.kv_lens[0]))


def _row(operation: str, platform: str, *runs_on: str, lacks: frozenset[str] = frozenset()) -> Implementation:
    return Implementation(operation, platform, frozenset(runs_on), lacks)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    *(_row(operation, "xla", CPU, GPU) for operation in OPERATIONS),
    *(_row(operation, "triton", INTERPRETER, GPU) for operation in OPERATIONS[:4]),
    *(_row(operation, "pallas", CPU) for operation in OPERATIONS[:4]),
    _row("attention", "triton", INTERPRETER, GPU, lacks=frozenset({"bias", "mask_info", "return_weights"})),
)
"""The attention operations. Cache writes and merging are no attention: see `cache_problems`."""

CACHE_PLATFORMS: tuple[str, ...] = ("xla", "triton") if importlib.util.find_spec("triton") else ("xla",)
"""The platforms that write caches and merge states."""


HAS_KERNEL = any(row.platform == "triton" and row.runs_here() for row in IMPLEMENTATIONS)
"""Whether there is Triton."""


def kernel_of(operation: str) -> Implementation:
    """The row of the Triton kernel, where there is Triton."""
    return next(row for row in implementations_of(operation) if row.platform == "triton")


def implementations_of(*operations: str) -> tuple[Implementation, ...]:
    """The rows that run here, of some operations or of all."""
    return tuple(row for row in IMPLEMENTATIONS if row.runs_here() and (not operations or row.operation in operations))
