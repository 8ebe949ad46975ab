"""A kernel as a JAX primitive: compiled where a program is lowered for TPUs, interpreted where it is for CPUs.

`pallas_call` takes the choice between the two as an argument. But a program may be traced on one platform and lowered
for another, or for several at once.
"""

import functools
import threading
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.extend
import numpy as np
from jax._src import config  # no public names: the checks of `shard_map`, and what `force_tpu_interpret_mode` sets
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import mlir


class Kernel(Hashable, Protocol):
    """A call of `pallas_call`, ready but for its arrays."""

    @property
    def name(self) -> str:
        """The operation, as errors name it."""

    def outputs(self, *arrays: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the answers."""

    def __call__(self, *arrays: jax.Array, interpret: Any) -> tuple[jax.Array, ...]:
        """Run the kernel."""


def run(kernel: Kernel, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The answers of `kernel`, on whatever platform the program is lowered for.

    Raises:
        NotImplementedError: while lowering for a GPU.
    """
    answers = _kernel_p.bind(*arrays, kernel=kernel)
    # `shard_map` asks in which axes answers vary: in those of any operand.
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
    return tuple(jax.lax.pcast(answer, tuple(sorted(axes)), to="varying") if axes else answer for answer in answers)


_kernel_p = jax.extend.core.Primitive("tpu_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_impl
def _run_eagerly(*arrays: Any, kernel: Kernel) -> Any:
    with jax.disable_jit(False):  # else this is what the bound primitive calls
        return jax.jit(lambda *operands: _kernel_p.bind(*operands, kernel=kernel))(*arrays)


@_kernel_p.def_abstract_eval
def _abstract_answers(*arrays: Any, kernel: Kernel) -> list[Any]:
    return [jax.core.ShapedArray(output.shape, output.dtype) for output in kernel.outputs(*arrays)]


def _compile(context: Any, *operands: Any, kernel: Kernel) -> Sequence[Any]:
    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        # Under `shard_map` `pallas_call` would ask in which mesh axes its answers vary, which `run` says.
        with config._check_vma(False):
            return kernel(*arrays, interpret=False)

    answers: Sequence[Any] = mlir.lower_fun(call)(context, *operands)
    return answers


def _interpret(context: Any, *operands: Any, kernel: Kernel) -> Sequence[Any]:
    if len(context.module_context.platforms) > 1:
        return _no_answers(context)
    parameters = config.pallas_tpu_interpret_mode_context_manager.value or pltpu.InterpretParams()

    def call(*arrays: jax.Array) -> Any:
        interpret = functools.partial(_interpret_alone, kernel, parameters)
        return jax.pure_callback(interpret, kernel.outputs(*arrays), *arrays, vmap_method="sequential")

    answers: Sequence[Any] = mlir.lower_fun(call)(context, *operands)
    return answers


_interpreter_lock = threading.RLock()


def _interpret_alone(kernel: Kernel, parameters: Any, *arrays: Any) -> Any:
    """Interpret a kernel in a program of its own, one at a time.

    The interpreter simulates one machine, and lets kernels run after one another by an effect of the whole program.
    vmap, scan and export refuse such programs, also where they are for TPUs.
    """
    with _interpreter_lock:
        try:
            return jax.block_until_ready(_interpreted(kernel, parameters)(*arrays))
        except Exception:
            pltpu.reset_tpu_interpret_mode_state()  # it keeps the simulated memory of a failure, for debuggers
            raise


@functools.cache
def _interpreted(kernel: Kernel, parameters: Any) -> Any:
    return jax.jit(functools.partial(kernel, interpret=parameters))


def _refuse(context: Any, *operands: Any, kernel: Kernel) -> Sequence[Any]:
    if len(context.module_context.platforms) > 1:
        return _no_answers(context)
    raise NotImplementedError(f'{kernel.name}[pallas] does not support GPUs; use platform="triton" or platform="xla"')


def _no_answers(context: Any) -> Sequence[Any]:
    """In a branch of "auto" that this platform never takes: JAX lowers each branch for all of them."""
    return [mlir.ir_constant(np.broadcast_to(np.zeros((), a.dtype), a.shape)) for a in context.avals_out]


mlir.register_lowering(_kernel_p, _compile, "tpu")
mlir.register_lowering(_kernel_p, _interpret, "cpu")
for _platform in ("cuda", "rocm"):
    mlir.register_lowering(_kernel_p, _refuse, _platform)
