"""The event loop's handle on one context, and its memory of it.

`DraftContext` mirrors what the worker has told: the text (committed and drafted), branch,
limit, whether it is blocked, and the recovery that is under way. The mirror is all that is needed
to rebuild the context in a new worker, exactly where the events left off.
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
    ProbeNeeded,
    Recover,
    Recovered,
    Rollback,
)

OnEvent = Callable[[DraftEvent], None]  # called on the event loop; must not block
ToWorker = Callable[[int, Command], None]  # context id, command; must not block


class DraftContext:
    """Commands one context. Nothing here blocks; effects arrive as events.

    Events of a branch that is over are not delivered: once `send` was given a Rollback or a
    Recover, only events of its branch are.
    """

    def __init__(
        self, context_id: int, spec: ContextSpec, on_event: OnEvent, to_worker: ToWorker
    ) -> None:
        self.context_id = context_id
        self.closed = False
        self._spec = spec
        self._on_event = on_event
        self._to_worker = to_worker
        self._text = SpeculativeTokens(spec.token_ids)
        self._branch = 0
        self._limit = 0
        self._blocked = False
        self._paused = False
        self._recover: Recover | None = None
        self._command(OpenContext(spec, len(self._text)))

    def send(self, command: DrafterCommand) -> None:
        """Have the worker follow `command`, unless it would change nothing.

        Raises ValueError for a length that is committed or beyond the text.
        """
        match command:
            case Allow(limit):
                if limit == self._limit and not self._paused:
                    return
                self._limit, self._paused = limit, False
            case Rollback(branch, length, token_ids):
                self._restart(branch, length, token_ids)
            case Recover(branch, position):
                self._restart(branch, position)
                self._recover = command
        self._command(command)

    def close(self) -> None:
        """Free the context. Idempotent; no event follows."""
        if not self.closed:
            self._command(CloseContext())
            self.closed = True

    # For the owner of the worker

    def rebuild(self) -> list[Command]:
        """The commands that make a fresh worker's context equal to the mirror."""
        opened = OpenContext(
            dataclasses.replace(self._spec, token_ids=self._text.token_ids.copy()),
            self._text.num_committed,
            self._branch,
            self._limit,
            self._blocked,
        )
        return [opened] if self._recover is None else [opened, self._recover]

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
        elif isinstance(event, ProbeNeeded):
            self._recover, self._blocked = None, True
        elif isinstance(event, Recovered):
            self._recover = None
            self._text.rollback(event.position, (event.token_id,))
        self._on_event(event)

    def _restart(self, branch: int, length: int, token_ids: tuple[int, ...] = ()) -> None:
        self._text.rollback(length, token_ids)
        self._branch, self._recover = branch, None
        self._blocked = self._paused = False

    def _command(self, command: Command) -> None:
        if not self.closed:
            self._to_worker(self.context_id, command)


class Drafting(Protocol):
    """Opens contexts: `process.DraftingProcess`, and `scripted.ScriptedDrafting` for tests."""

    restarts: int  # of the worker, since start
    logits_width: int  # of the drafter; 0: any. Known after start
    drafted_tokens: int  # since start, rolled back ones included
    drafting_s: float  # time the drafter computed, since start

    @property
    def pid(self) -> int | None:
        """Of the worker; None when there is none."""

    @property
    def alive(self) -> bool:
        """A drafter is loaded and drafting. False while it restarts: contexts wait."""

    @property
    def open_contexts(self) -> int: ...

    async def start(self) -> None:
        """Load the drafter. Raises DrafterFailed if that fails or takes too long."""

    async def stop(self) -> None:
        """End the worker; open contexts get no more events. Idempotent."""

    def open(self, spec: ContextSpec, on_event: OnEvent) -> DraftContext:
        """A context for spec.token_ids, at branch 0, with nothing allowed yet.

        Raises CapacityError when all contexts are taken, DrafterFailed when there is no drafter.
        """
