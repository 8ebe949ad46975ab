"""Dense causal attention on the platforms of one machine: `python -m bench.dense --json dense.json`.

Every output is held to the float32 reference on some rows before it is timed. A platform that refuses a case, or runs
out of memory, is named. Examples:

    python -m bench.dense --cases 1x4096,1x16384,8x2048 --platforms triton,cuda,xla
    JAX_PLATFORMS=cpu python -m bench.dense --cases 2x48,1x64-window8 --platforms xla --rotation-mb 1 --repeats 3

A case `8x2048` is 8 sequences of 2048 tokens; `-window1024` and `-cap30` change it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import reference
from bench.cases import visible_pairs
from bench.check import ROW_TOLERANCE, row_error
from bench.timing import (
    Program,
    add_sampling_options,
    compile_program,
    describe_machine,
    matrix_rate,
    measure_program,
    print_machine,
    sampling_of,
)
from jax_bridge import attention
from tests.cases import MODELS, Model

NAMES = ("1x1024", "1x4096", "1x16384", "8x2048")
PLATFORMS = ("triton", "cuda", "xla")
CHECKED_ROWS = 16

Arrays = tuple[jax.Array, jax.Array, jax.Array]  # query, key, value


@dataclass(frozen=True)
class DenseCase:
    """Sequences of one length in bfloat16, every row of which sees itself and what comes before."""

    name: str
    batch: int
    length: int
    model: Model
    window: int | None = None
    """Tokens that a row sees, itself counted."""
    soft_cap: float | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations of both products over the pairs that the masks leave."""
        pairs = self.batch * visible_pairs(self.length, self.length, self.window)
        return 4 * self.model.head_dim * self.model.num_q_heads * pairs

    @property
    def num_bytes(self) -> int:
        """Bytes of queries, keys, values and outputs."""
        heads = 2 * self.model.num_q_heads + 2 * self.model.num_kv_heads
        return 2 * self.batch * self.length * heads * self.model.head_dim

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `attention`."""
        window = None if self.window is None else (self.window - 1, 0)
        return {"causal": True, "sliding_window": window, "logits_soft_cap": self.soft_cap}

    @property
    def checked_rows(self) -> NDArray[np.int32]:
        """Some rows, the first and the last among them."""
        rows = np.linspace(0, self.length - 1, min(self.length, CHECKED_ROWS)).round()
        return np.unique(rows).astype(np.int32)

    def sets(self, rotation_bytes: float) -> list[Arrays]:
        """Arrays of each call, so many that they come to `rotation_bytes`."""
        count = max(2, math.ceil(rotation_bytes / self.num_bytes))
        heads = (self.model.num_q_heads, self.model.num_kv_heads, self.model.num_kv_heads)
        shapes = [(self.batch, self.length, number, self.model.head_dim) for number in heads]

        @jax.jit
        def draw(key: jax.Array) -> Any:
            keys = jax.random.split(key, len(shapes))
            return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True))

        return [draw(jax.random.key(number)) for number in range(count)]

    def error(self, arrays: Arrays, out: jax.Array) -> float:
        """Largest relative error of the checked rows of an output."""
        query, key, value = (array.astype(jnp.float32) for array in arrays)
        rows, keys = self.checked_rows[:, None], np.arange(self.length)
        visible = keys <= rows
        if self.window is not None:
            visible &= keys > rows - self.window
        with jax.default_matmul_precision("highest"):
            expected = reference.attention(
                query[:, self.checked_rows],
                key,
                value,
                mask=jnp.asarray(visible)[None, None],
                dtype=jnp.float32,
                logits_soft_cap=self.soft_cap,
            )
        return row_error(out[:, self.checked_rows], expected)

    def program(self, platform: str, sets: Sequence[Arrays]) -> Program:
        """The calls on a platform, in one program."""
        return compile_program(functools.partial(attention, **self.options, dtype=None, platform=platform), sets)


def parse_case(name: str, model: str = "llama3_8b") -> DenseCase:
    """The case that `name` describes.

    Raises:
        ValueError: `name` is no such description.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:-window([1-9]\d*))?(?:-cap([1-9]\d*))?", name)
    if match is None:
        raise ValueError(f"unknown case {name!r}: expected something like {NAMES[0]} or 8x2048-window1024-cap30")
    batch, length, window, cap = (None if text is None else int(text) for text in match.groups())
    return DenseCase(name, batch or 0, length or 0, MODELS[model], window, None if cap is None else float(cap))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.dense", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(NAMES), help="by commas")
    parser.add_argument("--platforms", default="triton,cuda", help=f"by commas, of {', '.join(PLATFORMS)}")
    parser.add_argument("--model", choices=list(MODELS), default="llama3_8b", help="whose heads; see tests/cases.py")
    parser.add_argument("--rotation-mb", type=float, default=1000.0, help="of the arrays of a program's calls")
    add_sampling_options(parser)
    options = parser.parse_args(arguments)
    try:
        cases = [parse_case(name, options.model) for name in options.cases.split(",")]
    except ValueError as error:
        parser.error(str(error))
    facts = describe_machine()
    rate = matrix_rate(8192 if jax.default_backend() == "gpu" else 256, repeats=5)
    print_machine(facts, {})
    print(f"matrix product: {rate / 1e12:.1f} TFLOP/s\n\n| case | platform | us | TFLOP/s | of matrix product |")
    print("|---|---|---|---|---|")
    rows = []
    for case in cases:
        sets = case.sets(options.rotation_mb * 1e6)
        for platform in options.platforms.split(","):
            try:
                program = case.program(platform, sets)
                row_error_found = case.error(sets[0], program.run(0)[0])
            except Exception as error:  # the other platforms still run
                failure = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
                print(f"| {case.name} | {platform} | {failure} | | |")
                rows.append({"case": case.name, "platform": platform, "failure": failure})
                continue
            if not row_error_found <= ROW_TOLERANCE:
                words = f"row error {row_error_found:.2e}, allowed {ROW_TOLERANCE}"
                raise ArithmeticError(f"{case.name} on {platform}: {words}")
            timing = measure_program(program, **sampling_of(options))
            achieved = case.flops / timing.median
            print(
                f"| {case.name} | {platform} | {timing.median * 1e6:.1f} | {achieved / 1e12:.1f} "
                f"| {achieved / rate:.0%} |",
                flush=True,
            )
            rows.append({"case": case.name, "platform": platform, "flops": case.flops, "timing": asdict(timing)})
    if options.json:
        content = {"facts": facts, "matrix_flops_per_second": rate, "model": options.model, "cases": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    timed = {row["case"] for row in rows if "timing" in row}
    return 0 if timed == {case.name for case in cases} else 1


if __name__ == "__main__":
    sys.exit(main())
