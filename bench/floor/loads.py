"""Running one load on one source: what comes out is a sample for each cell of it."""

import asyncio
import statistics
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from bench.bed import Bed
from bench.floor.grid import Change, Contender, Group, Kind, Load
from bench.floor.sources import STOPPED_DRAFT, Source, Spent, stopped
from bench.prompts import own_prompts, sample
from bench.systems import Stopwatch, Task, prompt_tokens
from picospec.protocol.messages import TokenArray

SEED = 20260319
TURNS = 3
FOLLOW_UP = "Go on, and say it in other words."
LOOKED_AT = (1, TURNS)  # turns
CHANGED_RTT_MS = 200.0
CROWD = 15
CROWD_TOKENS = 256
UNTIL_CHANGE_S = 2.0  # from the first token
SETTLING_S = 5.0  # from the change to where tokens are counted
COUNTED_S = 5.0

Texts = dict[str, list[int]]  # by prompt


@dataclass(frozen=True, slots=True)
class Sample:
    """One run's figures; of a chat, or medians over chats. Times in seconds."""

    tokens_per_s: float
    ttft_s: float
    second_s: float  # from the first token to the second
    longest_s: float  # gap between two tokens
    evenness: float = 1.0  # the slowest chat's tokens per second over their mean


@dataclass(frozen=True, slots=True)
class Run:
    samples: dict[str, Sample]  # by part of the load: "", or a turn's name
    texts: Texts
    spent: Spent

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.texts.values()))


def gaps(watch: Stopwatch) -> list[float]:
    return [after - before for before, after in zip(watch.times_s, watch.times_s[1:], strict=False)]


def sample_of(watches: Sequence[Stopwatch], tokens_per_s: float) -> Sample:
    speeds = [len(watch.token_ids) / (watch.last_s - watch.started_s) for watch in watches]
    return Sample(
        tokens_per_s,
        ttft_s=statistics.median(watch.first_s - watch.started_s for watch in watches),
        second_s=statistics.median((gaps(watch) or [0.0])[0] for watch in watches),
        longest_s=max(max(gaps(watch), default=0.0) for watch in watches),
        evenness=min(speeds) / statistics.fmean(speeds),
    )


def rate_of_all(watches: Sequence[Stopwatch]) -> float:
    """Tokens per second of all chats together, from the first token of the last that begins to the
    last token of the first that ends.

    Before that the cloud reads prompts (`Sample.ttft_s`), after that its batch shrinks.
    """
    from_s = max(watch.first_s for watch in watches)
    until_s = min(watch.last_s for watch in watches)
    if until_s <= from_s:
        raise ValueError("a chat has ended before the last one began")
    return rate_between(watches, from_s, until_s)


def rate_between(watches: Sequence[Stopwatch], from_s: float, until_s: float) -> float:
    """Tokens per second of all chats together, after `from_s` and up to `until_s`."""
    came = sum(from_s < at_s <= until_s for watch in watches for at_s in watch.times_s)
    return came / (until_s - from_s)


