"""Decoding on several devices: KV heads shared out, or the keys of every sequence, beside one device.

Every timed output is checked against the float32 reference first.

    python -m bench.sharded --devices 2 --json sharded.json
    XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu python -m bench.sharded --case 3x40 \
        --platform xla --pool-gb 0.02 --repeats 2
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from bench.cases import ArgumentSet, AttentionCase, argument_sets, num_pool_pages, parse_case
from bench.check import ROW_TOLERANCE, build_check
from bench.runner import Pool
from bench.timing import Timing, add_sampling_options, describe_machine, measure, print_machine, sampling_of
from jax_bridge import page_attention

LAYOUT = "PTHD"
AXIS = "devices"
COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


def attend_sharded_sequences(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    context_lens: jax.Array,
    block_tables: jax.Array,
    *,
    axis_name: str,
    attention_sink: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Decodes sequences whose keys are spread over devices; to be called inside `jax.shard_map`.

    Args:
        query: `[S, Hq, D]`, the same on every device.
        key_cache: this device's pages, in `page_attention`'s layout.
        value_cache: likewise.
        context_lens: integers `[S]`, how many keys of each sequence this device holds, which may be none.
        block_tables: integers `[S, MP]`, this device's pages of each sequence.
        axis_name: the mesh axis over which the keys are spread.
        attention_sink: `[Hq]`, the same on every device.
        **options: of `page_attention`, but no windows and no ALiBi, which count positions across all devices.

    Returns:
        The output `[S, Hq, D]`, the same on every device.
    """
    if attention_sink is not None:  # counts once
        attention_sink = jnp.where(jax.lax.axis_index(axis_name) == 0, attention_sink, -jnp.inf)
    out, lse = page_attention(
        query,
        key_cache,
        value_cache,
        context_lens,
        block_tables,
        attention_sink=attention_sink,
        return_lse=True,
        **options,
    )
    largest = jax.lax.pmax(lse, axis_name)
    weight = jnp.exp(lse - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jax.lax.psum(weight, axis_name)
    merged = jax.lax.psum(out.astype(jnp.float32) * weight[..., None], axis_name)
    return (merged / jnp.where(total > 0, total, 1.0)[..., None]).astype(query.dtype)


@dataclass(frozen=True)
class Way:
    """How decoding is spread over the devices.

    Attributes:
        attend: called with one device's part of query, both caches, lengths and tables.
        specs: of these.
        answer: of the output.
        splits_keys: whether lengths and tables are `[devices, S]` and `[devices, S, MP]`, each device's own.
    """

    attend: Callable[..., jax.Array]
    specs: tuple[PartitionSpec, ...]
    answer: PartitionSpec
    splits_keys: bool = False


def ways(platform: str) -> dict[str, Way]:
    """By name."""
    options: dict[str, Any] = {"kv_layout": LAYOUT, "platform": platform}
    everywhere, parts = PartitionSpec(), PartitionSpec(AXIS)
    heads, cache_heads = PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS)

    def attend_own_keys(query: Any, key_cache: Any, value_cache: Any, lens: Any, tables: Any) -> jax.Array:
        return attend_sharded_sequences(query, key_cache, value_cache, lens[0], tables[0], axis_name=AXIS, **options)

    attend = functools.partial(page_attention, **options)
    return {
        "KV heads": Way(attend, (heads, cache_heads, cache_heads, everywhere, everywhere), heads),
        "keys": Way(attend_own_keys, (everywhere, parts, parts, parts, parts), everywhere, splits_keys=True),
    }


