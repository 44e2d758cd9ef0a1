"""The drafting worker: many contexts, one drafter, one token at a time.

`DraftWorker` has no I/O: `handle` takes a command, `step` does one bounded piece of work for
one context. Its rules:
1. Contexts take turns; a turn is one token or one prefill chunk.
2. A context drafts at the end of its text while that is below `limit` and it is not `blocked`.
   It is blocked when nothing can be proposed, after a drafted stop token, and while it waits for a
   probe's answer; a rollback or recovery, which changes the text, ends that. It pauses after a
   draft that is likely to be rejected; Allow ends that, too.
3. What is drawn is a function of (text, seed, position). So a rebuilt context continues as
   the lost one would have.
4. Split mode: the law a draft was drawn from is kept until the text before it changes, for
   the Rejection Sampler. A law that is gone is computed again.

`run` in worker_main.py joins it to a pipe.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.drafting.drafter import Drafter, DrafterContext
from edge_agent.drafting.messages import (
    CloseContext,
    Command,
    ContextFailed,
    ContextSpec,
    DraftEvent,
    OpenContext,
)
from edge_agent.drafting.rejection import RejectionSampler
from picospec.errors import DrafterFailed
from picospec.protocol.drafting import (
    Allow,
    Drafted,
    Exhausted,
    Paused,
    ProbeNeeded,
    Recover,
    Recovered,
    Rollback,
)
from picospec.protocol.messages import VerificationMode
from picospec.sampling.distribution import Distribution, draw
from picospec.sampling.noise import Purpose

# Laws kept for one context; a wide one has a megabyte. At least the usual window.
MAX_LAWS = 64

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
    recover: Recover | None = None
    laws: dict[int, Distribution | None] = field(default_factory=dict)  # by position, ascending

    @property
    def runnable(self) -> bool:
        if self.recover is not None:
            return True
        return not (self.blocked or self.paused) and len(self.text) < self.limit

    def law(self) -> Distribution | None:
        """The drafter's law of the next token, kept or computed now."""
        position = len(self.text)
        if position not in self.laws:
            law = self.text.propose()
            if self.spec.mode is VerificationMode.COUPLED:
                return law  # equal or not equal: nobody asks for Q
            self.laws[position] = law
            if len(self.laws) > MAX_LAWS:
                del self.laws[min(self.laws)]
        return self.laws[position]

    def rollback(self, branch: int, length: int, token_ids: tuple[int, ...] = ()) -> None:
        kept = self.text.rollback(length, token_ids)
        self.laws = {position: law for position, law in self.laws.items() if position <= kept}
        self.branch = branch
        self.blocked = self.paused = False
        self.recover = None


class DraftWorker:
    """Drafts for many contexts. A context whose backend fails ends; the others go on."""

    def __init__(self, drafter: Drafter, emit: Emit) -> None:
        self._drafter = drafter
        self._emit = emit
        self.contexts: dict[int, _Context] = {}
        self._turns: deque[int] = deque()  # the ids of _contexts; the next in turn is first

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
        for _ in range(len(self._turns)):
            context_id = self._turns[0]
            self._turns.rotate(-1)
            context = self.contexts[context_id]
            if context.runnable:
                self._guarded(context_id, self._turn, context)
                return

    def _open(self, context_id: int, command: OpenContext) -> None:
        text = self._drafter.open(command.spec, command.num_committed)
        self.contexts[context_id] = _Context(
            command.spec, text, command.branch, command.limit, command.blocked
        )
        self._turns.append(context_id)

    def _close(self, context_id: int) -> None:
        context = self.contexts.pop(context_id, None)
        if context is not None:
            self._turns.remove(context_id)
            context.text.close()

    def _apply(self, context_id: int, context: _Context, command: Command) -> None:
        if isinstance(command, Allow):
            context.limit = command.limit
            context.paused = False
        elif isinstance(command, Rollback):
            context.rollback(command.branch, command.length, command.token_ids)
        elif isinstance(command, Recover):
            context.rollback(command.branch, command.position)
            context.recover = command
            if not command.judged or command.position in context.laws:
                self._recover(context_id, context, command)  # no forward: at once

    def _turn(self, context_id: int, context: _Context) -> None:
        if context.text.prefill():
            return
        if context.recover is not None:
            self._recover(context_id, context, context.recover)
        else:
            self._draft(context_id, context)

    def _draft(self, context_id: int, context: _Context) -> None:
        position, seed = len(context.text), context.spec.sampling.seed
        law = context.law()
        if law is None:
            context.blocked = True
            self._emit(context_id, Exhausted(context.branch, position))
            return
        probs: tuple[float, ...] = ()
        if context.spec.mode is VerificationMode.COUPLED:
            token_id = draw(law, seed, position, Purpose.COUPLED)
        else:
            token_id = draw(law, seed, position, Purpose.DRAFT)
            # Float32 sums may leave a certain token's probability a rounding above 1.
            probs = (min(1.0, law.prob(token_id)),)
        threshold = context.spec.confidence_stop
        context.paused = threshold > 0.0 and context.text.confidence() < threshold
        context.text.append(token_id)
        self._emit(context_id, Drafted(context.branch, position, (token_id,), probs))
        if token_id in context.spec.stop_token_ids:
            context.blocked = True
            self._emit(context_id, Exhausted(context.branch, position + 1))
        elif context.paused:
            self._emit(context_id, Paused(context.branch, position + 1))

    def _recover(self, context_id: int, context: _Context, command: Recover) -> None:
        law = context.law() if command.judged else None
        sampler = RejectionSampler(context.spec.sampling.seed, command.position, law)
        token_id = sampler.offer(command.rejection, command.attempt)
        context.recover = None
        if token_id is None:
            context.blocked = True
            needed = ProbeNeeded(context.branch, command.position, command.attempt + 1)
            self._emit(context_id, needed)
            return
        context.rollback(context.branch, command.position, (token_id,))
        self._emit(context_id, Recovered(context.branch, command.position, token_id))

    def _guarded(self, context_id: int, work: Callable[..., None], *args: object) -> None:
        """Do `work`; whatever the backend raises ends this context alone."""
        try:
            work(context_id, *args)
        except Exception as error:  # runtimes raise anything
            self._close(context_id)
            failure = DrafterFailed(f"the drafter failed: {type(error).__name__}: {error}")
            self._emit(context_id, ContextFailed(failure))
