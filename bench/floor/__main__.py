"""The floor: `python -m bench.floor`, the default settings against stock vLLM in every cell.

Writes floor.md and floor.json. Ends with status 1 if a cell is below 0.95 of stock vLLM's tokens
per second, if one failed, or if a greedy text leaves that of stock vLLM.
"""

import argparse
import asyncio
import re
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bench.floor import report
from bench.floor.grid import grid, pair_grid
from bench.floor.runner import run
from bench.machine import description, read_bandwidth_gb_s
from bench.runner import commit
from picospec_cli.console import CommandFailed
from picospec_cli.pairs import DEFAULT, PAIRS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.floor", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few cells of each kind")
    parser.add_argument("--cells", metavar="PATTERN", help="cells whose name this expression finds")
    parser.add_argument("--minutes", type=float, default=45.0, help="to be done by then (45)")
    parser.add_argument(
        "--pair", choices=tuple(PAIRS), default=DEFAULT.name,
        help="target and draft; a pair of two models has cells of its own (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the cells, and end")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), metavar="FOLDER")
    parser.add_argument("--eager", action="store_true", help="do not compile: to try things out")
    arguments = parser.parse_args()
    pattern = re.compile(arguments.cells or "")
    groups = []
    pair = PAIRS[arguments.pair]
    for group in grid(quick=arguments.quick) if pair is DEFAULT else pair_grid():
        kept = tuple(contender for name, contender in group.cells if pattern.search(name))
        if kept:
            groups.append(replace(group, contenders=kept))
    if arguments.list or not groups:
        print("\n".join(name for group in groups for name, _ in group.cells) or "no such cell")
        return 0 if groups else 2
    say = partial(print, flush=True)
    started_s = time.monotonic()
    bandwidth_gb_s = read_bandwidth_gb_s()
    with tempfile.TemporaryDirectory(prefix="picospec-floor-") as logs:
        try:
            cells, settings = asyncio.run(
                run(
                    groups,
                    Path(logs),
                    minutes=arguments.minutes,
                    eager=arguments.eager,
                    say=say,
                    pair=pair,
                )
            )
        except CommandFailed as error:
            print(f"bench.floor: {error}", file=sys.stderr)
            return 1
    about = report.About(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=description(),
        read_bandwidth_gb_s=bandwidth_gb_s,
        settings=settings,
        wall_s=time.monotonic() - started_s,
    )
    print(f"{report.write(cells, about, arguments.output, pair)} is written, all trials beside it")
    problems = [problem for cell in cells for problem in cell.problems]
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
