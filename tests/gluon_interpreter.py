"""Runs the kernel for Hopper without a GPU: what Triton's interpreter, which knows no Gluon, lacks for that.

The names of Gluon that the kernel uses stand for functions of the interpreter's tensors. Layouts mean nothing, shared
memory is numpy arrays, barriers count. Programs and their specialised warps are threads, of which one runs at a time,
in an order drawn from a seed, until it waits. What is asynchronous happens at once or as late as waits allow: so a copy
that comes before its place is free, and a product that is used before it is there, make wrong results; and where all
wait for each other it is said.

Not shown: how weights are packed, layouts and swizzles, registers, and fences.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton.experimental
import triton.language as tl
from triton.runtime import interpreter

import triton_kernels
from jax_bridge import hopper_launch, launch, paged_launch

_GLUON = "triton.experimental.gluon"
KERNELS = Path(triton_kernels.__file__).parent
MODULES = ("hopper_parts", "hopper_fetching", "hopper_attention")  # a module comes behind those that it imports


class _Layout:
    """Of whatever has none here."""

    value = None

    @property
    def parent(self) -> _Layout:
        return self


LAYOUT = _Layout()


def _tensor(data: np.ndarray, dtype: Any) -> Any:
    shape = [int(size) for size in data.shape]
    return tl.tensor(interpreter.TensorHandle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)


def _number(value: Any) -> int:
    return int(getattr(value, "value", value))


class SharedMemory:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, data: np.ndarray, dtype: Any) -> None:
        self.data, self.dtype = data, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def nbytes_per_cta(self) -> int:
        return self.data.nbytes

    def index(self, place: Any) -> SharedMemory:
        return SharedMemory(self.data[_number(place)], self.dtype)

    def slice(self, start: Any, length: Any) -> SharedMemory:
        return SharedMemory(self.data[_number(start) : _number(start) + _number(length)], self.dtype)

    def reshape(self, shape: Sequence[Any]) -> SharedMemory:
        view = self.data.reshape([_number(size) for size in shape])
        assert np.shares_memory(view, self.data)
        return SharedMemory(view, self.dtype)

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.data.transpose(order), self.dtype)

    def load(self, layout: Any) -> Any:
        del layout
        return _tensor(self.data.copy(), self.dtype)

    def store(self, tensor: Any) -> None:
        self.data[...] = tensor.handle.data


class Barrier:
    """Counts arrivals and bytes; its phase ends when none are missing."""

    def __init__(self) -> None:
        self.count = self.missing = self.missing_bytes = self.phase = 0
        self.copies: list[Callable[[], None]] = []

    def arrive(self, count: int) -> None:
        assert self.missing >= count, "a barrier with more arrivals than it was made for"
        self.missing -= count
        self.end_phase()

    def end_phase(self) -> None:
        if self.missing == 0 and self.missing_bytes == 0:
            self.phase += 1
            self.missing = self.count

    def finish_copies(self) -> None:
        while self.copies:
            self.copies.pop(0)()


class Barriers:
    def __init__(self, batch: int) -> None:
        self.barriers = [Barrier() for _ in range(batch)]

    def index(self, place: Any) -> Barrier:
        return self.barriers[_number(place)]


class Descriptor:
    """An array that the TMA fetches boxes of."""

    def __init__(self, array: np.ndarray, box: int) -> None:
        self.array, self.block_shape = array, (box, None, None)

    def box(self, place: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
        found = np.zeros(shape, self.array.dtype)
        inside = self.array[tuple(slice(start, start + size) for start, size in zip(place, shape, strict=True))]
        found[tuple(slice(size) for size in inside.shape)] = inside
        return found


class Threads:
    """Threads of which one runs at a time; where they wait another goes on, drawn from those that can.

    Some are drawn much more often than others, and so get ahead of them as far as they may.
    """

    def __init__(self, seed: int, *, is_eager: bool) -> None:
        self.random, self.is_eager = random.Random(seed), is_eager
        self.conditions: dict[threading.Thread, Callable[[], bool]] = {}
        self.turns: dict[threading.Thread, threading.Semaphore] = {}
        self.programs: dict[threading.Thread, int] = {}
        self.haste: dict[threading.Thread, int] = {}
        self.products: dict[threading.Thread, list[Callable[[], None]]] = {}
        self.failure: BaseException | None = None

    def start(self, program: int, function: Callable[[], None]) -> threading.Thread:
        """A thread that waits for its turn."""

        def run() -> None:
            self.turns[thread].acquire()
            try:
                if self.failure is None:
                    interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
                    function()
            except BaseException as error:  # every thread has to end
                self.failure = self.failure or error
            del self.conditions[thread]
            self._pass_on()

        thread = threading.Thread(target=run, daemon=True)
        self.conditions[thread] = lambda: True
        self.turns[thread] = threading.Semaphore(0)
        self.programs[thread], self.products[thread] = program, []
        self.haste[thread] = self.random.choice((1, 20, 400))
        thread.start()
        return thread

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        """All functions as programs, from a thread that is none of these."""
        started = [self.start(number, function) for number, function in enumerate(functions)]
        self._pass_on()
        for thread in started:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let others go on until `condition` holds."""
        me = threading.current_thread()
        self.conditions[me] = condition
        self._pass_on()
        self.turns[me].acquire()
        if self.failure is not None:
            raise self.failure
        self.conditions[me] = lambda: True
        interpreter.interpreter_builder.set_grid_idx(self.programs[me], 0, 0)

    def fork(self, functions: Sequence[Callable[[], None]]) -> None:
        """Functions of the current program side by side, until all have ended."""
        program = self.programs[threading.current_thread()]
        started = [self.start(program, function) for function in functions]
        self.wait(lambda: all(thread not in self.conditions for thread in started))

    def my_products(self) -> list[Callable[[], None]]:
        """Products under way in the current thread, the oldest first."""
        return self.products[threading.current_thread()]

    def _pass_on(self) -> None:
        if not self.conditions:
            return
        able = [thread for thread, holds in self.conditions.items() if self.failure or holds()]
        if not able:
            self.failure = AssertionError("a deadlock: all warps wait for each other")
            able = list(self.conditions)
        (chosen,) = self.random.choices(able, [self.haste[thread] for thread in able])
        self.turns[chosen].release()


