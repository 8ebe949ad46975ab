"""What the compiler makes of the kernels, beside a stored baseline: `python -m bench.static`, `--write` to store anew.

Needs no GPU and knows no noise: registers, spills, shared memory, the depth of the pipeline, tensor core instructions
and loads of every kernel of some calls, for three generations of NVIDIA GPUs. Any that got worse is named.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from triton.backends.compiler import GPUTarget

import jax_bridge
from bench.machine_code import Binary, Launch, compile_launch, launches_of
from jax_bridge import dense_launch, device, kv_pages, paged_launch, states

BASELINE = Path(__file__).parent / "baselines" / "static.json"

ARCHITECTURES = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200"}

LESS_IS_BETTER = ("registers", "stack", "shared", "wgmma_waits")
MORE_IS_BETTER = ("depth", "wgmma", "mma", "cp_async", "tma", "skipping_loops")

Figures = dict[str, int]

Call = Callable[[Any], list[Launch]]
"""What a call launches with a configuration, or with the one that heuristics choose for None."""


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _index(*shape: int) -> Any:
    return _array(*shape, dtype=jnp.int32)


def _traced(modules: tuple[Any, ...], operation: Callable[..., Any], *arrays: Any, **options: Any) -> Call:
    """A function of a configuration that traces a call, and returns what it launches through `modules`."""

    def launches(cfg: Any) -> list[Launch]:
        configured = {} if cfg is None else {"cfg": cfg}
        call = functools.partial(operation, **options, platform="triton", **configured)
        return launches_of(call, *arrays, modules=modules)

    return launches


def _cache(head_dim: int = 128, dtype: Any = jnp.bfloat16) -> Any:
    return _array(1 << 14, 16, 8, head_dim, dtype=dtype)


def _unified(
    num_tokens: int, num_seqs: int, head_dim: int = 128, cache_dtype: Any = jnp.bfloat16, **options: Any
) -> Call:
    lengths, tables, starts = _index(num_seqs), _index(num_seqs, 256), _index(num_seqs + 1)
    cache = _cache(head_dim, cache_dtype)
    arrays = (_array(num_tokens, 32, head_dim), cache, cache, lengths, tables, starts)
    return _traced((paged_launch,), jax_bridge.unified_attention, *arrays, **options)


def _dense(num_tokens: int, **options: Any) -> Call:
    arrays = (_array(1, num_tokens, heads, 128) for heads in (32, 8, 8))
    return _traced((dense_launch,), jax_bridge.attention, *arrays, causal=True, **options)


def _segments(num_tokens: int) -> Any:
    return jax_bridge.MaskInfo.from_segments(_index(1, num_tokens), _index(1, num_tokens))


def _write(dtype: Any, **options: Any) -> Call:
    tokens = (_array(8192, 8, 128),) * 2
    arrays = (*tokens, _cache(dtype=dtype), _cache(dtype=dtype), _index(8192))
    return _traced((kv_pages,), jax_bridge.write_kv_pages, *arrays, **options)


CALLS: dict[str, Call] = {
    "page_attention": _traced(
        (paged_launch,), jax_bridge.page_attention, _array(8, 32, 128), _cache(), _cache(), _index(8), _index(8, 256)
    ),
    "ragged_decode_attention": _traced(
        (paged_launch,),
        jax_bridge.ragged_decode_attention,
        *(_array(8, 32, 128), _array(8, 8192, 8, 128), _array(8, 8192, 8, 128)),
        *(_index(8), _index(8)),
    ),
    "decode": _unified(64, 64),
    "decode-d64": _unified(64, 64, head_dim=64),
    "decode-d256": _unified(64, 64, head_dim=256),
    "decode-int8": _unified(64, 64, cache_dtype=jnp.int8, k_scale=0.1, v_scale=0.1),
    "decode-window-cap": _unified(64, 64, sliding_window=1024, logits_soft_cap=30.0),
    "drafts": _unified(256, 64),
    "mixed": _unified(2108, 64),
    "prompt": _unified(4096, 1),
    "prompt-d64": _unified(4096, 1, head_dim=64),
    "prompt-d256": _unified(4096, 1, head_dim=256),
    "prompt-window-cap": _unified(4096, 1, sliding_window=1024, logits_soft_cap=30.0),
    "prompt-d96": _unified(4096, 1, head_dim=96),
    "prompt-int8": _unified(4096, 1, cache_dtype=jnp.int8, k_scale=0.1, v_scale=0.1),
    "chunk": _unified(128, 1),
    "dense-causal": _dense(4096),
    "dense-segments": _dense(4096, mask_info=_segments(4096)),
    "write_kv_pages": _write(jnp.bfloat16),
    "write_kv_pages-int8": _write(jnp.int8, k_scale=0.1, v_scale=0.1),
    "merge_attention_states": _traced(
        (states,),
        jax_bridge.merge_attention_states,
        *(_array(8192, 32, 128), _array(8192, 32, dtype=jnp.float32)) * 2,
    ),
}
"""By name: the heads of Llama 3 8B in bfloat16 over pages of 16 tokens, or dense; variants of dtype and width."""


def figures(binary: Binary) -> Figures:
    """What is compared of a kernel."""
    found = {name: getattr(binary, name) for name in (*LESS_IS_BETTER, *MORE_IS_BETTER) if name != "skipping_loops"}
    return found | {"skipping_loops": sum("scf.if" in body for _, body in binary.main_loops())}


def compile_call(call: str, architecture: str, cfg: Any = None) -> dict[str, Figures]:
    """Figures of every kernel that a call launches, as it is configured for the architecture's GPU."""
    with device.target_device(ARCHITECTURES[architecture]):
        launches = CALLS[call](cfg)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return {launch.kernel.__name__: figures(compile_launch(launch, target)) for launch in launches}


def regressions(name: str, found: Mapping[str, Figures], stored: Mapping[str, Figures]) -> list[str]:
    """A line for every figure of the kernels of a call that is worse than the stored one, or missing."""
    if sorted(found) != sorted(stored):
        return [f"{name}: launches {sorted(found)}, the baseline {sorted(stored)}"]
    lines = []
    for kernel, values in found.items():
        for figure, value in values.items():
            before = stored[kernel].get(figure)
            if before is None:
                lines.append(f"{name} {kernel}: {figure} is {value}, the baseline has none")
            elif value != before and (value > before) == (figure in LESS_IS_BETTER):
                lines.append(f"{name} {kernel}: {figure} {before} -> {value}")
    return lines


def read_baseline() -> dict[str, dict[str, Figures]]:
    """The stored figures by kernel, by `call-architecture`."""
    stored: dict[str, dict[str, Figures]] = json.loads(BASELINE.read_text())
    return stored


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--write", action="store_true", help="store what is found as the baseline")
    options = parser.parse_args(arguments)
    pairs = [(call, architecture) for call in CALLS for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        results = processes.map(compile_call, *zip(*pairs, strict=True))
        found = {f"{call}-{architecture}": result for (call, architecture), result in zip(pairs, results, strict=True)}
    stored = read_baseline() if BASELINE.exists() else {}
    worse = [line for name, result in found.items() for line in regressions(name, result, stored.get(name, {}))]
    print(*worse, sep="\n")
    if options.write:
        BASELINE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{len(found)} calls stored in {BASELINE}")
        return 0
    print(f"{len(found)} calls compiled, {len(worse)} figures worse than in {BASELINE}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
