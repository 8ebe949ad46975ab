"""A prefix that many sequences share, attended once for all of them, beside one flat call.

Decodes one token of each sequence in bfloat16: with one call for all keys, with the recipe's calls one after another,
and with both at once, which XLA lets run side by side where a program is compiled for that. A call's queries are what
the call before answered, as they come from the layer before in a model: so calls wait for each other, whatever XLA lets
run at once. The first output is checked against the float32 reference, all others against those of the flat call.

    python -m bench.shared_prefix --json shared_prefix.json
    JAX_PLATFORMS=cpu python -m bench.shared_prefix --sequences 4 --own 24 --shared 32,64 --platform xla --pool-gb 0.05
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench.cases import ArgumentSet, AttentionCase, argument_sets, num_pool_pages, parse_case
from bench.check import ROW_TOLERANCE, build_check, row_error
from bench.runner import Pool
from bench.timing import (
    Timing,
    add_sampling_options,
    compile_program,
    copy_bandwidth,
    describe_machine,
    measure_program,
    print_machine,
    sampling_of,
)
from jax_bridge import UnifiedAttentionConfig, merge_attention_states, unified_attention

SHARED = (512, 1024, 2048, 4096, 8192, 16384, 32768)
LAYOUT = "PTHD"
AT_ONCE = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}  # kernels wait only for those that they depend on


def attend_shared_prefix(
    queries: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    prefix_len: jax.Array,
    prefix_pages: jax.Array,
    own_lens: jax.Array,
    own_tables: jax.Array,
    query_start_loc: jax.Array,
    *,
    prefix_splits: int | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of sequences whose first `prefix_len` tokens stand in the same pages.

    Args:
        queries: `[T, Hq, D]`, packed as for `unified_attention`; new tokens come after the prefix.
        key_cache: `[P, ps, Hkv, D]`.
        value_cache: `[P, ps, Hkv, Dv]`.
        prefix_len: integer `[1]`.
        prefix_pages: integers `[1, prefix pages]`.
        own_lens: integers `[S]`, tokens of each sequence behind the prefix, the new ones included.
        own_tables: integers `[S, own pages]`, their pages.
        query_start_loc: integers `[S + 1]`.
        prefix_splits: splits of the prefix, so few that its programs leave a part of the device to the own tokens, for
            a program whose calls may run at once. None: as many as are best for calls one after another.
        **options: of `unified_attention`, but no windows and no ALiBi, which count positions across both parts.

    Returns:
        The output `[T, Hq, Dv]` and the LSE `[T, Hq]`.
    """
    attend = functools.partial(unified_attention, queries, key_cache, value_cache, return_lse=True)
    # Sinks count once, and the bias is between new tokens.
    own_options = {name: options.pop(name, None) for name in ("attention_sink", "qq_bias")}
    # One sequence of all rows: its keys are read once, and every row sees all of them.
    every_row = query_start_loc[jnp.array([0, -1])]
    prefix_options = dict(options)
    if prefix_splits is not None:
        cfg = options.get("cfg") or UnifiedAttentionConfig()
        prefix_options["cfg"] = dataclasses.replace(cfg, num_par_softmax_segments=prefix_splits)
        # Programs of the prefix take a whole multiprocessor each, so they must come first. The same lengths again, by a
        # kernel that waits for the queries too, hold the others back for 3 us.
        own_lens = jnp.maximum(own_lens, jnp.isnan(queries[:1, 0, 0]).any() & (own_lens > 0))
    prefix = attend(prefix_len, prefix_pages, every_row, causal=False, **prefix_options)
    own = attend(own_lens, own_tables, query_start_loc, **own_options, **options)
    merged: tuple[jax.Array, jax.Array] = merge_attention_states(*prefix, *own, platform=options.get("platform"))
    return merged


