"""Page attention beside its peers: `python -m bench.decode --peers fa3 --json decode.json`.

Times bfloat16 decode inside one jitted program per case, over rotating page tables, and checks every timed case
against the float32 reference in the same run. Examples:

    python -m bench.decode --cases 1x4096,64x4096 --configs 'default;block_n=64,num_warps=4,num_stages=3'
    python -m bench.decode --sweep 'block_n=32,64,128;num_warps=4,8;num_stages=2,3,4' --time-limit 420
    JAX_PLATFORMS=cpu python -m bench.decode --cases 2x48,ragged3 --pool-gb 0.2 --platform xla --repeats 3
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jax_bridge
import reference
from bench.decode_cases import (
    KEY_SALT,
    NAMES,
    VALUE_SALT,
    DecodeCase,
    argument_sets,
    num_pool_pages,
    parse_case,
    scramble,
)
from bench.decode_report import (
    CaseReport,
    Measurement,
    print_ranking,
    print_report,
    print_robust_configs,
    write_json,
)
from bench.peers import PEERS, PeerReport, run_peer
from bench.timing import Program, Timing, compile_program, copy_bandwidth, describe_machine, measure_program
from jax_bridge.layouts import LAYOUTS

DEFAULT_SWEEP = "block_n=32,64,128;num_warps=2,4,8;num_stages=2,3,4,5"
CHECKED_TOKENS = 65_536  # sequences are checked against the reference until they hold this many tokens
SWEEP_REPEATS, SWEEP_SAMPLE_SECONDS, SWEEP_MAX_CALLS, SWEEP_FINALISTS = 5, 0.008, 32, 3
DEFAULT_CONFIG = "default"

# Rounding an output to bfloat16 and rounding the weights to bfloat16 before they meet V each add a relative error of
# at most 2^-8 to a term, evenly spread: about 0.6 * 2^-8 of the norm of a row of head_dim values. Twice 2^-8 is three
# times that; one key left out of 4096 moves the worst of 32 heads by several times this.
ROW_TOLERANCE = 2.0**-7

Config = dict[str, Any]  # fields of PageAttentionConfig: integers and booleans


@dataclass(frozen=True)
class Check:
    """What the reference answers for some sequences of argument set 0."""

    sequences: NDArray[np.intp]
    expected: NDArray[np.float64]  # [len(sequences), Hq, D]

    def error(self, output: Any) -> float:
        """Largest relative error of a row of `output [S, Hq, D]`; NaN if anything is NaN."""
        return row_error(np.asarray(output, np.float64)[self.sequences], self.expected)


def row_error(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Largest norm of a difference of rows (last axis), relative to the expected row."""
    differences = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(np.max(differences))


@functools.partial(jax.jit, static_argnames=("case", "pages", "layout", "salt"))
def build_cache(case: DecodeCase, pages: int, layout: str, salt: int) -> jax.Array:
    """A cache in `layout` whose contents depend on page, token, head and dim alone, as in the peers' caches."""
    sizes = {"P": pages, "T": case.page_size, "H": case.num_kv_heads, "D": case.head_dim}
    shape = tuple(sizes[axis] for axis in layout)
    page, token, head, dim = (jax.lax.broadcasted_iota(jnp.uint32, shape, layout.index(axis)) for axis in "PTHD")
    within = (token * jnp.uint32(case.num_kv_heads) + head) * jnp.uint32(case.head_dim) + dim
    values: jax.Array = scramble(page, within, salt, jnp.uint32).astype(jnp.int32) - 128
    return (values.astype(jnp.float32) / 64).astype(jnp.bfloat16)