def spread_over(
    case: AttentionCase, pages: int, devices: int, count: int
) -> list[tuple[ArgumentSet, NDArray[np.int32]]]:
    """Argument sets in which every device has an equal part of each sequence in its part of the pool.

    Returns:
        Sets with tables into the whole pool, and each device's own tables `[devices, S, MP / devices]`.
    """
    part = dataclasses.replace(case, lengths=tuple(length // devices for length in case.lengths))
    own = np.stack([s.block_tables for s in argument_sets(part, pages // devices, count)])  # [count, S, MP / devices]
    shared = [np.stack([own[(index + device) % count] for device in range(devices)]) for index in range(count)]
    offsets = (np.arange(devices) * (pages // devices)).astype(np.int32)[:, None, None]
    queries = [s.query for s in argument_sets(case, pages, count)]
    return [
        (ArgumentSet(query, np.concatenate(list(tables + offsets), axis=1)), tables)
        for query, tables in zip(queries, shared, strict=True)
    ]


def time_way(way: Way | None, mesh: Mesh, pool: Pool, case: AttentionCase, options: argparse.Namespace) -> Timing:
    """Decoding on the devices of the mesh, or by a plain call on one where there is no `way`.

    Raises:
        ArithmeticError: the output is wrong.
        AssertionError: heads are shared out, and the compiled program holds a collective all the same.
    """
    calls, chunks = case.rotation(options.max_calls)
    spread = spread_over(case, pool.pages, mesh.size, calls * chunks)
    check = build_check(case, pool.caches, LAYOUT, spread[0][0])
    lens = np.array(case.lengths, np.int32)
    if way is None:
        attend: Callable[..., jax.Array] = functools.partial(
            page_attention, kv_layout=LAYOUT, platform=options.platform
        )
        shardings: Any = [mesh.devices.flat[0]] * 5
    else:
        attend = jax.shard_map(way.attend, mesh=mesh, in_specs=way.specs, out_specs=way.answer, check_vma=False)
        shardings = [NamedSharding(mesh, spec) for spec in way.specs]
    caches = [jax.device_put(cache, place) for cache, place in zip(pool.caches, shardings[1:3], strict=True)]
    sets = []
    for whole, own in spread:
        splits_keys = way is not None and way.splits_keys
        lengths = np.tile(lens // mesh.size, (mesh.size, 1)) if splits_keys else lens
        arrays = (jnp.asarray(whole.query, jnp.bfloat16), lengths, own if splits_keys else whole.block_tables)
        sets.append([jax.device_put(a, place) for a, place in zip(arrays, [shardings[0], *shardings[3:]], strict=True)])
    groups = [sets[start : start + calls] for start in range(0, len(sets), calls)]

    def program(caches: Any, group: Any) -> list[jax.Array]:
        return [attend(query, *caches, lens, tables) for query, lens, tables in group]

    compiled = jax.jit(program).lower(caches, groups[0]).compile()
    if way is not None and not way.splits_keys and (found := COLLECTIVES.search(compiled.as_text() or "")):
        raise AssertionError(f"the program of {calls} calls over shared-out KV heads holds {found[0]}")
    output = jnp.asarray(jax.device_get(compiled(caches, groups[0])[0]))
    if not (error := check.error(output)) <= ROW_TOLERANCE:
        raise ArithmeticError(f"{case.name} on {mesh.size} devices: row error {error:.2e}, allowed {ROW_TOLERANCE}")
    return measure(
        lambda index: compiled(caches, groups[index % len(groups)]),
        calls=calls,
        **sampling_of(options),
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sharded", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="64x8192", help="sequences x keys; each device gets whole pages of each")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--platform", default="triton")
    parser.add_argument("--pool-gb", type=float, default=8.0, help="K and V cache together")
    parser.add_argument("--max-calls", type=int, default=32, help="calls in one program at most")
    add_sampling_options(parser)
    options = parser.parse_args(arguments)
    if len(jax.devices()) < options.devices:
        parser.error(f"--devices {options.devices}, but JAX has {len(jax.devices())}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    case = parse_case(options.case)
    if any(length % (case.page_size * options.devices) for length in case.lengths):
        raise ValueError(f"case {case.name} has lengths that {options.devices} devices cannot share by whole pages")
    mesh = Mesh(np.array(jax.devices()[: options.devices]), (AXIS,))
    pages = num_pool_pages([case], options.pool_gb * 1e9) // options.devices * options.devices
    pool = Pool.build(case.geometry, pages, LAYOUT)
    facts = describe_machine()
    print_machine(facts, {})
    alone = time_way(None, mesh, pool, case, options)
    timings = {"one device": alone} | {
        name: time_way(way, mesh, pool, case, options) for name, way in ways(options.platform).items()
    }
    print(f"\n{case.name} on {options.devices} devices\n\n| shared out | us | speed-up |\n|---|---|---|")
    for name, timing in timings.items():
        print(f"| {name} | {timing.median * 1e6:.1f} | {alone.median / timing.median:.2f} |")
    if options.json:
        stored = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
        options.json.write_text(
            json.dumps({"facts": facts, "case": case.to_json(), "timings": stored}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
