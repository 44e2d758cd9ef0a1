"""Runs the grid within its time: every group once, then again as often as there is time.

What is compared alternates, as in bench/runner.py. A group that no longer fits is left out of a
round; what is cut short by the budget is so from the end of the last round, never a cell.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from bench.bed import Bed, laid_out
from bench.floor.gaps import Gaps
from bench.floor.grid import MODELS, Contender, Group, Kind, Load
from bench.floor.loads import Loads, Run
from bench.floor.results import Cell, trials
from bench.floor.sources import EdgeSource, Links, StockSource
from bench.runner import in_order
from bench.stock.server import EQUAL_SETTINGS
from bench.systems import Task
from picospec_cli.pairs import DEFAULT, Pair

SETTINGS = {
    **EQUAL_SETTINGS,
    "max_model_len": 8192,
    "kv_cache_memory_bytes": 1 << 29,  # 11,000 tokens of the default target
}
TURNS_SHARE = 0.25  # of the time, for the second bed
STOCK_TIMEOUT_S = 300.0
LEARNING_TOKENS = 192  # that an edge gets to know a link by, ...
LEARNING_CROWD_TOKENS = 160  # ... or a number of chats
LEARNING_REPETITION = 7  # its prompts are not those of the first repetitions
SLOWNESS_MAX = 4.0  # a contender that takes so many times stock vLLM's time has failed ...
PATIENCE_S = 20.0  # ... and so many seconds
Say = Callable[[str], None]


async def run(
    groups: Sequence[Group],
    logs: Path,
    *,
    minutes: float,
    eager: bool,
    say: Say,
    pair: Pair = DEFAULT,
) -> tuple[list[Cell], dict[str, Any]]:
    """The cells that there was time for, and both engines' settings.

    Turns of a chat have a bed of their own, whose engines keep a prefix cache. Raises
    CommandFailed if the servers do not come up.
    """
    started_s = time.monotonic()
    ends_s = started_s + 60 * minutes
    turns = [group for group in groups if group.load.kind is Kind.TURNS]
    others = [group for group in groups if group.load.kind is not Kind.TURNS]
    cells: list[Cell] = []
    settings: dict[str, Any] = {}
    share = TURNS_SHARE if turns else 0.0
    for part, until_s in ((others, ends_s - share * 60 * minutes), (turns, ends_s)):
        if not part:
            continue
        engine = {**SETTINGS, "enable_prefix_caching": part is turns, **pair.engine_args}
        say(f"starting both engines and the drafters for {len(part)} groups ...")
        drafts = sorted({*MODELS, "ngram"} & _drafters(part))
        gaps = Gaps(pair)
        async with laid_out(drafts, logs, eager=eager, settings=engine, pair=pair) as bed:
            settings = bed.settings
            cells += await Floor(bed, say, gaps).run(part, until_s)
        gaps.measure()
    return cells, settings


def _drafters(groups: Sequence[Group]) -> set[str]:
    wanted = {contender.drafter for group in groups for contender in group.contenders}
    return wanted | ({"int8"} if "stopped" in wanted else set())


class Floor:
    """All repetitions of some groups on one bed."""

    def __init__(self, bed: Bed, say: Say, gaps: Gaps) -> None:
        self._bed = bed
        self._gaps = gaps
        self._say = say
        self._loads = Loads(bed)
        self._links = Links(bed)
        self._stock = StockSource(bed)
        self._edges: dict[tuple[int, Contender], EdgeSource] = {}  # by how many there are
        self._known: set[tuple[Load, Contender]] = set()  # what an edge has been through
        self._cells: dict[tuple[Group, Contender, str], Cell] = {}

    async def run(self, groups: Sequence[Group], until_s: float) -> list[Cell]:
        took_s: dict[Group, float] = {}
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._links.close)
            stack.callback(self._stock.close)
            for repetition, group in rounds(groups, took_s, until_s):
                started_s = time.monotonic()
                await self._repeat(group, repetition)
                took_s[group] = time.monotonic() - started_s
        return list(self._cells.values())

    async def _repeat(self, group: Group, repetition: int) -> None:
        load = group.load
        await self._bed.set_link(load.rtt_ms, None)
        tasks = self._loads.tasks(group, repetition)
        for each in group.contenders:
            await self._introduce(group, each)
        stock: list[Run] = []
        ours: dict[Contender, Run | Exception] = {}
        stock_s = STOCK_TIMEOUT_S
        for contender in order(group, repetition):
            started_s = time.monotonic()
            if contender is None:
                async with asyncio.timeout(STOCK_TIMEOUT_S):
                    run = await self._loads.run(load, None, self._stock, tasks)
                stock.append(run)
                stock_s = time.monotonic() - started_s
                continue
            source = self._edge(load, contender)
            patience_s = min(STOCK_TIMEOUT_S, PATIENCE_S + SLOWNESS_MAX * stock_s)
            if contender.drafter == "replay":
                source.learn(tasks, stock[0].texts)
                if repetition == 0:
                    await self._attempt(load, contender, source, tasks, patience_s)
            ours[contender] = await self._attempt(load, contender, source, tasks, patience_s)
        for contender, outcome in ours.items():
            self._note(group, contender, tasks, stock, outcome)

    async def _attempt(
        self,
        load: Load,
        contender: Contender,
        source: EdgeSource,
        tasks: list[Task],
        patience_s: float,
    ) -> Run | Exception:
        """A failure is a result: the others go on."""
        try:
            async with asyncio.timeout(patience_s):
                return await self._loads.run(load, contender, source, tasks)
        except TimeoutError:
            return TimeoutError(f"it took more than {patience_s:.0f} s")
        except ExceptionGroup as errors:
            return errors.exceptions[0]
        except Exception as error:
            return error

    async def _introduce(self, group: Group, contender: Contender) -> None:
        """Chats that nobody counts, on a link or of a number that the edge has not met: an edge
        keeps what it has learnt, over restarts, too."""
        chats = group.load.chats
        load = Load(
            Kind.CHATS if chats > 1 else Kind.SINGLE,
            group.load.rtt_ms,
            1.0 if group.load.temperature else 0.0,
            LEARNING_CROWD_TOKENS if chats > 1 else LEARNING_TOKENS,
            chats=chats,
        )
        met = (load, contender)
        if met in self._known or not contender.is_default or contender.drafter == "replay":
            return  # a fleet replays texts that stock vLLM has to make first
        self._known.add(met)
        tasks = self._loads.tasks(Group(load, ()), LEARNING_REPETITION)
        source = self._edge(load, contender)
        await self._attempt(load, contender, source, tasks, STOCK_TIMEOUT_S)

    def _edge(self, load: Load, contender: Contender) -> EdgeSource:
        """An edge that all groups share, as a box in a house does; or the edges of a fleet."""
        count = load.chats if load.kind is Kind.FLEET else 1
        if (count, contender) not in self._edges:
            links = self._links.take(count)
            self._edges[count, contender] = EdgeSource(self._bed, contender, links)
        return self._edges[count, contender]

    def _note(
        self,
        group: Group,
        contender: Contender,
        tasks: Sequence[Task],
        stock: list[Run],
        ours: Run | Exception,
    ) -> None:
        for part, trial in trials(group.load, stock, ours).items():
            new = Cell(group.load, contender, part, group.wanted)
            cell = self._cells.setdefault((group, contender, part), new)
            cell.trials.append(trial)
            for difference in trial.differences:
                self._gaps.note(difference, tasks, stock[0].texts)
            tokens_per_s = trial.ours.tokens_per_s if trial.ours is not None else 0.0
            remarks = "  ".join(filter(None, [trial.error, *map(str, trial.differences)]))
            self._say(
                f"{cell.name:<60} {tokens_per_s:6.1f} / {trial.stock.tokens_per_s:6.1f} tokens/s"
                f" = {trial.ratio:5.2f}  {remarks}"
            )


def order(group: Group, repetition: int) -> list[Contender | None]:
    """None is the baseline: at both ends, or, where nothing may be asked twice, at either."""
    if group.load.kind is Kind.TURNS:
        both: list[Contender | None] = [None, *group.contenders]
        return both if repetition % 2 == 0 else both[::-1]
    return in_order(group.contenders, None, repetition)


def rounds(
    groups: Sequence[Group],
    took_s: dict[Group, float],
    until_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[int, Group]]:
    """Repetition and group, round after round, as long as one fits. `took_s` is the time of each
    group's last repetition, as far as there was one; in the first round all begin that can."""
    repetition = 0
    while True:
        fitting = False
        for group in groups:
            if clock() + took_s.get(group, 0.0) < until_s:
                fitting = True
                yield repetition, group
        if not fitting:
            return
        repetition += 1