def _language(threads: Threads) -> dict[str, types.ModuleType]:
    """What the kernel imports of Gluon, by the modules' names."""

    def later(action: Callable[[], None], queue: list[Callable[[], None]]) -> None:
        if threads.is_eager:
            action()
        else:
            queue.append(action)

    def wait(barrier: Barrier, parity: Any) -> None:
        def is_over() -> bool:
            barrier.finish_copies()
            return barrier.phase % 2 != _number(parity)

        threads.wait(is_over)

    def initialise(barrier: Barrier, count: Any) -> None:
        barrier.count = barrier.missing = _number(count)

    def arrive(barrier: Barrier, count: Any) -> None:
        barrier.arrive(_number(count))
        threads.wait(lambda: True)  # others may go on at once

    def expect(barrier: Barrier, num_bytes: Any) -> None:
        barrier.missing_bytes += _number(num_bytes)
        barrier.arrive(1)

    def fetch(descriptor: Descriptor, place: Sequence[Any], barrier: Barrier, tile: SharedMemory) -> None:
        begin = [_number(each) for each in place]

        def copy() -> None:
            tile.data[...] = descriptor.box(begin, tile.shape)
            barrier.missing_bytes -= tile.nbytes_per_cta
            barrier.end_phase()

        later(copy, barrier.copies)

    queries: dict[threading.Thread, list[Callable[[], None]]] = {}

    def load_queries(tile: SharedMemory, pointers: Any, mask: Any) -> None:
        values = tl.load(pointers, mask=mask, other=0.0)
        later(lambda: tile.store(values), queries.setdefault(threading.current_thread(), []))

    def wait_for_queries(outstanding: Any) -> None:
        assert _number(outstanding) == 0
        for action in queries.pop(threading.current_thread(), []):
            action()

    def multiply(left: Any, right: SharedMemory, acc: Any, use_acc: Any = True, is_async: Any = False) -> Any:
        product = _tensor(np.full(acc.handle.data.shape, np.nan, np.float32), tl.float32)

        def compute() -> None:
            rows = left.data if isinstance(left, SharedMemory) else left.handle.data
            found = rows.astype(np.float32) @ right.data.astype(np.float32)
            product.handle.data[...] = found + acc.handle.data if use_acc else found

        assert is_async
        later(compute, threads.my_products())
        return product

    def wait_for_products(outstanding: Any, deps: Sequence[Any]) -> Any:
        products = threads.my_products()
        while len(products) > _number(outstanding):
            products.pop(0)()
        return deps[0] if len(deps) == 1 else tuple(deps)

    def allocate(dtype: Any, shape: Sequence[Any], layout: Any) -> SharedMemory:
        del layout
        sizes = [_number(size) for size in shape]
        numpy_dtype = interpreter._get_np_dtype(dtype)
        filler = np.nan if np.issubdtype(numpy_dtype, np.floating) else np.iinfo(numpy_dtype).min
        return SharedMemory(np.full(sizes, filler, numpy_dtype), dtype)

    def specialize(functions: Sequence[tuple[Any, tuple[Any, ...]]], *_: Any) -> None:
        threads.fork([lambda function=function, given=given: function(*given) for function, given in functions])

    def layout(*_: Any) -> _Layout:
        return LAYOUT

    def sizes_of(shape: Sequence[Any]) -> list[int]:
        return [_number(size) for size in shape]

    gl = types.ModuleType("gluon.language")
    vars(gl).update(
        constexpr=tl.constexpr,
        int32=tl.int32,
        float16=tl.float16,
        int64=tl.int64,
        float32=tl.float32,
        static_range=range,
        allocate_shared_memory=allocate,
        warp_specialize=specialize,
        arange=lambda start, end, layout: tl.arange(_number(start), _number(end)),
        full=lambda shape, value, dtype, layout: tl.full(sizes_of(shape), value, dtype),
        zeros=lambda shape, dtype, layout: tl.zeros(sizes_of(shape), dtype),
        zeros_like=lambda tensor: tl.zeros(sizes_of(tensor.shape), tensor.dtype),
        convert_layout=lambda tensor, layout: tensor,
        num_warps=lambda: 1,
        barrier=lambda: None,
        **{
            name: (lambda *given, _name=name, **keywords: getattr(tl, _name)(*given, **keywords))
            for name in (
                "load",
                "store",
                "max",
                "maximum",
                "minimum",
                "where",
                "atomic_add",
                "program_id",
                "num_programs",
            )
        },
        **dict.fromkeys(
            (
                "BlockedLayout",
                "DotOperandLayout",
                "NVMMADistributedLayout",
                "NVMMASharedLayout",
                "SliceLayout",
                "SwizzledSharedLayout",
            ),
            layout,
        ),
    )
    hopper = types.ModuleType("gluon.language.nvidia.hopper")
    vars(hopper).update(
        async_copy=types.SimpleNamespace(
            async_load=load_queries, commit_group=lambda: None, wait_group=wait_for_queries
        ),
        fence_async_shared=lambda: None,
        mbarrier=types.SimpleNamespace(
            allocate_mbarrier=lambda batch: Barriers(_number(batch)),
            arrive=arrive,
            expect=expect,
            init=initialise,
            wait=wait,
        ),
        tma=types.SimpleNamespace(async_load=fetch),
        warpgroup_mma=multiply,
        warpgroup_mma_wait=wait_for_products,
    )
    gluon = types.ModuleType("gluon")
    vars(gluon).update(jit=interpreter.InterpretedFunction, language=gl)
    return {_GLUON: gluon, f"{_GLUON}.language": gl, f"{_GLUON}.language.nvidia.hopper": hopper}