def build_check(
    case: DecodeCase, caches: tuple[jax.Array, jax.Array], layout: str, query: Any, block_tables: NDArray[np.int32]
) -> Check:
    """Run the float32 reference on sequences spread over the batch, with their pages copied out of the pool."""
    stride = max(1, case.num_seqs * max(case.lengths) // CHECKED_TOKENS)
    sequences = np.unique(np.append(np.arange(0, case.num_seqs, stride), case.num_seqs - 1))
    tables = block_tables[sequences]
    pages = jnp.asarray(tables.reshape(-1))
    key, value = (jnp.take(cache, pages, axis=layout.index("P")).astype(jnp.float32) for cache in caches)
    attend = jax.jit(functools.partial(reference.page_attention, kv_layout=layout))
    lengths = jnp.asarray(np.array(case.lengths, np.int32)[sequences])
    renumbered = jnp.arange(tables.size, dtype=jnp.int32).reshape(tables.shape)
    with jax.default_matmul_precision("highest"):
        expected = attend(jnp.asarray(query[sequences]), key, value, lengths, renumbered)
    return Check(sequences, np.asarray(expected, np.float64))


def parse_configs(text: str) -> list[Config]:
    """Configurations separated by `;`, fields by `,`: `default;block_n=64,num_warps=4`."""
    configs: list[Config] = []
    for item in text.split(";"):
        fields = [field.partition("=") for field in item.split(",") if field.strip() not in ("", DEFAULT_CONFIG)]
        configs.append({name.strip(): _field_value(value) for name, _, value in fields})
    return configs


def parse_sweep(text: str) -> list[Config]:
    """All combinations of a grid `block_n=32,64;num_warps=4,8`, after the default configuration."""
    axes = [axis.partition("=") for axis in text.split(";") if axis.strip()]
    names = [name.strip() for name, _, _ in axes]
    values = [[_field_value(value) for value in choices.split(",")] for _, _, choices in axes]
    return [{}, *(dict(zip(names, choice, strict=True)) for choice in itertools.product(*values))]


def _field_value(text: str) -> int | bool:
    word = text.strip().lower()
    return word == "true" if word in ("true", "false") else int(word)


def config_name(config: Config) -> str:
    return ",".join(f"{name}={value}" for name, value in config.items()) or DEFAULT_CONFIG


@dataclass(frozen=True)
class Bench:
    """The pool, and how to time cases on it."""

    caches: tuple[jax.Array, jax.Array]
    pages: int
    layout: str
    platform: str
    max_calls: int
    jobs: int
    check: bool
    deadline: float

    def attend(self, config: Config, *arrays: Any) -> Any:
        key_cache, value_cache, query, context_lens, block_tables = arrays
        return jax_bridge.page_attention(
            query,
            key_cache,
            value_cache,
            context_lens,
            block_tables,
            kv_layout=self.layout,
            platform=self.platform,
            cfg=jax_bridge.PageAttentionConfig(**config) if config else None,
        )

    def compile(self, config: Config, sets: Sequence[tuple[Any, ...]], calls: int) -> Program | str:
        """The program of one configuration, or how it failed: a sweep meets configurations that do not fit."""
        if time.monotonic() > self.deadline:
            return "time limit"
        try:
            fn = functools.partial(self.attend, config)
            return compile_program(fn, sets, shared=self.caches, calls_per_program=calls)
        except Exception as error:
            return _words(error)

    def run_case(
        self, case: DecodeCase, configs: Sequence[Config], repeats: int, sample_seconds: float
    ) -> tuple[list[Measurement], Check | None, Any]:
        """Compile all configurations, then time each; also the check and the first right output for set 0."""
        calls, chunks = case.rotation(self.max_calls)
        plain_sets = argument_sets(case, self.pages, calls * chunks)
        lengths = jnp.array(case.lengths, jnp.int32)
        sets = [(jnp.asarray(s.query, jnp.bfloat16), lengths, jnp.asarray(s.block_tables)) for s in plain_sets]
        check = None
        if self.check:
            check = build_check(case, self.caches, self.layout, plain_sets[0].query, plain_sets[0].block_tables)
        with ThreadPoolExecutor(self.jobs) as pool:
            programs = list(pool.map(lambda config: self.compile(config, sets, calls), configs))
        measurements = []
        first_output: Any = None
        for config, program in zip(configs, programs, strict=True):
            measurement, output = self.time(config_name(config), program, check, repeats, sample_seconds)
            measurements.append(measurement)
            if first_output is None and measurement.failure is None:
                first_output = output
        return measurements, check, first_output

    def time(
        self, name: str, program: Program | str, check: Check | None, repeats: int, sample_seconds: float
    ) -> tuple[Measurement, Any]:
        if isinstance(program, str):
            return Measurement(name, None, failure=program), None
        if time.monotonic() > self.deadline:
            return Measurement(name, None, failure="time limit"), None
        try:
            output = np.asarray(program.run(0)[0].astype(jnp.float32))
            timing = measure_program(program, repeats=repeats, sample_seconds=sample_seconds)
        except Exception as error:
            return Measurement(name, None, failure=_words(error)), None
        error_found = check.error(output) if check else None
        failure = None
        if error_found is not None and not error_found <= ROW_TOLERANCE:
            failure = f"wrong: row error {error_found:.2e} exceeds {ROW_TOLERANCE:.2e}"
        return Measurement(name, timing, error_found, failure), output


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def peer_columns(
    case: DecodeCase, peers: Sequence[PeerReport], check: Check | None, output: Any
) -> Iterator[tuple[str, Timing, float]]:
    """Name, timing and largest row error of each peer that answered.

    The error is against the reference, and over all sequences against our output where there is one, whichever is
    larger; each side may be off by `ROW_TOLERANCE`.
    """
    for peer in peers:
        if (result := peer.results.get(case.name)) is None:
            continue
        actual = result.output.astype(np.float64)
        error = check.error(actual) if check else math.nan
        if output is not None:
            error = float(np.fmax(error, row_error(actual, np.asarray(output, np.float64))))
        yield peer.name, Timing(result.median, result.low, result.high, 0.0), error


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(NAMES), help="SEQUENCESxLENGTH or raggedSEQUENCES, by commas")
    parser.add_argument("--peers", default="", help=f"peers by commas, of {', '.join(PEERS)}; default: none")
    parser.add_argument(
        "--configs", default=DEFAULT_CONFIG, help="fields of PageAttentionConfig: a=1,b=2;a=3 or default"
    )
    parser.add_argument("--sweep", nargs="?", const=DEFAULT_SWEEP, help=f"grid; if bare {DEFAULT_SWEEP!r}")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="against the reference")
    parser.add_argument("--json", type=Path, help="store all numbers here")
    parser.add_argument("--platform", default="triton", help="platform of page_attention")
    parser.add_argument("--layout", choices=LAYOUTS, default="PHTD", help="kv_layout of our cache; peers use PTHD")
    parser.add_argument("--pool-gb", type=float, default=24.0, help="K and V cache together, in each process")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sample-ms", type=float, default=30.0, help="length of a timed sample")
    parser.add_argument("--max-calls", type=int, default=64, help="calls in one program at most")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="threads that compile")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which nothing new starts")
    for name, size in (("page-size", 16), ("num-q-heads", 32), ("num-kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args(arguments)
    geometry = {name: getattr(options, name) for name in ("page_size", "num_q_heads", "num_kv_heads", "head_dim")}
    try:
        options.cases = [parse_case(name, **geometry) for name in options.cases.split(",")]
        options.pages = num_pool_pages(options.cases, options.pool_gb * 1e9)
        options.configs = parse_sweep(options.sweep) if options.sweep else parse_configs(options.configs)
    except ValueError as error:
        parser.error(str(error))
    options.peers = [name for name in options.peers.split(",") if name]
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"unknown peers {sorted(unknown)}, expected some of {PEERS}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    deadline = time.monotonic() + options.time_limit
    sample_seconds = options.sample_ms / 1e3
    peers = [  # before JAX takes any memory of the device
        run_peer(
            name,
            options.cases,
            options.pool_gb * 1e9,
            max_calls=options.max_calls,
            repeats=options.repeats,
            sample_seconds=sample_seconds,
        )
        for name in options.peers
    ]
    copy_bytes = min(1 << 30, int(options.pool_gb * 1e9 / 4))
    copy_rates = copy_bandwidth(copy_bytes, repeats=options.repeats, sample_seconds=sample_seconds)
    key_cache, value_cache = (
        build_cache(options.cases[0], options.pages, options.layout, salt) for salt in (KEY_SALT, VALUE_SALT)
    )
    bench = Bench(
        caches=(key_cache, value_cache),
        pages=options.pages,
        layout=options.layout,
        platform=options.platform,
        max_calls=min(options.max_calls, SWEEP_MAX_CALLS) if options.sweep else options.max_calls,
        jobs=options.jobs,
        check=options.check,
        deadline=deadline,
    )
    reports = []
    for case in options.cases:
        repeats, length = (SWEEP_REPEATS, SWEEP_SAMPLE_SECONDS) if options.sweep else (options.repeats, sample_seconds)
        measurements, check, output = bench.run_case(case, options.configs, repeats, length)
        if options.sweep:
            measurements = _refine(bench, case, options.configs, measurements, options.repeats, sample_seconds)
        columns = list(peer_columns(case, peers, check, output))
        report = CaseReport(
            case,
            tuple(measurements),
            {name: timing for name, timing, _ in columns},
            {name: error for name, _, error in columns},
        )
        reports.append(report)
        if len(options.configs) > 1:
            print_ranking(report)
    if len(options.configs) > 1:
        print_robust_configs(reports)
    facts = {**describe_machine(), "cache": f"{options.layout}, {options.pages} pages, bfloat16"}
    print_report(reports, copy_rates, peers, facts)
    if options.json:
        write_json(options.json, reports, copy_rates, peers, facts)
    wrong_peers = {
        f"{name} on {report.case.name}: row error {error:.1e}"
        for report in reports
        for name, error in report.peer_errors.items()
        if not error <= 2 * ROW_TOLERANCE
    }
    for sentence in sorted(wrong_peers):
        print(f"peers disagree: {sentence}")
    return int(bool(wrong_peers) or not all(report.timed for report in reports))


def _refine(
    bench: Bench,
    case: DecodeCase,
    configs: Sequence[Config],
    measurements: Sequence[Measurement],
    repeats: int,
    sample_seconds: float,
) -> list[Measurement]:
    """Time the fastest configurations of a sweep again, with all repeats."""
    quick = CaseReport(case, tuple(measurements), {}, {})
    finalists = {measurement.config for _, measurement in quick.timed[:SWEEP_FINALISTS]}
    again, _, _ = bench.run_case(
        case, [config for config in configs if config_name(config) in finalists], repeats, sample_seconds
    )
    settled = {measurement.config: measurement for measurement in again if measurement.failure is None}
    return [settled.get(measurement.config, measurement) for measurement in measurements]


if __name__ == "__main__":
    sys.exit(main())
