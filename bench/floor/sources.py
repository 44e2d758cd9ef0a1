"""Where answers come from: stock vLLM, an edge, or a fleet of edges; and what they cost."""

import os
import signal
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from bench import openings
from bench.bed import LINK_TIMEOUT_S, Bed
from bench.fleet.replay import ReplayDrafting
from bench.floor.grid import Contender
from bench.machine import cpu_time_s
from bench.stock.client import StockClient
from bench.systems import Task, edge_settings, speculator
from edge_agent.drafting.context import Drafting
from edge_agent.link import CloudLink
from edge_agent.observer import NullObserver
from picospec.protocol.messages import Verdict

STOPPED_DRAFT = "int8"


@dataclass(frozen=True, slots=True)
class Spent:
    """Since some start. What stock vLLM has not is 0."""

    cloud_cpu_s: float
    edge_cpu_s: float  # this process and the drafter's
    forwards: int = 0  # of the target, told by verdicts
    engine_s: float = 0.0  # steps, told by verdicts: one that serves many chats counts for each
    drafted: int = 0
    judged: int = 0
    accepted: int = 0

    def __sub__(self, earlier: "Spent") -> "Spent":
        return Spent(
            self.cloud_cpu_s - earlier.cloud_cpu_s,
            self.edge_cpu_s - earlier.edge_cpu_s,
            self.forwards - earlier.forwards,
            self.engine_s - earlier.engine_s,
            self.drafted - earlier.drafted,
            self.judged - earlier.judged,
            self.accepted - earlier.accepted,
        )


class Source(Protocol):
    async def ready(self, chats: int) -> None:
        """Open connections, so that none is opened while time is taken."""

    def stream(self, chat: int, task: Task, temperature: float) -> AsyncGenerator[tuple[int, ...]]:
        """Token ids as they come. Raises what the way to them raises."""

    def spent(self) -> Spent: ...


class StockSource:
    """Stock vLLM: a connection for each chat. Kept between runs unless a text was left."""

    def __init__(self, bed: Bed) -> None:
        self._port = bed.stock_relay.port
        self._pid = bed.stock_pid
        self._idle: list[StockClient] = []

    async def ready(self, chats: int) -> None:
        while len(self._idle) < chats:
            self._idle.append(await StockClient.connect(self._port))

    async def stream(
        self, chat: int, task: Task, temperature: float
    ) -> AsyncGenerator[tuple[int, ...]]:
        client = self._idle.pop()
        is_whole = False
        tokens = client.generate(
            task.prompt_token_ids.tolist(), task.max_tokens, temperature, task.seed
        )
        try:
            async for token_ids in tokens:
                yield token_ids
            is_whole = True
        finally:
            if is_whole:
                self._idle.append(client)
            else:
                client.close()  # the rest of the answer must not reach the next

    def spent(self) -> Spent:
        return Spent(cpu_time_s(self._pid), time.process_time())

    def close(self) -> None:
        for client in self._idle:
            client.close()


class Tally(NullObserver):
    """Sums over all generations of an edge."""

    def __init__(self) -> None:
        self.forwards = 0
        self.engine_s = 0.0
        self.drafted_tokens = 0
        self.judged = 0
        self.accepted = 0

    def verdict(self, verdict: Verdict) -> None:
        self.forwards += verdict.num_forwards
        self.engine_s += verdict.compute_us * 1e-6
        self.judged += verdict.num_draft_tokens
        self.accepted += verdict.num_accepted

    def drafted(self, num_tokens: int) -> None:
        self.drafted_tokens += num_tokens


class EdgeSource:
    """One edge or many, chats dealt out in turn. What they learn stays with them."""

    def __init__(self, bed: Bed, contender: Contender, links: Sequence[CloudLink]) -> None:
        config = edge_settings(dict(contender.settings))
        self._bed = bed
        self._tally = Tally()
        self._edges = [
            speculator(config, link, _drafting(bed, contender), card=bed.card, observer=self._tally)
            for link in links
        ]

    def learn(self, tasks: Sequence[Task], texts: Mapping[str, Sequence[int]]) -> None:
        """A fleet: the text that each edge is going to replay, by prompt."""
        for edge, task in zip(self._edges, tasks, strict=True):
            assert isinstance(edge.drafting, ReplayDrafting)
            text = texts[task.prompt_id]
            edge.drafting.learn(len(task.prompt_token_ids), text, seed=task.seed)

    async def ready(self, chats: int) -> None:
        for edge in self._edges:
            assert isinstance(edge.link, CloudLink)
            await edge.link.get_model()

    async def stream(
        self, chat: int, task: Task, temperature: float
    ) -> AsyncGenerator[tuple[int, ...]]:
        request = openings.request(
            task.prompt_token_ids, task.max_tokens, temperature=temperature, seed=task.seed
        )
        generation = self._edges[chat % len(self._edges)].generate(request)
        try:
            async for chunk in generation:
                yield chunk.token_ids
        finally:
            await generation.aclose()

    def spent(self) -> Spent:
        pid = self._edges[0].drafting.pid  # a replay has none
        drafter_s = cpu_time_s(pid) if pid is not None else 0.0
        tally = self._tally
        return Spent(
            cpu_time_s(self._bed.cloud_pid),
            time.process_time() + drafter_s,
            tally.forwards,
            tally.engine_s,
            tally.drafted_tokens,
            tally.judged,
            tally.accepted,
        )


def _drafting(bed: Bed, contender: Contender) -> Drafting:
    """The prepared drafter, or one for a single emulated edge."""
    if contender.drafter == "replay":
        return ReplayDrafting(alpha=contender.alpha, token_s=contender.token_ms / 1e3)
    return bed.drafting[STOPPED_DRAFT if contender.drafter == "stopped" else contender.drafter]


class Links:
    """A connection for each emulated edge, opened when first wanted. A single edge has the
    bed's own."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        self._links = [bed.cloud]

    def take(self, count: int) -> Sequence[CloudLink]:
        address = f"127.0.0.1:{self._bed.cloud_relay.port}"
        while len(self._links) < count:
            self._links.append(CloudLink(address, connect_timeout_s=LINK_TIMEOUT_S))
        return self._links[:count]

    async def close(self) -> None:
        for link in self._links[1:]:
            await link.close()


@contextmanager
def stopped(pid: int | None) -> Iterator[None]:
    """The process computes nothing meanwhile. A replaced one, which is another process, does."""
    if pid is None:
        raise RuntimeError("there is no drafter to stop")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was replaced
            os.kill(pid, signal.SIGCONT)
