"""Unified attention beside its peers: `python -m bench.unified --peers fa3 --json unified.json`.

Times any mix of prompts and decodes in bfloat16, as `bench.decode` times single tokens: in one jitted program per case,
over rotating page tables and queries, every timed case checked in the same run. `bench.report` draws what it stores.
Examples:

    python -m bench.unified --groups prefill,mixed --configs 'default;prefill_block_m=128,num_stages=3'
    python -m bench.unified --groups cliff,chunks --peers fa3 --json scaling.json --time-limit 420
    python -m bench.unified --cases 1x4096of4096,1x1024of1024 --operation prefill_page_attention
    JAX_PLATFORMS=cpu python -m bench.unified --cases 2x48+1x5of9,2x7of30-window8 --pool-gb 0.2 --platform xla
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.cases import DEFAULT_GROUPS, GROUPS, AttentionCase, parse_case
from bench.comparison import Plan, add_options, exit_code, finish_options, geometry_of, run_plan
from bench.operations import OPERATIONS


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.unified", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--groups",
        help=f"by commas, of {', '.join(GROUPS)}; default: {','.join(DEFAULT_GROUPS)}, or none if there are --cases",
    )
    parser.add_argument("--cases", default="", help="further cases by commas; see parse_case in bench/cases.py")
    parser.add_argument("--operation", choices=list(OPERATIONS), default="unified_attention")
    add_options(parser, layout="PTHD")
    options = parser.parse_args(arguments)
    try:
        plan = Plan(OPERATIONS[options.operation], select_groups(options))
        finish_options(options, plan)
    except ValueError as error:
        parser.error(str(error))
    return options, plan


def select_groups(options: argparse.Namespace) -> dict[str, list[AttentionCase]]:
    """The cases of the chosen groups, and those that were named under `cases`.

    Raises:
        ValueError: there is no such group, or no such case.
    """
    default = () if options.cases else DEFAULT_GROUPS
    chosen = default if options.groups is None else tuple(filter(None, options.groups.split(",")))
    if unknown := set(chosen) - set(GROUPS):
        raise ValueError(f"unknown groups {sorted(unknown)}, expected some of {list(GROUPS)}")
    names = {name: GROUPS[name] for name in chosen}
    if options.cases:
        names["cases"] = tuple(options.cases.split(","))
    return {group: [parse_case(name, **geometry_of(options)) for name in names[group]] for group in names}


def main(arguments: Sequence[str] | None = None) -> int:
    options, plan = parse_arguments(arguments)
    return exit_code(run_plan(plan, options))


if __name__ == "__main__":
    sys.exit(main())
