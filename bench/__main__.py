"""The WAN benchmark: `python -m bench --suite quick --output FOLDER`.

Writes SUITE.json (every generation), SUITE-costs.json, and the report with its plots (report/).
Ends with status 1 if a generation failed, or if a greedy text differs from stock vLLM's.
"""

import argparse
import asyncio
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import plan
from bench.report import document
from bench.results import Result
from bench.runner import run
from bench.scenarios import SUITES
from picospec_cli.console import CommandFailed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=tuple(SUITES), default="full")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), metavar="FOLDER")
    parser.add_argument("--group", action="append", help="run this group only (repeatable)")
    parser.add_argument("--prompts", type=int, help="at most so many prompts per group")
    parser.add_argument("--plan", action="store_true", help="say how long it will take, and end")
    parser.add_argument("--eager", action="store_true", help="do not compile: to try things out")
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]()
    wanted = arguments.group or [group.name for group in suite.groups]
    if unknown := set(wanted) - {group.name for group in suite.groups}:
        parser.error(f"no group {', '.join(sorted(unknown))} in suite {suite.name}")
    most = arguments.prompts or sys.maxsize
    groups = (
        replace(group, num_prompts=min(group.num_prompts, most))
        for group in suite.groups
        if group.name in wanted
    )
    suite = replace(suite, groups=tuple(groups))
    plan.show(suite)
    if arguments.plan:
        return 0
    path = arguments.output / f"{suite.name}.json"
    keep, say = partial(Result.save, path=path), partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="picospec-bench-") as logs:
        try:
            result = asyncio.run(run(suite, Path(logs), keep, eager=arguments.eager, say=say))
        except CommandFailed as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    report = document.write(result, arguments.output)
    print(f"{path} and {report} are written, the costs beside them")
    return status(result)


def status(result: Result) -> int:
    """0 if all is well; says what is not."""
    failed = [
        f"{group.name}, {each.condition.name}: {record.error}"
        for group in result.groups
        for each in group.conditions
        for record in each.records
        if record.error
    ]
    differing = [
        f"{each.condition.name}, rtt {each.condition.rtt_ms:g} ms, prompt {record.prompt_id}: "
        f"differs from stock vLLM at token {record.first_difference}"
        for each, record in result.compared
        if record.first_difference is not None
    ]
    for problem in failed + differing:
        print(problem, file=sys.stderr)
    return 1 if failed or differing else 0


if __name__ == "__main__":
    sys.exit(main())
