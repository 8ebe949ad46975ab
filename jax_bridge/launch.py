"""From a Triton kernel and JAX arrays to JAX arrays: jax-triton on a GPU, Triton's interpreter on a CPU.

The only module that imports jax_triton, and it does so when the first kernel is launched.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

from jax_bridge import interpreter
from jax_bridge.device import Device, current_device

Output = jax.ShapeDtypeStruct
_MAX_GRID = 2**31 - 1
_KERNEL_PROJECT = "jax-paged-attention"
OLDEST_TRITON = (3, 7)
_OLDEST_GLUON = (3, 9)
_COMPILE_TO_PTX = "compile_ttir_to_ptx_inplace"  # of jax-triton 0.4.1


@functools.cache
def available() -> bool:
    """Whether Triton and jax-triton are installed and can be imported together, which the first call tries.

    Warns:
        RuntimeWarning: They are installed, but not in versions that fit.
    """
    if any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")):
        return False
    try:
        _jax_triton()
    except ImportError as error:
        warnings.warn(f'platform="auto" leaves out "triton": {error.__cause__ or error}', RuntimeWarning, stacklevel=2)
        return False
    return True


def interpreter_asked_for() -> bool:
    """What TRITON_INTERPRET says, in the words that Triton takes; costs no import of Triton."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


@functools.cache
def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter: TRITON_INTERPRET was set before Triton was imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def lacks_gluon() -> str | None:
    """Words for why no kernel in Gluon can run here, or None."""
    if interpreting():
        return "Triton's interpreter"
    try:
        triton_lib = _jax_triton().triton_lib
    except ImportError:
        return "environments without Triton and jax-triton"
    if _triton_version() < _OLDEST_GLUON:
        return f"Triton before {'.'.join(map(str, _OLDEST_GLUON))}"
    if not hasattr(triton_lib, _COMPILE_TO_PTX):
        return "this version of jax-triton"
    library = triton_lib.triton_kernel_call_lib
    describes = library is None or hasattr(library, "create_tma_descriptor_parameter")
    return None if describes else "jaxlib before 0.11.1"


