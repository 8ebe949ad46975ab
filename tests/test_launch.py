"""From kernels to arrays: parameters in the order that buffers are handed over, and arrays that change in place."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bridge import PageAttentionConfig
from jax_bridge.device import KNOWN_DEVICES
from jax_bridge.launch import Output, interpreting, launch
from tests.small_calls import arguments, run

pytest.importorskip("triton")

import triton
import triton.language as tl

SIZE = 8
FLOATS = Output((SIZE,), jnp.float32)


@triton.jit
def add_and_count(x_ptr, total_ptr, y_ptr, SIZE: tl.constexpr):
    """Adds x to what stands at `total_ptr`, and stores what stood there, negated."""
    places = tl.arange(0, SIZE)
    before = tl.load(total_ptr + places)
    tl.store(total_ptr + places, before + tl.load(x_ptr + places))
    tl.store(y_ptr + places, -before)


@triton.jit
def output_first(y_ptr, x_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, SIZE), tl.load(x_ptr + tl.arange(0, SIZE)))


def launched(kernel: Any = add_and_count, **changes: Any) -> dict[str, jax.Array]:
    options: dict[str, Any] = {
        "constants": {"SIZE": SIZE},
        "num_programs": 1,
        "num_warps": 1,
        "num_stages": 1,
        "device": KNOWN_DEVICES["h100"],
        "operation": "test",
    }
    return launch(kernel, **(options | changes))


def accumulate(x: jax.Array, total: jax.Array) -> dict[str, jax.Array]:
    return launched(operands={"x_ptr": x}, updated={"total_ptr": total}, outputs={"y_ptr": FLOATS})


def test_outputs_before_operands_are_refused() -> None:
    """Their buffers would be handed over in another order than that of the parameters."""
    with pytest.raises(TypeError, match=r"output_first: outputs \['y_ptr'\] come before operands"):
        launched(output_first, operands={"x_ptr": jnp.ones(SIZE)}, outputs={"y_ptr": FLOATS})


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"outputs": {}}, r"parameters \['y_ptr'\] are missing"),
        ({"outputs": {"y_ptr": FLOATS, "z_ptr": FLOATS}}, r"parameters \['z_ptr'\] are missing, unknown"),
        ({"updated": {"x_ptr": None, "total_ptr": None}}, r"add_and_count: parameters .*given twice|expected"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(changes: dict[str, Any], pattern: str) -> None:
    given = {"operands": {"x_ptr": None}, "updated": {"total_ptr": None}, "outputs": {"y_ptr": FLOATS}}
    with pytest.raises(TypeError, match=pattern):
        launched(**(given | changes))


@pytest.mark.parametrize("num_programs", [0, 2**31])
def test_grids_that_no_gpu_takes_are_refused(num_programs: int) -> None:
    with pytest.raises(ValueError, match=rf"the grid has {num_programs} programs"):
        launched(
            operands={"x_ptr": None}, updated={"total_ptr": None}, outputs={"y_ptr": FLOATS}, num_programs=num_programs
        )


@pytest.mark.skipif("not __import__('jax_bridge').launch.interpreting()", reason="runs a kernel on the CPU")
class TestInterpreted:
    def test_updated_arrays_are_answered_and_the_callers_stay(self) -> None:
        assert interpreting()
        x, total = jnp.arange(SIZE, dtype=jnp.float32), jnp.full(SIZE, 3.0)
        results = accumulate(x, total)
        assert set(results) == {"total_ptr", "y_ptr"}
        np.testing.assert_array_equal(results["total_ptr"], np.arange(SIZE) + 3.0)
        np.testing.assert_array_equal(results["y_ptr"], np.full(SIZE, -3.0))
        np.testing.assert_array_equal(total, np.full(SIZE, 3.0))

    def test_lowering_for_a_gpu_is_refused_in_words(self) -> None:
        call = jax.jit(functools.partial(run, "page_attention", platform="triton")).trace(arguments("page_attention"))
        with pytest.raises(
            NotImplementedError, match=r"page_attention\[triton\] .* lowering for CUDA where TRITON_INT"
        ):
            call.lower(lowering_platforms=("cuda",))

    def test_updates_follow_each_other(self) -> None:
        """Each launch sees what the one before left, under `jit` and in `scan`."""

        def step(total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            results = accumulate(x, total)
            return results["total_ptr"], results["y_ptr"]

        xs = jnp.ones((3, SIZE))
        total, before = jax.jit(lambda xs: jax.lax.scan(step, jnp.zeros(SIZE), xs))(xs)
        np.testing.assert_array_equal(total, np.full(SIZE, 3.0))
        np.testing.assert_array_equal(before[:, 0], [0.0, -1.0, -2.0])


@pytest.mark.compile
class TestLowered:
    """Lowered for CUDA from this host."""

    @staticmethod
    def text(function: Any, size: int = SIZE) -> str:
        shapes = [jax.ShapeDtypeStruct((size,), jnp.float32)] * 2
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()

    def test_updated_arrays_alias_results(self) -> None:
        text = self.text(accumulate)
        (call,) = [line for line in text.splitlines() if "@triton_kernel_call" in line]
        assert "output_operand_alias" in call
        assert "output_tuple_indices = [1], operand_index = 1" in call

    def test_tiles_that_no_shared_memory_holds_are_refused_before_they_are_compiled(self) -> None:
        named = arguments("page_attention")
        cfg = PageAttentionConfig(block_n=16384)  # of 16 elements in float32: 1 MB
        call = jax.jit(functools.partial(run, "page_attention", platform="triton", cfg=cfg))
        with pytest.raises(ValueError, match=r"page_attention: .* 16384 keys.* bytes of keys in shared memory"):
            call.trace(named)

    def test_nothing_is_copied_between_launches(self) -> None:
        """What a launch updates goes to the next as it is."""

        def twice(x: jax.Array, total: jax.Array) -> Any:
            return accumulate(x, accumulate(x, total)["total_ptr"])["total_ptr"]

        text = self.text(twice)
        assert text.count("@triton_kernel_call") == 2
        assert "stablehlo.add" not in text
        assert "copy" not in text.partition("@triton_kernel_call")[2]

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_updates_inside_shard_map(self, check_vma: bool) -> None:
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("devices",))
        parts = jax.sharding.PartitionSpec("devices")

        def both(x: jax.Array, total: jax.Array) -> Any:
            return accumulate(x, total)["total_ptr"]

        sharded = jax.shard_map(both, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=check_vma)
        text = self.text(sharded, 2 * SIZE)
        assert text.count("@triton_kernel_call") == 1