def _rounded(weights: Any, dtype: Any) -> Any:
    """For `pack_pairs`: weights of 16 bits, those of bfloat16 where the interpreter has float32 for it."""
    narrow = jnp.float16 if dtype == tl.float16 else jnp.bfloat16
    return _tensor(weights.handle.data.astype(narrow).astype(np.float32), tl.float32)


class Kernel:
    """The kernel, as the bridge launches interpreted ones."""

    def __init__(self, function: Any, threads: Threads) -> None:
        self.function, self.threads = function, threads
        self.arg_names, self.__name__ = function.arg_names, function.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            box = min(given["CACHE"].page_size, given["MANY_TILE"].block_n)
            arguments = {
                name: Descriptor(value.array, box)
                if name.endswith("_desc")
                else interpreter._implicit_cvt(value)
                if hasattr(value, "data_ptr")
                else value
                for name, value in given.items()
            }
            scope = interpreter._patch_lang(self.function.fn)
            interpreter.interpreter_builder.set_grid_dim(*grid, 1, 1)
            try:
                self.threads.run([lambda: self.function(**arguments)] * grid[0])
            finally:
                scope.restore()

        return run


def _load(folder: Path, threads: Threads) -> Kernel:
    """The kernel whose modules lie in a folder, with a Gluon of ours."""
    language = _language(threads)
    gluon = mock.patch.object(triton.experimental, "gluon", language[_GLUON], create=True)
    with mock.patch.dict(sys.modules, language), gluon:
        for name in MODULES:
            imported_as = f"{triton_kernels.__name__}.{name}"
            specification = importlib.util.spec_from_file_location(imported_as, folder / f"{name}.py")
            assert specification is not None
            assert specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            sys.modules[imported_as] = module
            specification.loader.exec_module(module)
            for constant, value in list(vars(module).items()):
                if isinstance(value, tl.constexpr):  # numbers of Python cannot be divided by them
                    setattr(module, constant, value.value)
    vars(module).update(pack_pairs=_rounded, unpack_pairs=lambda pairs, dtype, layout: pairs)
    return Kernel(module.hopper_paged_attention_kernel, threads)


