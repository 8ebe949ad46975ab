"""What a call costs beside its kernels: `python -m bench.overheads --json overheads.json`.

Of every operation the first call in a process of its own, which traces and compiles, and the second one. And of a step
of many small launches, cache writes and attention of one layer after another, the time a layer: as XLA runs it, and
without command buffers (CUDA graphs), where every launch comes from the host. On a CPU:

    JAX_PLATFORMS=cpu python -m bench.overheads --platform xla --layers 2 --repeats 3
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WITHOUT_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
SEQUENCES, CONTEXT, PAGE_SIZE, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 512, 16, 32, 8, 128


def first_calls(operation: str, platform: str) -> dict[str, float]:
    """Seconds that the import and the first two calls of an operation take in this process."""
    started = time.perf_counter()
    import jax

    import jax_bridge  # noqa: F401
    from tests.small_calls import arguments, run

    imported = time.perf_counter()
    named = jax.block_until_ready(jax.device_put(arguments(operation)))
    seconds = {"import": imported - started}
    for name in ("first call", "second call"):
        start = time.perf_counter()
        jax.block_until_ready(run(operation, named, platform=platform))
        seconds[name] = time.perf_counter() - start
    return seconds


def step_seconds(platform: str, layers: int, repeats: int) -> dict[str, Any]:
    """Seconds a layer of the step, and the largest error of its output."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bench.timing import compile_program, measure_program
    from jax_bridge import page_attention, write_kv_pages

    width = CONTEXT // PAGE_SIZE
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (SEQUENCES, NUM_Q_HEADS, HEAD_DIM), jnp.bfloat16)
    cache = jax.random.normal(keys[1], (SEQUENCES * width, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM), jnp.bfloat16)
    new = jax.random.normal(keys[2], (SEQUENCES, NUM_KV_HEADS, HEAD_DIM), jnp.bfloat16)
    tables = jnp.asarray(np.random.default_rng(0).permutation(SEQUENCES * width).reshape(SEQUENCES, width))
    lens = jnp.full(SEQUENCES, CONTEXT)
    slots = tables[:, -1] * PAGE_SIZE + PAGE_SIZE - 1

    def step(platform: str, query: jax.Array, cache: jax.Array) -> jax.Array:
        caches = (cache, cache)
        for _ in range(layers):
            caches = write_kv_pages(new, new, *caches, slots, platform=platform)
            query = page_attention(query, *caches, lens, tables, kv_layout="PTHD", platform=platform)
        return query

    program = compile_program(functools.partial(step, platform), [(query, cache)])
    got = program.run(0)[0].astype(jnp.float32)
    expected = jax.jit(functools.partial(step, "xla"))(query, cache).astype(jnp.float32)
    timing = measure_program(program, repeats=repeats)
    return {
        "seconds": timing.median / layers,
        "host_seconds": timing.host / layers,
        "error": float(jnp.abs(got - expected).max()),
        "device": jax.devices()[0].device_kind,
    }


def in_a_process(part: Sequence[str], flags: str = "") -> dict[str, Any]:
    """What this module prints of one part when it runs alone."""
    environment = dict(os.environ) | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, "-m", "bench.overheads", *part]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}: {finished.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overheads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="triton")
    parser.add_argument("--layers", type=int, default=32, help="of the step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="store all numbers here")
    parser.add_argument("--only", metavar="PART", help="one part in this process: an operation's name, or step")
    options = parser.parse_args(arguments)
    if options.only:
        if options.only == "step":
            print(json.dumps(step_seconds(options.platform, options.layers, options.repeats)))
        else:
            print(json.dumps(first_calls(options.only, options.platform)))
        return 0

    from bench.timing import describe_machine
    from tests.small_calls import OPERATIONS

    shared = [f"--platform={options.platform}"]
    step = [*shared, f"--layers={options.layers}", f"--repeats={options.repeats}", "--only=step"]
    steps = {"as it is": in_a_process(step), "without command buffers": in_a_process(step, WITHOUT_COMMAND_BUFFERS)}
    print("| step | us a layer | of it on the host | error |\n|---|---|---|---|")
    for name, row in steps.items():
        times = f"{row['seconds'] * 1e6:.1f} | {row['host_seconds'] * 1e6:.1f}"
        print(f"| {name} | {times} | {row['error']:.1e} |", flush=True)
    print("\n| operation | import s | first call s | second call s |\n|---|---|---|---|")
    firsts = {}
    for operation in OPERATIONS:
        firsts[operation] = in_a_process([*shared, f"--only={operation}"])
        print(f"| {operation} | " + " | ".join(f"{s:.2f}" for s in firsts[operation].values()) + " |", flush=True)
    if options.json:  # the machine is described last: who looks at a GPU holds memory of it
        content = {"facts": describe_machine(), "layers": options.layers, "steps": steps, "first_calls": firsts}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
