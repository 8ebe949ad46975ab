"""Page attention beside its peers: `python -m bench.decode --peers fa3 --json decode.json`.

Times bfloat16 decode inside one jitted program per case, over rotating page tables, and checks every timed case
against the float32 reference in the same run. Examples:

    python -m bench.decode --cases 1x4096,64x4096 --configs 'default;block_n=64,num_warps=4,num_stages=3'
    python -m bench.decode --sweep 'block_n=32,64,128;num_warps=4,8;num_stages=2,3,4' --time-limit 420
    JAX_PLATFORMS=cpu python -m bench.decode --cases 2x48,ragged3 --pool-gb 0.2 --platform xla --repeats 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.cases import NAMES, parse_case
from bench.comparison import Plan, add_options, exit_code, finish_options, geometry_of, run_plan
from bench.operations import OPERATIONS


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", default=",".join(NAMES), help="by commas: SEQUENCESxLENGTH, raggedSEQUENCES; see bench.cases"
    )
    add_options(parser, layout="PHTD")
    options = parser.parse_args(arguments)
    try:
        cases = [parse_case(name, **geometry_of(options)) for name in options.cases.split(",")]
        plan = Plan(OPERATIONS["page_attention"], {"decode": cases})
        finish_options(options, plan)
    except ValueError as error:
        parser.error(str(error))
    return options, plan


def main(arguments: Sequence[str] | None = None) -> int:
    options, plan = parse_arguments(arguments)
    return exit_code(run_plan(plan, options))


if __name__ == "__main__":
    sys.exit(main())