def descriptor(array: Any, shape: tuple[int, ...], block_shape: tuple[int, ...], layout: Any) -> Any:
    """An array as one of `shape`, row-major, from which the TMA fetches blocks into shared memory of `layout`."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return _jax_triton().TensorDescriptor(array, shape, strides, block_shape, layout)


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


@functools.cache
def kernels(module: str) -> Any:
    """Module `module` of our `triton_kernels`, imported when first needed.

    Raises:
        ImportError: Another distribution's `triton_kernels` comes first on the path.
    """
    package = importlib.import_module("triton_kernels")
    if getattr(package, "__project__", None) != _KERNEL_PROJECT:
        raise ImportError(
            f"`triton_kernels` at {package.__file__} is not the one of {_KERNEL_PROJECT}: triton-lang "
            "(also as bundled by vLLM) has a package of that name; keep the two in separate environments or processes"
        )
    return importlib.import_module(f"triton_kernels.{module}")


def launch(
    kernel: Any,
    *,
    outputs: Mapping[str, Output | None],
    operands: Mapping[str, jax.Array | None],
    constants: Mapping[str, Any],
    num_programs: int,
    num_warps: int,
    num_stages: int,
    device: Device,
    operation: str,
    updated: Mapping[str, jax.Array | None] | None = None,
    max_registers: int | None = None,
) -> dict[str, jax.Array]:
    """Runs `kernel` on a one-dimensional grid.

    Args:
        kernel: A `@triton.jit` or `@gluon.jit` function.
        outputs: Shape and dtype of every output parameter; None where the kernel is not to write it. Outputs start
            uninitialised (under the interpreter: full of NaN).
        operands: Array of every input parameter, or its `descriptor`, or None.
        constants: Value of every constexpr parameter.
        num_programs: Size of the grid.
        num_warps: Warps a program; if some are specialised, those that are there before.
        num_stages: Depth of the software pipeline.
        device: The GPU to compile for.
        operation: The operation that launches, for profiles and errors.
        updated: Array of every parameter that the kernel changes in place, or None. XLA copies it only where its old
            content is still needed.
        max_registers: Registers a thread, so that as many programs as planned fit a multiprocessor.

    Returns:
        The outputs that were asked for and the updated arrays, by name.

    Raises:
        TypeError: The names are not exactly the kernel's parameters, or outputs are not its last ones.
        ValueError: The grid is empty or too large.
        NotImplementedError: The device is not one of NVIDIA.
    """
    name = kernel.__name__
    updated = updated or {}
    given = [*outputs, *operands, *updated, *constants]
    if sorted(given) != sorted(kernel.arg_names):
        wrong = sorted(set(given) ^ set(kernel.arg_names))
        raise TypeError(f"{name}: parameters {wrong} are missing, unknown or given twice, expected {kernel.arg_names}")
    if not 0 < num_programs <= _MAX_GRID:
        raise ValueError(f"{name}: the grid has {num_programs} programs, expected 1 to {_MAX_GRID}")
    parameters = [parameter for parameter in kernel.arg_names if parameter not in constants]
    if any(parameter in outputs for parameter in parameters[: len(parameters) - len(outputs)]):
        # jax-triton hands over the buffers of operands, then those of outputs, whatever the order of parameters.
        raise TypeError(f"{name}: outputs {list(outputs)} come before operands in {parameters}, expected them last")
    arrays = {parameter: array for parameter, array in {**operands, **updated}.items() if array is not None}
    written = {parameter: output for parameter, output in outputs.items() if output is not None}
    changed = {parameter: array for parameter, array in updated.items() if array is not None}
    absent = {
        parameter: None for parameter in (*outputs, *operands, *updated) if parameter not in {**arrays, **written}
    }
    if interpreting():
        answers = interpreter.run(kernel, written, arrays, tuple(changed), {**absent, **constants}, num_programs)
        return _varying(arrays, answers)

    if device.vendor != "nvidia":
        raise NotImplementedError(
            f'{operation}[triton] does not support launches on {device.name}, only compiling for it; use platform="xla"'
        )
    # The buffers of all results follow those of the operands: what is updated comes last, behind the last parameter.
    results_in_order = [*(parameter for parameter in kernel.arg_names if parameter in written), *changed]
    operands_in_order = [parameter for parameter in kernel.arg_names if parameter in arrays]
    if changed:
        arrays = _not_slices(arrays)
    with _aliases_without_warning() if changed else contextlib.nullcontext():
        results = _jax_triton().triton_call(
            kernel=kernel,
            name=operation,
            out_type=[
                written[parameter] if parameter in written else Output(arrays[parameter].shape, arrays[parameter].dtype)
                for parameter in results_in_order
            ],
            input_output_aliases={
                operands_in_order.index(parameter): results_in_order.index(parameter) for parameter in changed
            },
            grid=(num_programs, 1, 1),
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=device.compute_capability,
            backend_options=backend_options(max_registers),
            **arrays,
            **absent,
            **constants,
        )
    answers = dict(zip(results_in_order, results, strict=True))
    return _varying(arrays, _not_slices(answers) if changed else answers)


def _not_slices(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays that XLA does not make parts of larger ones, which it may do with what a call reads and writes.

    On GPUs it pulls slices of operands, and updates of slices with results, into one fusion with the call (its dynamic
    slice fusion), and such a fusion forgets that a result stands in the buffer of an operand: what the kernel does not
    write, as most of a cache, would be lost.
    """
    return dict(zip(arrays, jax.lax.optimization_barrier(tuple(arrays.values())), strict=True))


@contextlib.contextmanager
def _aliases_without_warning() -> Iterator[None]:
    # Refs, which jax-triton recommends instead of aliases, cannot be inside of custom_jvp and custom_vmap.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        yield


def backend_options(max_registers: int | None) -> dict[str, Any]:
    """Options of Triton's compiler."""
    return {"enable_fp_fusion": True, **({"maxnreg": max_registers} if max_registers else {})}