class Loads:
    """Runs loads on a bed whose link is set."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        self._prompts = sample(own_prompts(), len(own_prompts()), SEED)

    def tasks(self, group: Group, repetition: int) -> list[Task]:
        """One for each chat; later repetitions have other prompts as long as there are some."""
        load = group.load
        if load.prompt_tokens:
            name = f"{load.prompt_tokens} {group.contenders[0].drafter} {repetition}"
            token_ids = self._long_prompt(load.prompt_tokens, name)
            return [Task(name, token_ids, load.max_tokens, SEED + repetition)]
        tasks = []
        prompts = [each for each in self._prompts if load.prompt_kind in ("", each.kind)]
        for chat in range(load.chats):
            number = repetition * load.chats + chat
            prompt = prompts[number % len(prompts)]
            token_ids = prompt_tokens(self._bed, prompt.prompt)
            tasks.append(Task(prompt.id, token_ids, load.max_tokens, SEED + number))
        return tasks

    async def run(
        self, load: Load, contender: Contender | None, source: Source, tasks: Sequence[Task]
    ) -> Run:
        """`contender` None: stock vLLM. Raises what the generations raise."""
        await source.ready(load.chats + (CROWD if load.change is Change.CROWD else 0))
        is_stopped = contender is not None and contender.drafter == "stopped"
        work = {Kind.TURNS: self._turns, Kind.CHANGE: self._change}.get(load.kind, self._crowd)
        before = source.spent()
        with stopped(self._bed.drafting[STOPPED_DRAFT].pid) if is_stopped else nullcontext():
            samples, texts = await work(load, contender, source, tasks)
        return Run(samples, texts, source.spent() - before)

    async def _crowd(
        self, load: Load, contender: Contender | None, source: Source, tasks: Sequence[Task]
    ) -> tuple[dict[str, Sample], Texts]:
        watches = [Stopwatch() for _ in tasks]
        async with asyncio.TaskGroup() as group:
            for chat, (task, watch) in enumerate(zip(tasks, watches, strict=True)):
                group.create_task(_follow(source, chat, task, load.temperature, watch))
        if load.kind is Kind.SINGLE:
            [watch] = watches
            record = watch.record(tasks[0])
            tokens_per_s = record.tokens_per_s
        else:
            tokens_per_s = rate_of_all(watches)
        texts = {task.prompt_id: each.token_ids for task, each in zip(tasks, watches, strict=True)}
        return {"": sample_of(watches, tokens_per_s)}, texts

    async def _turns(
        self, load: Load, contender: Contender | None, source: Source, tasks: Sequence[Task]
    ) -> tuple[dict[str, Sample], Texts]:
        """Each turn's prompt is all that was said before and a short question."""
        [task] = tasks
        question = prompt_tokens(self._bed, FOLLOW_UP)
        history = task.prompt_token_ids
        samples, texts = {}, {}
        for turn in range(1, TURNS + 1):
            watch = Stopwatch()
            name = f"{task.prompt_id}, turn {turn}"
            asked = Task(name, history, task.max_tokens, task.seed)
            await _follow(source, 0, asked, load.temperature, watch)
            if turn in LOOKED_AT:
                tokens_per_s = watch.record(asked).tokens_per_s
                samples[f"turn {turn}"] = sample_of([watch], tokens_per_s)
            texts[name] = watch.token_ids
            answer = np.asarray(watch.token_ids, np.int32)
            history = np.concatenate([history, answer, question])
        return samples, texts

    async def _change(
        self, load: Load, contender: Contender | None, source: Source, tasks: Sequence[Task]
    ) -> tuple[dict[str, Sample], Texts]:
        [task] = tasks
        others = [
            Task(each.id, prompt_tokens(self._bed, each.prompt), CROWD_TOKENS, SEED + number)
            for number, each in enumerate(self._prompts[-CROWD:])
        ]
        watches = [Stopwatch()]
        bed = self._bed
        async with AsyncExitStack() as stack:
            chats = await stack.enter_async_context(_Chats())
            chats.start(_follow(source, 0, task, load.temperature, watches[0]))
            while not watches[0].token_ids:
                chats.check()
                await asyncio.sleep(0.01)
            await asyncio.sleep(UNTIL_CHANGE_S)
            if load.change is Change.LINK:
                stack.push_async_callback(_set_links, bed, load.rtt_ms)
                await _set_links(bed, CHANGED_RTT_MS)
            elif load.change is Change.STOP and contender is not None:
                stack.enter_context(stopped(bed.drafting[contender.drafter].pid))
            elif load.change is Change.CROWD:
                for chat, other in enumerate(others, 1):
                    watches.append(Stopwatch())
                    chats.start(_follow(source, chat, other, load.temperature, watches[-1]))
            await asyncio.sleep(SETTLING_S)
            from_s = time.perf_counter()
            await asyncio.sleep(COUNTED_S)
            until_s = time.perf_counter()
            chats.check()
        begun = [watch for watch in watches if watch.token_ids]
        texts = {task.prompt_id: watches[0].token_ids}
        for other, watch in zip(others, watches[1:], strict=False):
            texts[other.prompt_id] = watch.token_ids
        return {"": sample_of(begun, rate_between(watches, from_s, until_s))}, texts

    def _long_prompt(self, num_tokens: int, name: str) -> TokenArray:
        """About so many tokens that begin with `name`: no other text shares their prefix."""
        text = name
        prompts = iter(self._prompts * (1 + num_tokens // len(self._prompts)))
        while len(tokens := prompt_tokens(self._bed, text)) < num_tokens:
            text += " " + next(prompts).prompt
        return tokens


async def _follow(
    source: Source, chat: int, task: Task, temperature: float, watch: Stopwatch
) -> None:
    watch.started_s = time.perf_counter()
    async with aclosing(source.stream(chat, task, temperature)) as tokens:
        async for token_ids in tokens:
            watch.add(token_ids)


async def _set_links(bed: Bed, rtt_ms: float) -> None:
    for relay in (bed.cloud_relay, bed.stock_relay):
        await relay.set(rtt_ms, None)


class _Chats:
    """Running generations; leaving it cancels those that still run."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def check(self) -> None:
        """Raises what one of them has raised."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
