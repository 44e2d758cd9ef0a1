"""Runs a suite: group after group, prompt after prompt, every condition on each.

What is compared alternates: a repetition takes one prompt through all conditions of its group,
the next one in the opposite order, and the baseline goes first and last, so that a machine that
slows down meanwhile slows both sides of a ratio.
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from bench import costs, plan
from bench.bed import Bed, laid_out
from bench.machine import description
from bench.prompts import own_prompts, sample
from bench.results import ConditionResult, Costs, GroupResult, Record, Result
from bench.scenarios import Condition, Group, Suite, System
from bench.spreads import first_difference
from bench.systems import Task, configured, generate, prompt_tokens
from picospec.errors import ConfigError

SEED = 20260319
SLOWNESS_CYCLES = 3
T = TypeVar("T")
Say = Callable[[str], None]


def in_order(others: Sequence[T], baseline: T, repetition: int) -> list[T]:
    """One repetition: the baseline at both ends, the others forwards or backwards.

    >>> in_order(["a", "b"], "base", 0), in_order(["a", "b"], "base", 1)
    (['base', 'a', 'b', 'base'], ['base', 'b', 'a', 'base'])
    """
    between = list(others) if repetition % 2 == 0 else list(reversed(others))
    return [baseline, *between, baseline]


def runnable(suite: Suite) -> tuple[Suite, list[str]]:
    """The suite without what this edge has no settings for, and what that was."""
    left_out: list[str] = []

    def kept(group: Group) -> Group:
        conditions = []
        for condition in group.conditions:
            try:
                configured(condition)
            except ConfigError as error:
                left_out.append(f"{group.name}, {condition.name}: {error}")
            else:
                conditions.append(condition)
        return replace(group, conditions=tuple(conditions))

    return replace(suite, groups=tuple(map(kept, suite.groups))), left_out


async def run(
    suite: Suite, logs: Path, keep: Callable[[Result], None], *, eager: bool, say: Say
) -> Result:
    """Measure everything. `keep` gets what there is after each group.

    Raises CommandFailed if the servers do not come up.
    """
    started_s = time.monotonic()
    suite, left_out = runnable(suite)
    for each in left_out:
        say(f"not run: {each}")
    drafts = sorted({each.draft for each in suite.conditions if each.draft is not None})
    result = Result(
        suite=suite.name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=description(),
        settings={},
        groups=[],
        costs=Costs(),
        not_run=left_out,
    )
    say("starting both engines and the drafters ...")
    async with laid_out(drafts, logs, eager=eager) as bed:
        result.settings = bed.settings
        session = _Run(bed, suite, say, started_s)
        await session.warm_up()
        result.costs = await costs.measure(bed, session.prompts[0], suite.cost_cycles)
        say(f"costs: {result.costs}")
        session.costs, bed.verify_ms = result.costs, result.costs.alone_ms
        for number, group in enumerate(suite.groups):
            result.groups.append(await session.run_group(number, group))
            result.wall_s = time.monotonic() - started_s
            keep(result)
    return result


class _Run:
    """The progress of a suite."""

    def __init__(self, bed: Bed, suite: Suite, say: Say, started_s: float) -> None:
        self._bed = bed
        self._suite = suite
        self._say = say
        self._ends_s = started_s + suite.budget_min * 60
        self._estimated_s = 0.0  # of the groups so far
        self._spent_s = 0.0
        self.costs = Costs()
        count = max(group.num_prompts for group in suite.groups)
        self._prompts = sample(own_prompts(), count, SEED)
        self.prompts = [prompt_tokens(bed, each.prompt) for each in self._prompts]  # tokenized

    async def warm_up(self) -> None:
        """A short text by every system and draft: code is loaded, kernels are chosen."""
        await self._bed.set_link(0.0, None)
        seen: set[tuple[System, str | None]] = set()
        for condition in self._suite.conditions:
            if (key := (condition.system, condition.draft)) in seen:
                continue
            seen.add(key)
            here = replace(condition, rtt_ms=0.0, kbit_s=None)
            task = Task("warm-up", self.prompts[0], plan.WARM_UP_TOKENS, seed=1)
            record = await generate(self._bed, here, task)
            if record.error:
                raise RuntimeError(f"warm-up of {condition.name}: {record.error}")

    async def run_group(self, number: int, group: Group) -> GroupResult:
        started_s = time.monotonic()
        num_prompts = self._affordable(number, group, started_s)
        results = [ConditionResult(condition) for condition in group.conditions]
        results[0].baseline = True
        rtt_ms, kbit_s, _ = group.conditions[0].link
        await self._bed.set_link(rtt_ms, kbit_s)
        for result in results:
            result.round_trip_ms = self._bed.round_trip_ms
        prompt = self.prompts[0]
        slowness = await costs.slowness(self._bed, prompt, self.costs, SLOWNESS_CYCLES)
        self._say(f"{group.name}: slowness {slowness}")
        for repetition in range(num_prompts):
            await self._repeat(repetition, group, results)
        wall_s = time.monotonic() - started_s
        self._estimated_s += num_prompts * plan.repetition_s(group)
        self._spent_s += wall_s
        self._say(f"{group.name}: {num_prompts} prompts in {wall_s / 60:.1f} min")
        return GroupResult(group.name, group.max_tokens, results, wall_s, slowness)

    async def _repeat(self, repetition: int, group: Group, results: list[ConditionResult]) -> None:
        reference: list[int] | None = None  # the baseline's text
        baseline, *others = results
        for order, result in enumerate(in_order(others, baseline, repetition)):
            condition = result.condition
            task = Task(
                prompt_id=self._prompts[repetition].id,
                prompt_token_ids=self.prompts[repetition],
                max_tokens=group.max_tokens,
                seed=SEED + repetition,
                order=order,
            )
            record = await generate(self._bed, condition, task)
            if not record.error and owes_baseline(condition):
                if reference is not None:
                    difference = first_difference(record.token_ids, reference)
                    record = replace(record, compared=True, first_difference=difference)
                elif result is baseline:
                    reference = record.token_ids
            result.records.append(record)
            self._say(f"  {group.name:<14} {condition.name:<48} {_line(record)}")

    def _affordable(self, number: int, group: Group, now_s: float) -> int:
        pace = self._spent_s / self._estimated_s if self._estimated_s else 1.0
        return plan.affordable(
            group.num_prompts,
            plan.estimated_s(group),
            sum(map(plan.estimated_s, self._suite.groups[number + 1 :])),
            max(pace, 0.1),
            self._ends_s - now_s,
        )


def owes_baseline(condition: Condition) -> bool:
    """Whether its text must be stock vLLM's, token for token."""
    return condition.temperature == 0.0 and condition.system is not System.EDGE_ONLY


def commit() -> str:
    """What was measured: the commit, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def _line(record: Record) -> str:
    if record.error:
        return f"FAILED: {record.error}"
    differs = record.first_difference
    return (
        f"{record.tokens_per_s:6.1f} tokens/s  ttft {record.ttft_s * 1e3:5.0f} ms"
        f"  accepted {record.accepted}/{record.drafted}"
        + ("" if differs is None else f"  DIFFERS at {differs}")
    )
