"""Takeover: when the cloud decodes a session's next token itself, because no draft is queued.

The edge names the policy in its Open (`AssistPolicy`). Exact in both modes, as long as the decision
looks at the past alone (clock, counts, verdicts), never at an unjudged draft. After a rejection in
split mode nobody asks: the next token is the edge's.

`auto` is a question of tokens per second. In a step that happens anyway a session joins: its token
costs one row. An engine that has nothing else to do may wait for a draft that is about to arrive:
that adds the draft's chance to be accepted to the next step, and the wait to its time. So it waits
while chance / wait is above the rate without waiting, and goes on alone otherwise.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from picospec.protocol.messages import AssistPolicy

MEMORY = 1 / 24  # of a verdict or an arrival, in what is expected
ACCEPTANCE_PRIOR = 0.7
LATE_SHARE, LATE_S = 0.3, 0.003  # beyond what was expected: the draft does not come
INTERVAL_MAX_S = 1.0  # between two drafts; a longer pause is no pace
RATE_MEMORY_S = 1.0
TOLD_MAX = 64  # verdicts that are remembered until their edge answers


@dataclass(frozen=True, slots=True)
class Occasion:
    """The coming step, as a session without drafts sees it."""

    engine_idle: bool  # no session's edge waits for a judgement or a prefill
    awaits_drafts: bool  # the engine had rather wait


class Takeover(Protocol):
    def is_due(self, occasion: Occasion) -> bool:
        """Whether the coming step may decode without a draft."""


class NeverTakeOver:
    def is_due(self, occasion: Occasion) -> bool:
        del occasion
        return False


class TakeOverWhenIdle:
    def is_due(self, occasion: Occasion) -> bool:
        return occasion.engine_idle


class AlwaysTakeOver:
    def is_due(self, occasion: Occasion) -> bool:
        del occasion
        return True


class TakeOverUnlessDraftsAreDue:
    def is_due(self, occasion: Occasion) -> bool:
        return not occasion.awaits_drafts


TAKEOVERS: dict[AssistPolicy, Takeover] = {
    AssistPolicy.NEVER: NeverTakeOver(),
    AssistPolicy.IDLE: TakeOverWhenIdle(),
    AssistPolicy.ALWAYS: AlwaysTakeOver(),
    AssistPolicy.AUTO: TakeOverUnlessDraftsAreDue(),
}


@dataclass(slots=True)
class DraftFlow:
    """A session's drafts, as far as the past tells: how often they are right, when one is due.

    The edge drafts one after the other, `interval_s` apart. A verdict that contradicts its chain
    has it start anew: the first draft after that takes `restart_s` from when the verdict was made.
    Frames tell that whether they come in time or too late to be judged.
    """

    survives: bool = True  # whether a chain is likely to agree with what the cloud decodes alone
    acceptance: float = ACCEPTANCE_PRIOR
    interval_s: float = math.inf
    restart_s: float = math.inf
    _told: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=TOLD_MAX))
    _epoch: int = -1
    _end: int = 0  # of the newest epoch's drafts, and when they came
    _arrived_s: float = 0.0
    _restarts_s: float | None = None  # when the edge was told what it starts anew from
    _is_late: bool = False  # what was due has not come

    def arrived(self, epoch: int, position: int, num_drafts: int, now: float) -> None:
        """A frame of `num_drafts` drafts from `position` on."""
        end = position + num_drafts
        if epoch > self._epoch:
            told_s = next((made_s for told, made_s in self._told if told >= position), None)
            if told_s is not None and self._epoch >= 0 and num_drafts:
                ahead_s = (num_drafts - 1) * self.interval_s if num_drafts > 1 else 0.0
                if math.isfinite(ahead_s):
                    self.restart_s = _blend(self.restart_s, max(0.0, now - told_s - ahead_s))
        elif end > self._end and now - self._arrived_s < INTERVAL_MAX_S:
            self.interval_s = _blend(self.interval_s, (now - self._arrived_s) / (end - self._end))
        if epoch > self._epoch or end > self._end:
            self._epoch, self._end = epoch, end
            self._arrived_s, self._restarts_s, self._is_late = now, None, False

    def told(self, position: int, *, broken: bool, alone: bool, now: float) -> None:
        """A verdict up to `position` is on its way. `broken`: it contradicts the chain; `alone`: it
        commits what no draft is known for."""
        self._told.append((position, now))
        if broken or (alone and not self.survives):
            self._restarts_s = now
            self._is_late = False

    def broke(self) -> None:
        """What the cloud has decoded alone is found to contradict the chain."""
        if self._restarts_s is None and self._told:
            self._restarts_s = self._told[-1][1]

    def judged(self, num_judged: int, num_accepted: int) -> None:
        for _ in range(num_accepted):
            self.acceptance += MEMORY * (1.0 - self.acceptance)
        if num_accepted < num_judged:
            self.acceptance -= MEMORY * self.acceptance

    def due_s(self, position: int) -> float:
        """When a draft for `position` is due; infinity if nobody knows."""
        if self._is_late:
            return math.inf
        if self._restarts_s is not None:
            return self._restarts_s + self.restart_s
        return self._arrived_s + max(1, position + 1 - self._end) * self.interval_s

    def is_late(self) -> None:
        """What was due has not come: expect nothing until something does."""
        self._is_late = True


@dataclass(slots=True)
class Tempo:
    """Tokens per second that the engine makes, of late."""

    _tokens: float = 0.0
    _seconds: float = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        factor = math.exp(-seconds / RATE_MEMORY_S)
        self._tokens = self._tokens * factor + num_tokens
        self._seconds = self._seconds * factor + seconds

    @property
    def per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0


@dataclass(slots=True)
class DraftWait:
    """How long an engine without work waits for drafts, before sessions are taken over."""

    until_s: float = 0.0
    _awaited: list[DraftFlow] = field(default_factory=list)

    def decide(
        self,
        flows: Sequence[tuple[DraftFlow, int]],
        *,
        rate: float,
        draft_s: float,
        now: float,
    ) -> None:
        """Set `until_s` for sessions of which none has work, each with its next position.

        `rate`: tokens per second without waiting. `draft_s`: what a draft adds to a step.
        """
        self._awaited = []
        self.until_s = 0.0
        dues = [(flow.due_s(position), flow) for flow, position in flows]
        first_s = min((due_s for due_s, _ in dues), default=math.inf)
        if not math.isfinite(first_s):
            return
        wait_s = max(0.0, first_s - now)
        together = [flow for due_s, flow in dues if due_s <= first_s + draft_s]
        gain = sum(flow.acceptance for flow in together)
        if gain > rate * (wait_s + draft_s):
            self._awaited = together
            self.until_s = first_s + LATE_S + LATE_SHARE * wait_s
            if self.until_s <= now:
                self.expired()

    def expired(self) -> None:
        """The time is over, and nothing has come."""
        for flow in self._awaited:
            flow.is_late()
        self.clear()

    def clear(self) -> None:
        """A step begins, for whatever reason."""
        self._awaited = []
        self.until_s = 0.0


def _blend(old_s: float, new_s: float) -> float:
    return new_s if not math.isfinite(old_s) else old_s + 0.2 * (new_s - old_s)
