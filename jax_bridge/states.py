"""Merging attention results over disjoint keys."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import reference
from jax_bridge.cache_heuristics import MERGE_ELEMENTS, NUM_WARPS, cache_config, columns_per_block, rows_per_program
from jax_bridge.configs import CacheConfig
from jax_bridge.device import Device
from jax_bridge.launch import Output, available, kernel_operation, kernels, launch
from jax_bridge.operation import Implementation, Invocation, Operation, Outputs
from jax_bridge.paged_launch import Arrays
from jax_bridge.validation import ANY_FLOAT, FLOAT, Arguments


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """`merge_attention_states` has no static arguments."""


@dataclasses.dataclass(frozen=True)
class MergeSizes:
    """Sizes of one call, named as in `PagedSizes`."""

    num_tokens: int
    num_q_heads: int
    value_head_dim: int


def _xla(invocation: Invocation, cfg: CacheConfig, device: Device | None) -> Outputs:
    del cfg, device
    arrays = invocation.arrays
    return reference.merge_attention_states(arrays["out_a"], arrays["lse_a"], arrays["out_b"], arrays["lse_b"])


def _triton(invocation: Invocation, cfg: CacheConfig, device: Device) -> Outputs:
    del cfg
    sizes = invocation.sizes

    def merge(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        return _launch(arrays, sizes, device)

    merged: tuple[jax.Array, jax.Array] = kernel_operation("merge_attention_states[triton]", merge)(
        dict(invocation.arrays)
    )
    return merged


def _launch(arrays: Arrays, sizes: MergeSizes, device: Device) -> tuple[jax.Array, jax.Array]:
    num_rows = sizes.num_tokens * sizes.num_q_heads
    block_d = columns_per_block(sizes.value_head_dim)
    block_rows = rows_per_program(num_rows, block_d, MERGE_ELEMENTS, device)
    results = launch(
        kernels("states").merge_attention_states_kernel,
        outputs={
            "out_ptr": Output(arrays["out_a"].shape, arrays["out_a"].dtype),
            "lse_ptr": Output(arrays["lse_a"].shape, jnp.float32),
        },
        operands={f"{name}_ptr": array for name, array in arrays.items()},
        constants={
            "NUM_ROWS": num_rows,
            "HEAD_DIM": sizes.value_head_dim,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
        },
        num_programs=math.ceil(num_rows / block_rows),
        num_warps=NUM_WARPS,
        num_stages=1,
        device=device,
        operation="merge_attention_states",
    )
    return results["out_ptr"], results["lse_ptr"]


class MergeAttentionStates(Operation):
    """The operation object of `merge_attention_states`."""

    name = "merge_attention_states"
    config_type = CacheConfig
    implementations: ClassVar[tuple[Implementation, ...]] = (
        Implementation("triton", _triton, heuristic_cfg=cache_config, is_available=available),
        Implementation("xla", _xla),
    )

    def invocation(self, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, /) -> Invocation:
        """Check the arguments of `merge_attention_states`."""
        check = Arguments(self.name)
        rows = ("T", "Hq")
        arrays = {
            "out_a": check.array("out_a", out_a, (*rows, "D"), FLOAT),
            "lse_a": check.array("lse_a", lse_a, rows, ANY_FLOAT),
            "out_b": check.array("out_b", out_b, (*rows, "D"), FLOAT),
            "lse_b": check.array("lse_b", lse_b, rows, ANY_FLOAT),
        }
        check.same_dtype("out_b", out_b, "out_a", out_a)
        sizes = MergeSizes(check.sizes["T"], check.sizes["Hq"], check.sizes["D"])
        return Invocation(self.name, arrays, MergeOptions(), sizes)

    @staticmethod
    def outputs(invocation: Invocation) -> Any:
        """The merged output and its LSE."""
        out = invocation.arrays["out_a"]
        return jax.ShapeDtypeStruct(out.shape, out.dtype), jax.ShapeDtypeStruct(out.shape[:2], jnp.float32)


_OPERATION = MergeAttentionStates()


def merge_attention_states(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array, /, *, platform: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Join two attention results over disjoint keys into the result over all of them.

    Args:
        out_a: `[T, Hq, D]`, float32, float16 or bfloat16.
        lse_a: `[T, Hq]`, natural logarithms of the softmax denominators; -inf for a row without keys.
        out_b: as `out_a`.
        lse_b: as `lse_a`.
        platform: `"triton"`, `"xla"`, or `"auto"` (None).

    Returns:
        The output in the dtype of `out_a` and the float32 LSE; zeros and -inf where both rows are without keys.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit.
        NotImplementedError: the platform does not support the operation.
    """
    merged: tuple[jax.Array, jax.Array] = _OPERATION.run(out_a, lse_a, out_b, lse_b, platform=platform)
    return merged
