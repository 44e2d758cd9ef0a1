"""The drafting worker: many contexts, one drafter, one token at a time.

`DraftWorker` has no I/O: `handle` takes a command, `step` does one bounded piece of work for
one context. Its rules:
1. A turn is one token or one piece of a prompt. It goes to the context that has had the least time,
   so that a long prompt slows another chat's drafting twofold at most.
2. A context drafts at the end of its text while that is below `limit` and it is not `blocked`.
   It is blocked when nothing can be proposed and after a drafted stop token; a rollback, which
   changes the text, ends that. It pauses after a draft that is likely to be rejected; Allow ends
   that, too.
3. What is drawn is a function of the proposed law, the seed and the position. Split mode: the law
   goes out with the draft, truncated to what is worth sending; the draft is drawn from it as it is.

`run` in worker_main.py joins it to a pipe.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.drafting.drafter import Drafter, DrafterContext
from edge_agent.drafting.messages import (
    CloseContext,
    Command,
    ContextFailed,
    ContextSpec,
    DraftEvent,
    OpenContext,
)
from picospec.errors import DrafterFailed
from picospec.protocol.drafting import Allow, Drafted, Exhausted, Paused, Rollback
from picospec.protocol.messages import SamplingParams, VerificationMode
from picospec.sampling.distribution import GREEDY_TEMPERATURE, Distribution, draw
from picospec.sampling.noise import Purpose

# What a proposed law keeps: tokens this probable relative to the best, and this many. A law of all
# ids has a megabyte; what is cut off is hardly ever drawn, and drawing from the rest is faster.
PROPOSAL_MIN_P = 1e-4
PROPOSAL_TOKENS_MAX = 1024
PREFILL_WEIGHT = 1.5  # of a second of prefill over one of drafting: a chat feels it at once
IDLE_CREDIT = 4.0  # drafts for which a context that had nothing to do goes first, at most

Emit = Callable[[int, DraftEvent], None]  # context id, event


@dataclass(slots=True)
class _Context:
    """One text being drafted for."""

    spec: ContextSpec
    text: DrafterContext
    branch: int
    limit: int
    blocked: bool
    paused: bool = False
    is_cold: bool = True  # the last turn was no draft: the next one has to catch up
    spent: float = 0.0  # of the drafter's time, in drafts; a context that was idle saves none up

    @property
    def runnable(self) -> bool:
        return not (self.blocked or self.paused) and len(self.text) < self.limit


class DraftWorker:
    """Drafts for many contexts. A context whose backend fails ends; the others go on."""

    def __init__(self, drafter: Drafter, emit: Emit) -> None:
        self._drafter = drafter
        self._emit = emit
        self.contexts: dict[int, _Context] = {}
        self.shows_pace = False  # the last turn drafted, with nothing to compute before it
        self._latest = 0.0  # spent by the context whose turn was last, before that turn
        self._draft_s = 0.0  # what a draft takes

    @property
    def runnable(self) -> bool:
        return any(context.runnable for context in self.contexts.values())

    def handle(self, context_id: int, command: Command) -> None:
        """Apply one command. Those for contexts that are gone are ignored."""
        if isinstance(command, OpenContext):
            self._guarded(context_id, self._open, command)
        elif isinstance(command, CloseContext):
            self._close(context_id)
        elif context_id in self.contexts:
            self._guarded(context_id, self._apply, self.contexts[context_id], command)

    def step(self) -> None:
        """One turn of the next runnable context; nothing when there is none."""
        runnable = [
            (max(context.spent, self._latest - IDLE_CREDIT), context_id)
            for context_id, context in self.contexts.items()
            if context.runnable
        ]
        if not runnable:
            return
        self._latest, context_id = min(runnable)
        context = self.contexts[context_id]
        started_s = time.perf_counter()
        self._guarded(context_id, self._turn, context)
        context.spent = self._latest + self._charge(context, time.perf_counter() - started_s)

    def _charge(self, context: _Context, seconds: float) -> float:
        """What a turn costs, in drafts. Drafts count alike, so that contexts get as many."""
        if self.shows_pace:
            self._draft_s += 0.1 * (seconds - self._draft_s) if self._draft_s else seconds
        if not context.is_cold or not self._draft_s:
            return 1.0
        return max(1.0, PREFILL_WEIGHT * seconds / self._draft_s)

    def _open(self, context_id: int, command: OpenContext) -> None:
        spec = dataclasses.replace(command.spec, sampling=proposal(command.spec.sampling))
        text = self._drafter.open(spec, command.num_committed)
        self.contexts[context_id] = _Context(
            spec, text, command.branch, command.limit, command.blocked
        )

    def _close(self, context_id: int) -> None:
        context = self.contexts.pop(context_id, None)
        if context is not None:
            context.text.close()

    def _apply(self, context_id: int, context: _Context, command: Command) -> None:
        if isinstance(command, Allow):
            context.limit = command.limit
            context.paused = False
        elif isinstance(command, Rollback):
            context.text.rollback(command.length, command.token_ids)
            context.branch = command.branch
            context.blocked = context.paused = False

    def _turn(self, context_id: int, context: _Context) -> None:
        was_cold, context.is_cold = context.is_cold, context.text.prefill()
        self.shows_pace = not (was_cold or context.is_cold)
        if not context.is_cold:
            self._draft(context_id, context)

    def _draft(self, context_id: int, context: _Context) -> None:
        position, seed = len(context.text), context.spec.sampling.seed
        law = context.text.propose()
        if law is None:
            context.blocked = True
            self._emit(context_id, Exhausted(context.branch, position))
            return
        laws: tuple[Distribution, ...] = ()
        if context.spec.mode is VerificationMode.COUPLED:
            token_id = draw(law, seed, position, Purpose.COUPLED)
        else:
            token_id = draw(law, seed, position, Purpose.DRAFT)
            laws = (law,)
        threshold = context.spec.confidence_stop
        context.paused = threshold > 0.0 and context.text.confidence() < threshold
        context.text.append(token_id)
        self._emit(context_id, Drafted(context.branch, position, (token_id,), laws))
        if token_id in context.spec.stop_token_ids:
            context.blocked = True
            self._emit(context_id, Exhausted(context.branch, position + 1))
        elif context.paused:
            self._emit(context_id, Paused(context.branch, position + 1))

    def _guarded(self, context_id: int, work: Callable[..., None], *args: object) -> None:
        """Do `work`; whatever the backend raises ends this context alone."""
        try:
            work(context_id, *args)
        except Exception as error:  # runtimes raise anything
            self._close(context_id)
            failure = DrafterFailed(f"the drafter failed: {type(error).__name__}: {error}")
            self._emit(context_id, ContextFailed(failure))


def proposal(sampling: SamplingParams) -> SamplingParams:
    """How the drafter's law is processed: as the target's, and truncated."""
    if sampling.temperature < GREEDY_TEMPERATURE:
        return sampling
    return dataclasses.replace(
        sampling,
        min_p=max(sampling.min_p, PROPOSAL_MIN_P),
        top_k=min(sampling.top_k or PROPOSAL_TOKENS_MAX, PROPOSAL_TOKENS_MAX),
    )