def share_prefix(case: AttentionCase, arguments: ArgumentSet, shared: int) -> ArgumentSet:
    """The same tables, all of which begin with the pages that the first one begins with."""
    tables = arguments.block_tables.copy()
    tables[:, : shared // case.page_size] = tables[0, : shared // case.page_size]
    return ArgumentSet(arguments.query, tables)


def _flat(platform: str, *arrays: Any) -> jax.Array:
    key_cache, value_cache, starts, queries, lens, tables = arrays
    attended: jax.Array = unified_attention(
        queries, key_cache, value_cache, lens, tables, starts, kv_layout=LAYOUT, platform=platform
    )
    return attended


def _recipe(platform: str, prefix_splits: int | None, *arrays: Any) -> jax.Array:
    key_cache, value_cache, starts, queries, *parts = arrays
    attended, _ = attend_shared_prefix(
        *(queries, key_cache, value_cache, *parts, starts),
        prefix_splits=prefix_splits,
        kv_layout=LAYOUT,
        platform=platform,
    )
    return attended


def time_shared_length(shared: int, pool: Pool, case: AttentionCase, options: argparse.Namespace) -> dict[str, Timing]:
    """All ways over argument sets that rotate through the pool.

    Raises:
        ArithmeticError: an output is wrong.
    """
    calls, chunks = case.rotation(options.max_calls)
    sets = [share_prefix(case, arguments, shared) for arguments in argument_sets(case, pool.pages, calls * chunks)]
    check = build_check(case, pool.caches, pool.layout, sets[0])
    starts, lens = jnp.asarray(case.query_start_loc), jnp.array(case.lengths, jnp.int32)
    flat, recipe = [], []
    # An engine has the tables of both parts ready, as it has those of the flat call, and a step the same starts.
    for each in sets:
        query, tables = jnp.asarray(each.query, jnp.bfloat16), jnp.asarray(each.block_tables)
        prefix_pages, own_tables = jnp.split(tables, [shared // case.page_size], axis=1)
        flat.append((query, lens, tables))
        recipe.append((query, jnp.array([shared]), prefix_pages[:1], lens - shared, own_tables))
    ways: dict[str, tuple[Callable[..., jax.Array], list[Any], dict[str, str]]] = {
        "flat": (functools.partial(_flat, options.platform), flat, {}),
        "recipe": (functools.partial(_recipe, options.platform, None), recipe, {}),
        "at_once": (functools.partial(_recipe, options.platform, options.prefix_splits), recipe, AT_ONCE),
    }
    timings = {}
    flat_outputs: tuple[jax.Array, ...] = ()
    for name, (way, arrays, compiler_options) in ways.items():
        program = compile_program(
            way,
            arrays,
            shared=(*pool.caches, starts),
            calls_per_program=calls,
            chained=True,
            compiler_options=compiler_options,
        )
        outputs = program.run(0)
        flat_outputs = flat_outputs or tuple(jnp.copy(output) for output in outputs)
        error = check.error(outputs[0])
        # Both have errors of their own. The queries of later calls differ too, by no more than the tolerance.
        between = max(row_error(*both) for both in zip(outputs, flat_outputs, strict=True))
        if not (error <= ROW_TOLERANCE and between <= 2 * ROW_TOLERANCE):
            raise ArithmeticError(
                f"{name} over {shared} shared tokens: row error {error:.2e}, allowed {ROW_TOLERANCE}; beside the flat "
                f"call {between:.2e}, allowed {2 * ROW_TOLERANCE}"
            )
        timings[name] = measure_program(program, **sampling_of(options))
    return timings


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.shared_prefix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", default=",".join(map(str, SHARED)), help="shared tokens by commas: whole pages")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--own", type=int, default=256, help="tokens of each sequence behind the prefix")
    parser.add_argument("--platform", default="triton")
    parser.add_argument("--prefix-splits", type=int, default=5, help="of the prefix, where both calls run at once")
    parser.add_argument("--pool-gb", type=float, default=24.0, help="K and V cache together")
    parser.add_argument("--max-calls", type=int, default=64, help="calls in one program at most")
    add_sampling_options(parser)
    options = parser.parse_args(arguments)
    options.shared = [int(length) for length in options.shared.split(",")]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    cases = [parse_case(f"{options.sequences}x{shared + options.own}") for shared in options.shared]
    pool = Pool.build(cases[0].geometry, num_pool_pages(cases, options.pool_gb * 1e9), LAYOUT)
    facts = describe_machine()
    rates = copy_bandwidth(min(1 << 30, int(options.pool_gb * 1e9 / 4)), repeats=options.repeats)
    print_machine(facts, rates)
    print(
        f"{options.sequences} sequences of {options.own} own tokens, bfloat16, 32 query and 8 KV heads of width 128\n"
    )
    print("| shared tokens | flat us | recipe us | flat / recipe | at once us | flat / at once |")
    print("|---|---|---|---|---|---|")
    rows = []
    for shared, case in zip(options.shared, cases, strict=True):
        timings = time_shared_length(shared, pool, case, options)
        medians = {name: timing.median for name, timing in timings.items()}
        flat, *others = medians.values()
        columns = [f"{flat * 1e6:.1f}", *(f"{other * 1e6:.1f} | {flat / other:.2f}" for other in others)]
        print("|", shared, "|", " | ".join(columns), "|", flush=True)
        rows.append({"shared": shared, **medians})
    if options.json:
        sizes = {"sequences": options.sequences, "own": options.own, "prefix_splits": options.prefix_splits}
        options.json.write_text(json.dumps({"facts": facts, "copy": rates, **sizes, "seconds": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
