"""A Triton kernel and JAX arrays to JAX arrays in Triton's interpreter: for tests without a GPU, and debugging."""

import dataclasses
import functools
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_lock = threading.Lock()  # the interpreter patches triton.language globally while a kernel runs


def run(
    kernel: Any,
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    arrays: Mapping[str, jax.Array],
    updated: Sequence[str],
    constants: Mapping[str, Any],
    num_programs: int,
) -> dict[str, jax.Array]:
    """Runs `kernel` through a host callback, also within a compiled program.

    Args:
        kernel: A `@triton.jit` function.
        outputs: Shape and dtype of every array that the kernel writes; they start full of NaN.
        arrays: Operands, and what the kernel changes.
        updated: The names of the arrays that the kernel changes.
        constants: Value of every other parameter.
        num_programs: Size of the grid.

    Returns:
        The outputs and what the updated arrays became, by name.
    """
    _spare_needless_work()
    answers = {**outputs, **{name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in updated}}

    def call(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
        inputs = {name: _widened(np.asarray(array)) for name, array in arrays.items() if name not in updated}
        results = {name: _unwritten(output) for name, output in outputs.items()}
        results |= {name: _widened(np.array(arrays[name])) for name in updated}
        buffers = {name: _HostBuffer(array) for name, array in {**inputs, **results}.items()}
        # A GPU's arithmetic does not warn either, of values that a `where` then leaves out.
        silence = warnings.catch_warnings(action="ignore", category=RuntimeWarning)
        with _lock, np.errstate(all="ignore"), silence:
            kernel[(num_programs,)](**buffers, **constants)
        return {name: array.astype(answers[name].dtype) for name, array in results.items()}

    return jax.pure_callback(call, answers, dict(arrays), vmap_method="sequential")


@functools.cache
def _spare_needless_work() -> None:
    """Takes out of the interpreter what changes no result and costs more than half of its time.

    A version of Triton that does not have it under the names that are known here is left as it is.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    known = ("interpreter_builder", "_get_np_dtype", "_patch_lang", "_LangPatchScope")
    if not all(hasattr(interpreter, name) for name in known):
        return
    options: Any = getattr(interpreter.interpreter_builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        # Every sum of integers is checked for overflow, and without `debug` what was found is thrown away.
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    numpy_dtypes: dict[str, np.dtype] = {}
    find_numpy_dtype, patch = interpreter._get_np_dtype, interpreter._patch_lang

    def numpy_dtype(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in numpy_dtypes:
            numpy_dtypes[name] = find_numpy_dtype(dtype)
        return numpy_dtypes[name]

    @functools.cache
    def languages(function: Any) -> list[Any]:
        names = function.__globals__.values()
        return [module for module in (tl, tl.core) if any(value is module for value in names)]

    def patch_once(function: Any, *rest: Any) -> Any:
        """Every device function would patch triton.language for itself, though who calls it has done so already."""
        used = languages(function)
        if used and not any(tl.core.is_builtin(member) for m in used for member in (m.load, m.tensor.__add__)):
            return interpreter._LangPatchScope()
        return patch(function, *rest)

    interpreter._get_np_dtype, interpreter._patch_lang = numpy_dtype, patch_once


class _HostBuffer:
    """A numpy array with the few tensor methods that Triton's interpreter calls."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_HostBuffer":
        return self

    def cpu(self) -> "_HostBuffer":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_HostBuffer":
        return _HostBuffer(self.array)

    def set_(self, storage: "_HostBuffer", *_: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def copy_(self, _: Any) -> None:
        """Nothing to copy back: the kernel wrote into this very memory."""


def _widened(array: np.ndarray) -> np.ndarray:
    """A contiguous array, bfloat16 as float32: the interpreter's dot product multiplies bfloat16 bit patterns."""
    return np.ascontiguousarray(array.astype(np.float32) if array.dtype == jnp.bfloat16 else array)


def _unwritten(output: jax.ShapeDtypeStruct) -> np.ndarray:
    """A buffer in which elements that the kernel does not write are seen."""
    dtype = np.dtype(np.float32) if output.dtype == jnp.bfloat16 else np.dtype(output.dtype)
    filler = np.nan if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).min
    return np.full(output.shape, filler, dtype)
