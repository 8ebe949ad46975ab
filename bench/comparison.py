"""The command line that `bench.decode` and `bench.unified` share: ours beside its peers in one run."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import AttentionCase, by_geometry, num_pool_pages
from bench.check import ROW_TOLERANCE, row_error
from bench.operations import DEFAULT_CONFIG, Operation, parse_configs, parse_sweep
from bench.peers import PEERS, PeerReport, run_peer
from bench.results import CaseReport, Results, print_ranking, print_report, print_robust_configs, write_json
from bench.runner import Bench, Outcome, Pool, Sampling
from bench.timing import Timing, add_sampling_options, copy_bandwidth, describe_machine, matrix_rate, sampling_of
from jax_bridge.layouts import LAYOUTS

DEFAULT_SWEEP = "block_n=32,64,128;num_warps=2,4,8;num_stages=2,3,4,5"
SWEEP_MAX_CALLS = 32
PEER_SHARE = 0.4  # of the time limit
PEER_SECONDS = 900.0  # at most


@dataclass(frozen=True)
class Plan:
    """What is to be timed: an operation, and the cases by groups, each in one or several."""

    operation: Operation
    groups: Mapping[str, Sequence[AttentionCase]]

    @property
    def cases(self) -> list[AttentionCase]:
        """Every case once."""
        return list({case.name: case for group in self.groups.values() for case in group}.values())

    def validate(self, pool_bytes: float) -> None:
        """Check that every case can be run.

        Raises:
            ValueError: the operation does not take a case, or the pool is too small for it.
        """
        for case in self.cases:
            if not self.operation.accepts(case):
                raise ValueError(f"{self.operation.name} takes {self.operation.requirement}, unlike case {case.name}")
        for cases in by_geometry(self.cases).values():
            num_pool_pages(cases, pool_bytes)


def add_options(parser: argparse.ArgumentParser, layout: str) -> None:
    """Add the options that every comparison has."""
    parser.add_argument("--peers", default="", help=f"peers by commas, of {', '.join(PEERS)}; default: none")
    parser.add_argument(
        "--configs", default=DEFAULT_CONFIG, help="fields of the operation's configuration: a=1,b=2;a=3 or default"
    )
    parser.add_argument("--sweep", nargs="?", const=DEFAULT_SWEEP, help=f"grid; if bare {DEFAULT_SWEEP!r}")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="against the reference")
    parser.add_argument("--platform", default="triton", help="platform of the operation")
    parser.add_argument("--layout", choices=LAYOUTS, default=layout, help="kv_layout of our cache; peers use PTHD")
    parser.add_argument("--pool-gb", type=float, default=24.0, help="K and V cache together, in each process")
    add_sampling_options(parser)
    parser.add_argument("--max-calls", type=int, default=64, help="calls in one program at most")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="threads that compile")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which nothing new starts")
    for name, size in (("page-size", 16), ("num-q-heads", 32), ("num-kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=size)


def geometry_of(options: argparse.Namespace) -> dict[str, int]:
    """The sizes that the options give to cases whose names leave them open."""
    return {name: getattr(options, name) for name in ("page_size", "num_q_heads", "num_kv_heads", "head_dim")}


def finish_options(options: argparse.Namespace, plan: Plan) -> None:
    """Parse configurations and peers in place.

    Raises:
        ValueError: something is misspelled, or cannot be run.
    """
    options.configs = parse_sweep(options.sweep) if options.sweep else parse_configs(options.configs)
    options.peers = [name for name in options.peers.split(",") if name]
    if unknown := set(options.peers) - set(PEERS):
        raise ValueError(f"unknown peers {sorted(unknown)}, expected some of {PEERS}")
    plan.validate(options.pool_gb * 1e9)


def run_plan(plan: Plan, options: argparse.Namespace) -> Results:
    """Time the peers, then ours; print and store what came of it."""
    deadline = time.monotonic() + options.time_limit
    sampling = Sampling(**sampling_of(options))
    peers = _run_peers(plan, options, sampling)  # before JAX takes any memory of the device
    copy_bytes = min(1 << 30, int(options.pool_gb * 1e9 / 4))
    facts = {
        **describe_machine(),
        "operation": f"{plan.operation.name} on {options.platform}",
        "cache": f"{options.layout}, {options.pool_gb:g} GB, bfloat16",
    }
    bench = Bench(
        operation=plan.operation,
        platform=options.platform,
        max_calls=min(options.max_calls, SWEEP_MAX_CALLS) if options.sweep else options.max_calls,
        jobs=options.jobs,
        check=options.check,
        deadline=deadline,
    )
    results = Results(
        reports=[],
        copy_rates=copy_bandwidth(copy_bytes, **sampling._asdict()),
        matrix_rate=matrix_rate(8192 if jax.default_backend() == "gpu" else 256, **sampling._asdict()),
        facts=facts,
        peers=peers,
        groups={name: [case.name for case in cases] for name, cases in plan.groups.items()},
    )
    reports: dict[str, CaseReport] = {}
    for report in _case_reports(bench, plan, options, sampling, peers):
        reports[report.case.name] = report
        results = replace(results, reports=[reports[case.name] for case in plan.cases if case.name in reports])
        if options.json:  # at once, so that it outlives whatever comes next
            write_json(options.json, results)
        if len(options.configs) > 1:
            print_ranking(report)
    if len(options.configs) > 1:
        print_robust_configs(results.reports)
    print_report(results)
    return results


def _run_peers(plan: Plan, options: argparse.Namespace, sampling: Sampling) -> list[PeerReport]:
    return [
        run_peer(
            name,
            plan.cases,
            options.pool_gb * 1e9,
            max_calls=options.max_calls,
            **sampling._asdict(),
            time_limit=min(PEER_SHARE * options.time_limit, PEER_SECONDS),
        )
        for name in options.peers
    ]


def _case_reports(
    bench: Bench, plan: Plan, options: argparse.Namespace, sampling: Sampling, peers: Sequence[PeerReport]
) -> Iterator[CaseReport]:
    """Time the cases, those of one geometry after those of another: there is memory for one pool at a time."""
    for geometry, cases in by_geometry(plan.cases).items():
        pool = Pool.build(geometry, num_pool_pages(cases, options.pool_gb * 1e9), options.layout)
        for case, outcome in bench.run(cases, options.configs, pool, sampling, sweep=bool(options.sweep)):
            columns = list(peer_columns(case, peers, outcome))
            yield CaseReport(
                case,
                tuple(outcome.measurements),
                {name: timing for name, timing, _ in columns},
                {name: error for name, _, error in columns},
            )
        del pool


def peer_columns(
    case: AttentionCase, peers: Sequence[PeerReport], outcome: Outcome
) -> Iterator[tuple[str, Timing, float]]:
    """Name, timing and largest row error of each peer that answered.

    The error is against the reference, and over all rows against our output where there is one, whichever is larger;
    each side may be off by `ROW_TOLERANCE`.
    """
    for peer in peers:
        if (result := peer.results.get(case.name)) is None:
            continue
        actual = jax.lax.bitcast_convert_type(jnp.asarray(result.output_bits), jnp.bfloat16)
        errors = [outcome.check.error(actual)] if outcome.check else []
        if outcome.output is not None:
            errors.append(row_error(actual, outcome.output))
        yield peer.name, Timing(result.median, result.low, result.high, 0.0), float(np.max(errors or math.nan))


def exit_code(results: Results) -> int:
    """1 where a case was not timed or a peer disagrees, which is printed; otherwise 0."""
    wrong_peers = {
        f"{name} on {report.case.name}: row error {error:.1e}"
        for report in results.reports
        for name, error in report.peer_errors.items()
        if not error <= 2 * ROW_TOLERANCE
    }
    for sentence in sorted(wrong_peers):
        print(f"peers disagree: {sentence}")
    return int(bool(wrong_peers) or not all(report.timed for report in results.reports))
