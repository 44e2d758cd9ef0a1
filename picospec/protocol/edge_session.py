"""The edge's side of one generation. Sans I/O; time is passed in, in seconds.

The rules of this file:
1. `handle(event, now)` is the only way in. It returns the effects to carry out, in order; nothing
   else changes state. `log` keeps the last events, so that a run can be replayed.
2. The output grows by what a Verdict commits, the recovered token included, at its end only.
3. The chain is what the drafter has drafted after the output, all of it unjudged. Whatever
   contradicts it starts a new *branch* (the drafter's number) and, if any frame of the current
   *epoch* (the wire's number) was sent, a new epoch.
4. Drafter events of an older branch are ignored. Other illegal ones are LocalProtocolError;
   illegal frames of the cloud are RemoteProtocolError.
5. The session holds the whole truth: after LinkLost, Resume opens a new stream from it.
   The caller must not pass frames of an older stream any more.

Events and effects are in `edge_events` and `drafting`, tables and policy in `edge_machine`.
"""

from collections import deque
from collections.abc import Iterable

from picospec.errors import LocalProtocolError, RemoteOrderError, RemoteProtocolError
from picospec.protocol import validation
from picospec.protocol.allowance import Allowance
from picospec.protocol.draft_chain import DraftChain
from picospec.protocol.drafting import (
    Drafted,
    DrafterEvent,
    Exhausted,
    Paused,
    Rollback,
)
from picospec.protocol.edge_events import (
    Cancel,
    Commit,
    EdgeEvent,
    Effect,
    Finished,
    LinkLost,
    Resume,
    Send,
    SetLength,
    Start,
    Tick,
)
from picospec.protocol.edge_machine import (
    FROM_CLOUD,
    ONLINE,
    PROBED,
    TRANSITIONS,
    WITH_CHAIN,
    EdgeState,
    EventKind,
)
from picospec.protocol.messages import (
    AssistPolicy,
    Finish,
    FinishReason,
    Opened,
    Rejection,
    Verdict,
)
from picospec.protocol.session_spec import SessionSpec
from picospec.sampling.distribution import Distribution
from picospec.sampling.rejection import RejectionSampler

LOG_LENGTH = 32  # events; a few hundred bytes each, but a rejection may hold a whole distribution