@contextlib.contextmanager
def interpreted(*, is_eager: bool, seed: int = 0, folder: Path = KERNELS) -> Iterator[None]:
    """Calls with specialised warps run in the interpreter.

    Args:
        is_eager: Whether what is asynchronous happens at once, or as late as it can.
        seed: Of the order in which warps go on.
        folder: Where the kernel's `MODULES` lie, in which there may be a bug.
    """
    kernel = _load(folder, Threads(seed, is_eager=is_eager))
    stand_in = types.SimpleNamespace(hopper_paged_attention_kernel=kernel, SWIZZLED_HEADS=LAYOUT)

    def kernels(asked: str) -> Any:
        return stand_in if asked == "hopper_attention" else launch.kernels(asked)

    def reshaped(cache: Any, shape: tuple[int, ...], block_shape: tuple[int, ...], layout: Any) -> Any:
        del block_shape, layout
        return cache.reshape(shape)

    with contextlib.ExitStack() as stack:
        for bridge in (hopper_launch, paged_launch):
            stack.enter_context(mock.patch.object(bridge, "kernels", kernels))
        stack.enter_context(mock.patch.object(hopper_launch, "lacks_gluon", return_value=None))
        stack.enter_context(mock.patch.object(hopper_launch, "descriptor", reshaped))
        stack.enter_context(mock.patch.object(tl.block_type, "layout", LAYOUT, create=True))
        stack.callback(jax.clear_caches)  # traces that would launch this kernel again
        yield