def _varying(operands: Mapping[str, jax.Array], results: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Results marked as varying over the axes of `shard_map` that any operand varies over; calls leave that out."""
    types = [jax.typeof(array) for array in jax.tree.leaves(operands)]
    axes = frozenset().union(*(t.manual_axis_type.varying for t in types))
    if not axes:
        return results
    return {name: jax.lax.pcast(array, tuple(sorted(axes)), to="varying") for name, array in results.items()}


def kernel_operation(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, made of launches, with what kernels lack: vmap becomes a loop, derivatives are refused.

    Args:
        name: How errors name the operation, as in `"page_attention[triton]"`.
        function: Takes arrays or None, returns a pytree of arrays. It outlives the trace, so it must hold none of them.
    """
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def loop(axis_size: int, in_batched: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        del axis_size
        is_mapped = jax.tree.leaves(in_batched)
        leaves, structure = jax.tree.flatten(arguments)
        mapped = [leaf for leaf, moves in zip(leaves, is_mapped, strict=True) if moves]

        def one(slices: list[Any]) -> Any:
            taken = iter(slices)
            row = [next(taken) if moves else leaf for leaf, moves in zip(leaves, is_mapped, strict=True)]
            return batched(*jax.tree.unflatten(structure, row))

        results = jax.lax.map(one, mapped)
        return results, jax.tree.map(lambda _: True, results)

    differentiable = jax.custom_jvp(batched)

    @differentiable.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise NotImplementedError(f'{name} does not support differentiation; use platform="xla"')

    return differentiable


@functools.cache
def _jax_triton() -> Any:
    """jax_triton, checked, without its side effect on the environment, and with our checks on what it compiles."""
    cache_directory = os.environ.get("TRITON_CACHE_DIR")
    try:
        if _triton_version() < OLDEST_TRITON:  # jax_triton would import and fail when it lowers
            raise ImportError(f"triton {importlib.metadata.version('triton')} is installed")
        import jax_triton
        from jax_triton import triton_lib
    except Exception as error:  # versions that do not fit fail in many ways, AttributeError among them
        raise ImportError(
            'platform="triton" needs jax-triton >= 0.4.1 and triton >= 3.7: pip install "jax-paged-attention[cuda]"'
        ) from error
    finally:
        if cache_directory is not None:
            os.environ["TRITON_CACHE_DIR"] = cache_directory
    if triton_lib.triton_kernel_call_lib is not None:
        triton_lib.triton_kernel_call_lib = _CheckedLibrary(triton_lib.triton_kernel_call_lib)
    if (compile_to_ptx := getattr(triton_lib, _COMPILE_TO_PTX, None)) is not None:
        setattr(triton_lib, _COMPILE_TO_PTX, functools.partial(_compile_to_ptx, compile_to_ptx))
    lower = getattr(triton_lib, "triton_kernel_call_lowering", None)
    make_target = getattr(triton_lib, "make_cuda_target", None)
    if lower is not None and make_target is not None:
        rule = functools.partial(_lower, functools.partial(lower, make_target))
        mlir.register_lowering(triton_lib.triton_kernel_call_p, rule, "cuda")
    for platform in ("cpu", "tpu"):
        mlir.register_lowering(triton_lib.triton_kernel_call_p, functools.partial(_refuse_platform, platform), platform)
    return jax_triton


def _lower(rule: Callable[..., Any], context: Any, *operands: Any, name: str, **parameters: Any) -> Any:
    """jax-triton's lowering for CUDA, whose errors know the kernel's name only."""
    try:
        return rule(context, *operands, name=name, **parameters)
    except _SharedMemoryError as error:
        raise ValueError(f"{name}[triton]: {error}") from error


def _refuse_platform(platform: str, context: Any, *operands: Any, name: str, **parameters: Any) -> Any:
    del operands, parameters
    if len(context.module_context.platforms) > 1:
        # In a branch of "auto" that this platform never takes: JAX lowers each for all, and `operation` refuses others.
        return [mlir.ir_constant(np.broadcast_to(np.zeros((), a.dtype), a.shape)) for a in context.avals_out]
    raise NotImplementedError(
        f'{name}[triton] does not support {platform.upper()} devices; use platform="xla", or set TRITON_INTERPRET=1 '
        "before the first import to run the kernel in the interpreter of Triton"
    )


def _compile_to_ptx(compile_to_ptx: Callable[..., Any], module: Any, backend: Any, *options: Any) -> Any:
    """jax-triton's way from a module to PTX, but through Gluon's passes where layouts are there already.

    jax-triton 0.4.1 takes every module through the passes that choose layouts: those of stores then need as much shared
    memory as the accumulators.
    """
    has_layouts = module.get_int_attr("ttg.num-warps") is not None
    return compile_to_ptx(module, _GluonPasses(backend) if has_layouts else backend, *options)


class _GluonPasses:
    """A backend of Triton's compiler for modules that come from Gluon."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def make_ttir(self, module: Any, *_: Any) -> Any:
        return module

    def make_ttgir(self, module: Any, *options: Any) -> Any:
        return self._backend.gluon_to_ttgir(module, *options)


class _SharedMemoryError(ValueError):
    """A kernel needs more than a program of the device may have."""


class _CheckedLibrary:
    """jaxlib's launcher, given no more than it needs, and no kernel that would lack shared memory at launch."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def TritonKernel(
        self, name: str, num_warps: int, num_ctas: int, shared: int, ptx: str, ttir: str, *rest: Any
    ) -> Any:
        # Specialised warps come on top of those that the launch asks for.
        threads = re.search(r"^\.reqntid (\d+)", ptx, re.MULTILINE)
        num_warps = int(threads[1]) // 32 if threads else num_warps
        limit = current_device().shared_memory
        if shared > limit:
            raise _SharedMemoryError(
                f"cfg asks for tiles and stages with which {name} needs {shared} bytes of shared memory, expected at "
                f"most {limit} on this device; use smaller tiles or fewer stages"
            )
        del ttir  # only for dumps
        return self._library.TritonKernel(name, num_warps, num_ctas, shared, _without_debug_sections(ptx), "", *rest)


def _without_debug_sections(ptx: str) -> str:
    """PTX without line information: jaxlib handles the whole text at every launch, on the host's time."""
    code = ptx.partition("\t.section\t.debug_")[0]
    return "".join(
        line for line in code.splitlines(keepends=True) if not line.lstrip().startswith((".loc", ".file", "//"))
    )
