"""Programs whose calls change arrays in place, for `tests.gpu_xla`: layers of models, with their caches and answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_bridge import (
    FwdParams,
    PageAttentionConfig,
    RaggedDecodeAttentionConfig,
    page_attention,
    prefill_page_attention,
    ragged_decode_attention,
    unified_attention,
    write_kv_pages,
)
from tests.serving_layers import ONE_CACHE, STEPS, Batch

LAYERS, PAGES, PAGE_SIZE, HQ, HKV, D = 3, 256, 16, 16, 4, 128
PTHD = (PAGES, PAGE_SIZE, HKV, D)
ALL_PAGES = (LAYERS * PAGES, PAGE_SIZE, HKV, D)
SEQS, TOKENS = 64, 128


@dataclass(frozen=True)
class Program:
    """A function to compile.

    Attributes:
        function: Of arrays.
        arguments: Their shapes and dtypes.
        launches: How many kernels it launches; those in a loop count once.
        updating: How many of them change operands in place.
        donated: The places of arguments that it may write over.
        cache_shape: That of the donated caches where nothing but launches may produce such an array.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    launches: int
    updating: int
    donated: tuple[int, ...] = ()
    cache_shape: tuple[int, ...] | None = None


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _step(name: str) -> Program:
    """Every layer writes and attends, and its keys are split."""
    shape = ALL_PAGES if name in ONE_CACHE else (LAYERS, *PTHD)
    batch = Batch(_integers(SEQS), _integers(SEQS, 20), _integers(SEQS + 1), _integers(TOKENS))
    new = _floats(LAYERS, 2, TOKENS, HKV, D)
    copies = LAYERS if name in ("unrolled", "assigned") else 1
    return Program(
        functools.partial(STEPS[name], "triton"),
        ((_floats(*shape), _floats(*shape)), _floats(LAYERS, TOKENS, HQ, D), new, batch),
        launches=3 * copies,
        updating=2 * copies,
        donated=(0,),
        cache_shape=ALL_PAGES if name in ONE_CACHE else None,
    )


def _write(caches: Any, new: Any, slots: Any) -> Any:
    return write_kv_pages(*new, *caches, slots, platform="triton")


def _write_layers(caches: Any, new: Any, slots: Any) -> Any:
    """Into caches that a scan carries, layer by layer."""

    def layer(caches: Any, inputs: Any) -> tuple[Any, None]:
        new, index = inputs
        return _write(caches, new, slots + index * PAGES * PAGE_SIZE), None

    return jax.lax.scan(layer, caches, (new, jnp.arange(LAYERS)))[0]


def _writing(function: Callable[..., Any], *layers: int) -> Program:
    return Program(
        function,
        ((_floats(*ALL_PAGES), _floats(*ALL_PAGES)), _floats(*layers, 2, TOKENS, HKV, D), _integers(TOKENS)),
        launches=1,
        updating=1,
        donated=(0,),
        cache_shape=ALL_PAGES,
    )


def _attending(
    operation: Callable[..., Any], rows: int, cache: tuple[int, ...], *shared: Any, updating: int = 1, **options: Any
) -> Program:
    """Layers that attend to caches of their own and answer output and LSE, all of them stacked by a scan."""

    def layers(queries: Any, keys: Any, values: Any, *shared: Any) -> Any:
        def layer(_: None, inputs: Any) -> Any:
            return None, operation(*inputs, *shared, platform="triton", return_lse=True, **options)

        return jax.lax.scan(layer, None, (queries, keys, values))[1]

    caches = (_floats(LAYERS, *cache), _floats(LAYERS, *cache))
    return Program(layers, (_floats(LAYERS, rows, HQ, D), *caches, *shared), launches=2, updating=updating)


PHTD = (PAGES, HKV, PAGE_SIZE, D)
HPTD = (HKV, PAGES, PAGE_SIZE, D)
_FEW = (_integers(8), _integers(8, 128))
_RANGES = (_integers(8), _integers(8))
_FOUR_SPLITS = RaggedDecodeAttentionConfig(fwd_params=FwdParams(num_key_splits=4))

PROGRAMS: dict[str, Program] = {
    **{name: _step(name) for name in STEPS},
    "write": _writing(_write),
    "write_layers": _writing(_write_layers, LAYERS),
    "page_attention": _attending(page_attention, 8, PHTD, *_FEW, kv_layout="PHTD"),
    "page_attention-4_splits": _attending(page_attention, 8, PHTD, *_FEW, cfg=PageAttentionConfig(num_splits=4)),
    "ragged_decode_attention": _attending(ragged_decode_attention, 8, (8, 2048, HKV, D), *_RANGES),
    "ragged_decode_attention-4_splits": _attending(
        ragged_decode_attention, 8, (8, 2048, HKV, D), *_RANGES, cfg=_FOUR_SPLITS
    ),
    "prefill_page_attention": _attending(prefill_page_attention, 64, HPTD, _integers(1), _integers(256)),
    # Programs take shares from a counter, which starts at 0 and is changed in place.
    "unified_attention-counter": _attending(unified_attention, 512, PTHD, *_FEW, _integers(9), updating=2),
}

UNGUARDED = ("carried", "scanned")
"""Those compiled a second time without the barriers of `jax_bridge.launch` around launches that change operands."""