class EdgeSession:
    """One generation, as the edge sees it."""

    def __init__(self, spec: SessionSpec, *, log_length: int = LOG_LENGTH) -> None:
        self.state = EdgeState.NEW
        self.branch = 0
        self.output: list[int] = []
        self.stale_tokens = 0  # sent, then given up unjudged; never falls
        self.round_trip_s: float | None = None  # of the last verdict; None if it judged no draft
        self.log: deque[tuple[float, EdgeEvent]] = deque(maxlen=log_length)  # (now, event)
        self.allowance = Allowance(spec)  # to be read only, as the chain
        self.chain = DraftChain(
            len(spec.prompt_token_ids),
            split=spec.is_split,
            draft_length=max(1, min(spec.policy.draft_length, self.allowance.window)),
            fast_verify=spec.policy.fast_verify,
        )
        self._lead = 0  # as in SetLength
        self._spec = spec
        self._split = spec.is_split
        self._length_max = spec.length_max
        self._max_frame = spec.card.limits.max_draft_tokens
        self._stop_token_ids = frozenset(spec.stop_token_ids)
        self._cloud_goes_on = spec.policy.assist in (AssistPolicy.ALWAYS, AssistPolicy.AUTO)
        # The tail sample that a probe asked for, and the law of the draft that was rejected.
        self._asked: tuple[int, Distribution | None] | None = None
        self._opened = False  # the cloud has confirmed the opening
        self._awaits_first = True  # the verdict on the prompt

    @property
    def position(self) -> int:
        """The first uncommitted position."""
        return self.chain.position

    @property
    def in_flight(self) -> int:
        """Drafts sent and not judged."""
        return self.chain.in_flight

    @property
    def finished(self) -> bool:
        return self.state is EdgeState.FINISHED

    @property
    def deadline(self) -> float | None:
        """When Tick is due: a round that takes too long then goes out as it is."""
        waits_since_s, timeout_s = self.chain.waits_since_s, self._spec.policy.round_timeout_s
        if waits_since_s is None or not timeout_s or self.state is not EdgeState.DRAFTING:
            return None
        return waits_since_s + timeout_s

    def handle(self, event: EdgeEvent, now: float) -> list[Effect]:
        """What follows from `event`, which happened at `now`.

        Raises LocalProtocolError for an event that is illegal in this state, RemoteProtocolError
        or RemoteOrderError for a frame that is.
        """
        self.log.append((now, event))
        match event:
            case Drafted():
                return self._drafted(event, now)
            case Verdict():
                return self._receive_verdict(event, now)
            case SetLength():
                return self._set_length(event, now)
            case Tick():
                return self._tick(now)
            case Exhausted() | Paused():
                return self._stopped(event, now)
            case Opened():
                return self._receive_opened(event)
            case Start():
                self._move(EventKind.START)
                return [self._open(), *self._advance(now)]
            case LinkLost():
                return self._link_lost()
            case Resume():
                return self._resume(now)
            case Cancel():
                online = self.state in ONLINE
                self._move(EventKind.CANCEL)
                return [Send(Finish())] if online else []

    # -- the caller and the link -----------------------------------------------------------------

    def _set_length(self, event: SetLength, now: float) -> list[Effect]:
        self.allowance.set_window(event.window)
        self.chain.draft_length = max(1, min(event.draft_length, self.allowance.window))
        self._lead = event.lead if self._cloud_goes_on else 0
        return self._advance(now)

    def _tick(self, now: float) -> list[Effect]:
        deadline = self.deadline
        if deadline is None or now < deadline or self._asked is not None:
            return []
        return self._send_due(now, round_is_over=True)

    def _link_lost(self) -> list[Effect]:
        """The drafter goes on within the window."""
        self._move(EventKind.LINK_LOST)
        if self.state is EdgeState.OFFLINE:
            self._asked = None
        self.chain.new_stream()
        self._opened = False
        self._awaits_first = True
        return []

    def _resume(self, now: float) -> list[Effect]:
        """Open a new stream with all that is committed, and send what is not judged again."""
        self._move(EventKind.RESUME)
        return [] if self.finished else [self._open(), *self._advance(now)]

    # -- the drafter ---------------------------------------------------------------------------

    def _drafted(self, event: Drafted, now: float) -> list[Effect]:
        if not self._is_current(event, EventKind.DRAFTED, self.chain.end):
            return []
        limit = self.allowance.highest
        if event.position + len(event.token_ids) > limit:
            raise LocalProtocolError(f"Drafts beyond the limit {limit}", "drafted")
        if self._split and len(event.laws) != len(event.token_ids):
            raise LocalProtocolError("Drafts without their laws", "drafted")
        self.allowance.is_exhausted = False
        self.chain.extend(event.token_ids, event.laws)
        return self._advance(now)

    def _stopped(self, event: Exhausted | Paused, now: float) -> list[Effect]:
        """The drafter waits at the end of the chain."""
        exhausted = isinstance(event, Exhausted)
        kind = EventKind.EXHAUSTED if exhausted else EventKind.PAUSED
        if not self._is_current(event, kind, self.chain.end):
            return []
        if exhausted:
            self.allowance.is_exhausted = True
        elif len(self.chain):
            self.allowance.is_paused = True
        else:  # all of it was accepted meanwhile
            self.allowance.unpause(self.chain)
        return self._advance(now)

    def _is_current(self, event: DrafterEvent, kind: EventKind, position: int) -> bool:
        """Whether a drafter's event counts; then the state follows it. It must be at `position`."""
        if event.branch > self.branch:
            raise LocalProtocolError(f"Branch {event.branch} was never begun", kind.value)
        if event.branch < self.branch or self.state is EdgeState.FINISHED:
            return False
        self._move(kind)
        if event.position != position:
            raise LocalProtocolError(
                f"The drafter is at position {event.position} instead of {position}", "position"
            )
        return True

    # -- the cloud -----------------------------------------------------------------------------

    def _receive_opened(self, opened: Opened) -> list[Effect]:
        if self.finished:
            return []
        self._move(EventKind.OPENED)
        validation.check_opened(opened, self._spec.card)
        if self._opened:
            raise RemoteOrderError("The opening was confirmed before", "opened")
        if opened.first_position != self.position:
            raise RemoteOrderError(
                f"Opened at {opened.first_position} instead of {self.position}",
                "opened.first_position",
            )
        self._opened = True
        self.allowance.cap(opened.window)
        self._max_frame = min(self._max_frame, opened.max_draft_tokens)
        return []

    def _receive_verdict(self, verdict: Verdict, now: float) -> list[Effect]:
        if self.finished:
            return []
        self._check_verdict(verdict)
        self.round_trip_s = self.chain.round_trip(verdict, now)
        reason = verdict.finish_reason
        if reason is not None:
            self._move(EventKind.FINISH)
            return [*self._commit(verdict.num_accepted, verdict.token_ids), Finished(reason)]
        if verdict.rejection is not None:
            return self._rejected(verdict, verdict.rejection, now)
        self._move(EventKind.VERDICT)
        self._awaits_first = False
        num_kept = self.chain.agrees(verdict.num_accepted, verdict.token_ids)
        own = verdict.token_ids[num_kept - verdict.num_accepted :]
        agreed = self.position + num_kept
        judged_end = max(agreed, verdict.position + verdict.num_draft_tokens)
        effects = self._commit(num_kept, own)
        reason = self._finish_reason() if effects else None
        if reason is not None:
            return [*effects, *self._finish(reason, tell_cloud=True)]
        if effects:
            self._asked = None  # the probed position is committed
            if self.allowance.is_paused:
                self.allowance.unpause(self.chain)
        if own:
            self._branch_off(judged_end)
            effects.append(Rollback(self.branch, agreed, own))
        return effects + self._advance(now)

    def _rejected(self, verdict: Verdict, rejection: Rejection, now: float) -> list[Effect]:
        """The position after the accepted drafts is the edge's to draw: from what the draft's law
        leaves of P, or from P itself where there was no draft."""
        num_kept = verdict.num_accepted
        position = self.position + num_kept
        attempt, law = self._asked or (0, self.chain.law(num_kept))
        token_id = RejectionSampler(self._spec.sampling.seed, position, law).offer(
            rejection, attempt
        )
        self._move(EventKind.UNRESOLVED if token_id is None else EventKind.REJECTION)
        self._awaits_first = False
        effects = self._commit(num_kept, ())
        self._branch_off(max(position, verdict.position + verdict.num_draft_tokens))
        if token_id is None:
            self._asked = (attempt + 1, law)
            return [*effects, Send(self.chain.probe(attempt + 2))]
        self._asked = None
        effects += self._commit(0, (token_id,))
        reason = self._finish_reason()
        if reason is not None:
            return [*effects, *self._finish(reason, tell_cloud=True)]
        self.chain.recovered(token_id)
        effects.append(Rollback(self.branch, position, (token_id,)))
        return effects + self._advance(now)

    def _check_verdict(self, verdict: Verdict) -> None:
        """Raises where `verdict` does not fit what was sent."""
        if not self._opened:
            raise RemoteOrderError("A verdict before the opening was confirmed", "verdict")
        validation.check_verdict(verdict, self._spec.card, self._spec.policy.mode)
        self.chain.check(verdict)
        accepted = verdict.num_accepted
        if accepted + len(verdict.token_ids) > self._length_max - self.position:
            raise RemoteProtocolError("More tokens than were asked for", "verdict.token_ids")
        if verdict.rejection is not None and self._asked is None and accepted >= self.in_flight:
            raise RemoteOrderError("Nothing was there to be rejected", "verdict.rejection")

    # -- what follows from the state -------------------------------------------------------------

    def _advance(self, now: float) -> list[Effect]:
        """Extend the drafter's limit, send what is due, ask where the drafter has nothing."""
        effects: list[Effect] = []
        if self.state in (EdgeState.DRAFTING, EdgeState.OFFLINE):
            effects += self.allowance.extend(self.chain)
        if self.state is EdgeState.DRAFTING and self._asked is None:
            round_is_over = self.allowance.is_used_up(self.chain)
            may_wait = self.chain.end < self.allowance.limit and self.chain.lands_behind(self._lead)
            if round_is_over or not may_wait:
                effects += self._send_due(now, round_is_over=round_is_over)
            if self.allowance.is_exhausted and not (
                len(self.chain) or self._awaits_first or self._cloud_goes_on
            ):
                self._asked = (0, None)
                effects.append(Send(self.chain.probe(1)))
        return effects

    def _send_due(self, now: float, *, round_is_over: bool) -> list[Effect]:
        frames = self.chain.frames(self._max_frame, round_is_over=round_is_over, now=now)
        return [Send(frame) for frame in frames]

    def _open(self) -> Send:
        """Open a stream; a pending probe goes with it."""
        probing = self.state is EdgeState.PROBING and self._asked is not None
        probe = self._asked[0] + 1 if probing and self._asked is not None else 0
        return Send(self._spec.open(self.output, probe=probe))

    def _branch_off(self, judged_end: int) -> None:
        """Give up the chain, of which the drafts before `judged_end` were judged."""
        self.stale_tokens += self.chain.branch_off(judged_end)
        self.branch += 1
        self.allowance.branch_off()

    def _commit(self, num_kept: int, own: tuple[int, ...]) -> list[Effect]:
        """Commit the chain's first drafts, then tokens that are not in it."""
        token_ids = self.chain.first(num_kept) + own
        self.chain.commit(num_kept, len(own))
        self.output += token_ids
        return [Commit(token_ids)] if token_ids else []

    def _finish_reason(self) -> FinishReason | None:
        """Why the output is complete, judged by its last token."""
        if self.output[-1] in self._stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.position >= self._length_max else None

    def _finish(self, reason: FinishReason, *, tell_cloud: bool) -> list[Effect]:
        self._move(EventKind.FINISH)
        return [*([Send(Finish())] if tell_cloud else []), Finished(reason)]

    def _move(self, kind: EventKind) -> None:
        """Follow TRANSITIONS, or raise in the name of whoever caused the event."""
        state = TRANSITIONS.get((self.state, kind))
        if state is None:
            message = f"{kind.value!r} is not allowed in state {self.state.value!r}"
            if kind in FROM_CLOUD and self.state in ONLINE:
                raise RemoteOrderError(message, "verdict")
            raise LocalProtocolError(message, kind.value)
        self.state = state

    # -- checks ----------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises AssertionError, naming all that is broken, if the session contradicts itself."""
        chain, state, asked = self.chain, self.state, self._asked is not None
        rules = {
            "the position is where prompt and output end": chain.position
            == len(self._spec.prompt_token_ids) + len(self.output),
            "the output is within max_tokens": chain.position <= self._length_max,
            "a stop token ends the output": not self._stop_token_ids.intersection(self.output[:-1]),
        }
        if not self.finished:  # what is left of the chain then means nothing
            rules |= {
                "the chain grows only while drafting": not len(chain) or state in WITH_CHAIN,
                "a tail sample is awaited where it was asked for": asked
                if state in PROBED
                else not asked or state is EdgeState.DRAFTING,
                "without a stream nothing is confirmed": not self._opened or state in ONLINE,
                "without a stream nothing is in flight": not self.in_flight or state in ONLINE,
                **chain.rules(),
                **self.allowance.rules(chain),
            }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise AssertionError(f"In state {state.value!r} it is not so that {'; '.join(broken)}")


def replay(session: EdgeSession, log: Iterable[tuple[float, EdgeEvent]]) -> list[list[Effect]]:
    """The effects of each event of `log`, a whole one, on `session`, a fresh one made alike.

    Raises what `session` raised when the log was made.
    """
    return [session.handle(event, now) for now, event in log]
