"""The event loop's handle on one context, and its memory of it.

`DraftContext` mirrors what the worker has told: the text (committed and drafted), branch, limit and
whether it is blocked. The mirror is all that is needed to rebuild the context in a new worker,
exactly where the events left off. While the drafter is stopped (its limit is at the text's end),
rollbacks only change the mirror; the next limit is told with all of them in one.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from edge_agent.drafting.kv_cache import SpeculativeTokens
from edge_agent.drafting.messages import (
    CloseContext,
    Command,
    ContextFailed,
    ContextSpec,
    DraftEvent,
    OpenContext,
)
from picospec.protocol.drafting import (
    Allow,
    Drafted,
    DrafterCommand,
    Exhausted,
    Paused,
    Rollback,
)

OnEvent = Callable[[DraftEvent], None]  # called on the event loop; must not block
ToWorker = Callable[[int, Command], None]  # context id, command; must not block


class DraftContext:
    """Commands one context. Nothing here blocks; effects arrive as events.

    Events of a branch that is over are not delivered: once `send` was given a Rollback, only events
    of its branch are.
    """

    def __init__(
        self,
        context_id: int,
        spec: ContextSpec,
        on_event: OnEvent,
        to_worker: ToWorker,
        *,
        branch: int = 0,
    ) -> None:
        self.context_id = context_id
        self.closed = False
        self._spec = spec
        self._on_event = on_event
        self._to_worker = to_worker
        self._text = SpeculativeTokens(spec.token_ids)
        self._branch = branch
        self._limit = 0
        self._blocked = False
        self._paused = False
        self._untold: int | None = None  # the shortest length rolled back to, not told yet
        self._command(OpenContext(spec, len(self._text), branch))

    def send(self, command: DrafterCommand) -> None:
        """Have the worker follow `command`, unless it would change nothing.

        Raises ValueError for a length that is committed or beyond the text.
        """
        match command:
            case Allow(limit):
                if limit == self._limit and not self._paused:
                    return
                self._limit, self._paused = limit, False
                if self._untold is not None and limit > len(self._text):
                    self._tell_rollbacks(self._untold)
            case Rollback(branch, length, token_ids):
                self._text.rollback(length, token_ids)
                self._branch = branch
                self._blocked = self._paused = False
                untold = length if self._untold is None else min(length, self._untold)
                if self._limit <= len(self._text):
                    self._untold = untold
                else:
                    self._tell_rollbacks(untold)
                return
        self._command(command)

    def _tell_rollbacks(self, length: int) -> None:
        self._untold = None
        token_ids = self._text.token_ids[length : self._text.num_committed].tolist()
        self._command(Rollback(self._branch, length, tuple(token_ids)))

    def close(self) -> None:
        """Free the context. Idempotent; no event follows."""
        if not self.closed:
            self._command(CloseContext())
            self.closed = True

    # For the owner of the worker

    def rebuild(self) -> list[Command]:
        """The commands that make a fresh worker's context equal to the mirror."""
        self._untold = None
        opened = OpenContext(
            dataclasses.replace(self._spec, token_ids=self._text.token_ids.copy()),
            self._text.num_committed,
            self._branch,
            self._limit,
            self._blocked,
        )
        return [opened]

    def deliver(self, event: DraftEvent) -> None:
        """Record an event of the worker and hand it on, unless it is out of date."""
        if self.closed:
            return
        if isinstance(event, ContextFailed):
            self.close()
        elif event.branch != self._branch:
            return
        elif isinstance(event, Drafted):
            for token_id in event.token_ids:
                self._text.append(token_id)
        elif isinstance(event, Exhausted):
            self._blocked = True
        elif isinstance(event, Paused):
            self._paused = True
        self._on_event(event)

    def _command(self, command: Command) -> None:
        if not self.closed:
            self._to_worker(self.context_id, command)


class Drafting(Protocol):
    """Opens contexts: `process.DraftingProcess`, and `scripted.ScriptedDrafting` for tests."""

    restarts: int  # of the worker, since start
    logits_width: int  # of the drafter; 0: any. Known after start
    drafted_tokens: int  # since start, rolled back ones included
    timed_tokens: int  # of those, that tell the drafter's pace: nothing else was computed
    drafting_s: float  # what they took

    @property
    def pid(self) -> int | None:
        """Of the worker; None when there is none."""

    @property
    def alive(self) -> bool:
        """A drafter is loaded and drafting. False while it restarts: contexts wait."""

    @property
    def trouble(self) -> str:
        """Why nothing is drafted now; "" while the drafter works."""

    @property
    def open_contexts(self) -> int: ...

    async def start(self) -> None:
        """Load the drafter. Raises DrafterFailed if that fails or takes too long."""

    async def stop(self) -> None:
        """End the worker; open contexts get no more events. Idempotent."""

    def open(self, spec: ContextSpec, on_event: OnEvent, *, branch: int = 0) -> DraftContext:
        """A context for spec.token_ids, all of them committed, with nothing allowed yet.

        Raises CapacityError when all contexts are taken, DrafterFailed when there is no drafter.
        """
