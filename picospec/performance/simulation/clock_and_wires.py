"""What the two ends of a simulated session share: time, chance, the wires, and the counts.

An event is (time, rank, what to do). Of events at the same time those of lower rank go first: what
has happened comes before what begins.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from picospec.performance.costs import Acceptance, Costs, Network, Scheme, Text, check_acceptance

# Ranks of events at the same time.
HAPPENED, ARRIVES, STEP_ENDS, IS_HEARD, BEGINS = range(5)


class SimulatedDraft(NamedTuple):
    place: int
    is_good: bool  # whether it will be accepted


class SimulatedVerdict(NamedTuple):
    epoch: int
    num_accepted: int
    num_own: int  # coupled: the recovered or bonus token
    rejected: bool


@dataclass(slots=True)
class Counts:
    verdicts: int = 0
    forwards: int = 0
    accepted: int = 0
    verify_ms: float = 0.0
    draft_ms: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


class Step:
    """An engine's step: slower while the drafter computes, as `Costs.contention` says."""

    def __init__(self, world: World, ms: float, ended: Callable[[float], None]) -> None:
        """`ms`: what it takes alone; `ended` is told what it took."""
        self._world = world
        self._left_ms = ms
        self._ended = ended
        self._began_ms = self._told_ms = world.now_ms
        self._speed = 1.0
        self._version = 0  # of the plan to end
        self.retime()

    def retime(self) -> None:
        """The drafter begins or ends to compute, or did."""
        world = self._world
        self._left_ms -= (world.now_ms - self._told_ms) * self._speed
        self._told_ms = world.now_ms
        self._speed = 1.0 / world.costs.contention if world.is_drafting else 1.0
        self._version += 1
        version = self._version
        world.after(max(0.0, self._left_ms) / self._speed, STEP_ENDS, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version == self._version:
            self._world.step = None
            self._ended(self._world.now_ms - self._began_ms)


class World:
    """`deliver` and `hear` are where the wires end; the simulation sets them."""

    deliver: Callable[[int, list[SimulatedDraft], bool], None]  # epoch, drafts, with a head?
    hear: Callable[[SimulatedVerdict], None]

    def __init__(
        self,
        costs: Costs,
        scheme: Scheme,
        link: Network,
        alpha: Acceptance | Text,
        seed: int,
    ) -> None:
        self.costs, self.scheme, self.link, self.alpha = costs, scheme, link, alpha
        self.now_ms = 0.0
        self.rng = random.Random(seed)
        self.counts = Counts()
        self.is_drafting = False
        self.step: Step | None = None  # that the engine is at
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._up, self._down = Wire(self), Wire(self)

    @property
    def next_ms(self) -> float:
        """When the next event is; infinity if none is."""
        return self._events[0][0] if self._events else float("inf")

    @property
    def last_place(self) -> float:
        """Of the text that is replayed; chance goes on without an end."""
        return len(self.alpha.accepted) - 1 if isinstance(self.alpha, Text) else float("inf")

    def accepts(self, place: int, run_base: int) -> bool:
        """Whether a draft will be accepted, if those from `run_base` on are; to be asked once."""
        if isinstance(self.alpha, Text):
            return self.alpha.accepted[place]
        alphas = check_acceptance(self.alpha)
        return self.rng.random() < alphas[min(place - run_base, len(alphas)) - 1]

    def drafts(self, is_drafting: bool) -> None:
        """Whether the drafter computes from now on."""
        if is_drafting is not self.is_drafting:
            self.is_drafting = is_drafting
            if self.step is not None and self.costs.contention > 1.0:
                self.step.retime()

    def play_next(self) -> None:
        self.now_ms, _, _, handle = heapq.heappop(self._events)
        handle()

    def after(self, delay_ms: float, rank: int, handle: Callable[[], None]) -> None:
        self.at(self.now_ms + delay_ms, rank, handle)

    def at(self, time_ms: float, rank: int, handle: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_ms, rank, next(self._order), handle))

    def send_up(self, num_bytes: int, handle: Callable[[], None]) -> None:
        self.counts.bytes_up += num_bytes
        self._up.send(num_bytes, ARRIVES, handle)

    def send_down(self, num_bytes: int, handle: Callable[[], None]) -> None:
        self.counts.bytes_down += num_bytes
        self._down.send(num_bytes, IS_HEARD, handle)


class Wire:
    """One direction: first in, first out, also where the delay shrinks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._busy_until_ms = 0.0
        self._last_arrival_ms = 0.0

    def send(self, num_bytes: int, rank: int, handle: Callable[[], None]) -> None:
        world = self._world
        begin_ms = max(world.now_ms, self._busy_until_ms)
        self._busy_until_ms = begin_ms + world.link.transfer_ms(num_bytes)
        arrival_ms = self._busy_until_ms + world.link.rtt_ms / 2
        self._last_arrival_ms = max(self._last_arrival_ms, arrival_ms)
        world.at(self._last_arrival_ms, rank, handle)
