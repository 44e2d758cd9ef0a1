"""The edge's side of one generation. Sans I/O; time is passed in, in seconds.

The rules of this file:
1. Inputs come from the drafter (`drafted`, `exhausted`, `paused`, `recovered`, `probe_needed`),
   from the cloud (`receive`), from the link (`link_lost`, `resume`), from the clock (`tick`, due
   at `deadline`) and from the caller (`start`, `set_length`, `cancel`). Each returns the effects
   to carry out, in order; nothing else changes state.
2. The output grows by what a Verdict commits and by the recovered token, at its end only.
3. The chain is what the drafter has drafted after the output, all of it unjudged. Whatever
   contradicts it starts a new *branch* (the drafter's number) and, if any frame of the current
   *epoch* (the wire's number) was sent, a new epoch.
4. Drafter events of an older branch are ignored. Other illegal ones are LocalProtocolError;
   illegal frames of the cloud are RemoteProtocolError.
5. The session holds the whole truth: after `link_lost`, `resume` opens a new stream from it.
   The caller must not pass frames of an older stream any more.

Tables, effects and policy are in `edge_machine`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from picospec.errors import LocalProtocolError, RemoteOrderError, RemoteProtocolError
from picospec.protocol import validation
from picospec.protocol.draft_chain import DraftChain
from picospec.protocol.edge_machine import (
    FROM_CLOUD,
    ONLINE,
    TRANSITIONS,
    Allow,
    Commit,
    EdgeEvent,
    EdgeState,
    Effect,
    Finished,
    Recover,
    Rollback,
    Send,
    SpeculationPolicy,
)
from picospec.protocol.messages import (
    AssistPolicy,
    CloudFrame,
    Finish,
    FinishReason,
    ModelCard,
    Open,
    Opened,
    SamplingParams,
    TokenArray,
    Verdict,
    VerificationMode,
)


class EdgeSession:
    """One generation, as the edge sees it."""

    def __init__(
        self,
        session_id: str,
        prompt_token_ids: TokenArray,
        sampling: SamplingParams,
        max_tokens: int,
        stop_token_ids: tuple[int, ...],
        card: ModelCard,
        policy: SpeculationPolicy,
    ) -> None:
        self._session_id = session_id
        self._prompt = prompt_token_ids
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._card = card
        self._policy = policy
        self._split = policy.mode is VerificationMode.SPLIT
        self._window_max = card.limits.max_window
        self._window = min(policy.window, self._window_max)
        self._max_frame = card.limits.max_draft_tokens
        self._length_max = min(len(prompt_token_ids) + max_tokens, card.max_model_len)

        self.state = EdgeState.NEW
        self.branch = 0
        self.output: list[int] = []
        self.stale_tokens = 0  # sent, then given up unjudged
        self.round_trip_s: float | None = None  # of the last verdict; None if it judged no draft
        self._chain = DraftChain(
            len(prompt_token_ids),
            split=self._split,
            draft_length=min(policy.draft_length, self._window),
            fast_verify=policy.fast_verify,
        )
        self._exhausted = False  # the drafter has nothing to propose after the chain
        self._paused = False  # the drafter waits for a verdict on the chain
        self._round_since: float | None = None  # whole rounds: when the first unsent draft came
        self._limit = 0  # the drafter's
        self._round_limit = 0  # not parallel: where the current round ends
        self._judged = True  # RECOVERING, PROBING: whether a draft was rejected
        self._asked: tuple[int, bool] | None = None  # tail sample a probe asked for, judged
        self._opened = False  # the cloud has confirmed the opening
        self._awaits_first = True  # the verdict on the prompt

    @property
    def position(self) -> int:
        """The first uncommitted position."""
        return self._chain.position

    @property
    def in_flight(self) -> int:
        """Drafts sent and not judged."""
        return self._chain.in_flight

    @property
    def finished(self) -> bool:
        return self.state is EdgeState.FINISHED

    # -- the caller ----------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        """Open the first stream."""
        self._move(EdgeEvent.START)
        return [Send(self._open()), *self._advance(now)]

    def set_length(self, draft_length: int, window: int, now: float) -> list[Effect]:
        """Speculate on with these; the cloud's limits cap them. At any time."""
        self._window = min(window, self._window_max)
        self._chain.draft_length = min(draft_length, self._window)
        return self._advance(now)

    @property
    def deadline(self) -> float | None:
        """When `tick` is due: a round that takes too long then goes out as it is."""
        timeout_s = self._policy.round_timeout_s
        if self._round_since is None or not timeout_s or self.state is not EdgeState.DRAFTING:
            return None
        return self._round_since + timeout_s

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        deadline = self.deadline
        if deadline is None or now < deadline or self._asked is not None:
            return []
        return self._send_due(now, round_is_over=True)

    def cancel(self) -> list[Effect]:
        """The answer is not wanted any more; idempotent."""
        online = self.state in ONLINE
        self._move(EdgeEvent.CANCEL)
        return [Send(Finish())] if online else []

    # -- the link ------------------------------------------------------------------------------

    def link_lost(self, now: float) -> list[Effect]:
        """The stream is gone. The drafter goes on within the window."""
        self._move(EdgeEvent.LINK_LOST)
        if self.state is EdgeState.OFFLINE:
            self._asked = None
        self._chain.new_stream()
        self._opened = False
        self._awaits_first = True
        return []

    def resume(self, now: float) -> list[Effect]:
        """Open a new stream with all that is committed, and send what is not judged again.

        While the drafter draws a recovered token nothing can be opened: then the Open is among
        the effects of its answer.
        """
        self._move(EdgeEvent.RESUME)
        if self.state is EdgeState.REOPENING:
            return []
        return [] if self.finished else [Send(self._open()), *self._advance(now)]

    # -- the drafter ---------------------------------------------------------------------------

    def drafted(
        self,
        branch: int,
        position: int,
        token_ids: Sequence[int],
        probs: Sequence[float],
        now: float,
    ) -> list[Effect]:
        """Drafts for `position` on, with their q in split mode."""
        if self._is_stale(branch, EdgeEvent.DRAFTED):
            return []
        self._require_position(position, self._chain.end)
        if position + len(token_ids) > self._limit:
            raise LocalProtocolError(f"Drafts beyond the limit {self._limit}", "drafted")
        if self._split and len(probs) != len(token_ids):
            raise LocalProtocolError("Drafts without their probabilities", "drafted")
        self._exhausted = False
        self._chain.extend(token_ids, probs)
        return self._advance(now)

    def exhausted(self, branch: int, position: int, now: float) -> list[Effect]:
        """The drafter has nothing to propose at `position`, the end of the chain."""
        if self._is_stale(branch, EdgeEvent.EXHAUSTED):
            return []
        self._require_position(position, self._chain.end)
        self._exhausted = True
        return self._advance(now)

    def paused(self, branch: int, position: int, now: float) -> list[Effect]:
        """The drafter is not sure of its last draft, and waits at the end of the chain."""
        if self._is_stale(branch, EdgeEvent.PAUSED):
            return []
        self._require_position(position, self._chain.end)
        self._paused = True
        if not len(self._chain):
            self._unpause()  # all of it was accepted meanwhile
        return self._advance(now)

    def recovered(self, branch: int, position: int, token_id: int, now: float) -> list[Effect]:
        """The recovered token is drawn: it is committed."""
        reopening = self.state is EdgeState.REOPENING
        if self._is_stale(branch, EdgeEvent.RECOVERED):
            return []
        self._require_position(position, self.position)
        online = self.state in ONLINE and not reopening
        effects = self._commit(0, (token_id,))
        reason = self._finish_reason()
        if reason is not None:
            return [*effects, *self._finish(reason, tell_cloud=online)]
        if reopening:
            effects.append(Send(self._open()))
        elif online:
            self._chain.recovered(token_id)
        return effects + self._advance(now)

    def probe_needed(self, branch: int, position: int, attempt: int, now: float) -> list[Effect]:
        """Tail sample number `attempt` of `position` is needed."""
        reopening = self.state is EdgeState.REOPENING
        if self._is_stale(branch, EdgeEvent.PROBE_NEEDED):
            return []
        self._require_position(position, self.position)
        self._asked = (attempt, self._judged)
        if reopening:
            return [Send(self._open())]
        return [Send(self._chain.probe(attempt + 1))] if self.state in ONLINE else []

    # -- the cloud -----------------------------------------------------------------------------

    def receive(self, frame: CloudFrame, now: float) -> list[Effect]:
        """A frame of the current stream. Raises RemoteProtocolError, RemoteOrderError."""
        if self.finished:
            return []
        if isinstance(frame, Opened):
            return self._receive_opened(frame)
        if not self._opened:
            raise RemoteOrderError("A verdict before the opening was confirmed", "verdict")
        validation.check_verdict(frame, self._card, self._policy.mode)
        self._check_verdict(frame)
        self.round_trip_s = self._chain.round_trip(frame, now)
        return self._receive_verdict(frame, now)

    def _receive_opened(self, opened: Opened) -> list[Effect]:
        self._move(EdgeEvent.OPENED)
        validation.check_opened(opened, self._card)
        if self._opened:
            raise RemoteOrderError("The opening was confirmed before", "opened")
        if opened.first_position != self.position:
            raise RemoteOrderError(
                f"Opened at {opened.first_position} instead of {self.position}",
                "opened.first_position",
            )
        self._opened = True
        self._window_max = min(self._window_max, opened.window)
        self._window = min(self._window, self._window_max)
        self._max_frame = min(self._max_frame, opened.max_draft_tokens)
        return []

    def _check_verdict(self, verdict: Verdict) -> None:
        """Raises where `verdict` does not fit what was sent."""
        accepted, epoch = verdict.num_accepted, self._chain.epoch
        if verdict.position != self.position:
            raise RemoteOrderError(
                f"A verdict for position {verdict.position} instead of {self.position}",
                "verdict.position",
            )
        if verdict.epoch > epoch:
            raise RemoteOrderError(f"Epoch {verdict.epoch} was never sent", "verdict.epoch")
        if accepted and (accepted > self.in_flight or verdict.epoch != epoch):
            raise RemoteOrderError(
                f"{accepted} drafts of epoch {verdict.epoch} accepted; {self.in_flight} of "
                f"{epoch} are in flight",
                "verdict.num_accepted",
            )
        if accepted + len(verdict.token_ids) > self._length_max - self.position:
            raise RemoteProtocolError("More tokens than were asked for", "verdict.token_ids")
        # The last position may leave the cloud no room to verify a draft.
        last = verdict.finish_reason is not None
        if self._split and verdict.token_ids and not self._awaits_first and not last:
            raise RemoteOrderError("In split mode the edge recovers", "verdict.token_ids")
        if verdict.rejection is not None and self._asked is None and accepted >= self.in_flight:
            raise RemoteOrderError("Nothing was there to be rejected", "verdict.rejection")

    def _receive_verdict(self, verdict: Verdict, now: float) -> list[Effect]:
        reason = verdict.finish_reason
        if reason is not None:
            self._move(EdgeEvent.FINISH)
            return [*self._commit(verdict.num_accepted, verdict.token_ids), Finished(reason)]
        self._move(EdgeEvent.VERDICT if verdict.rejection is None else EdgeEvent.REJECTION)
        self._awaits_first = False
        num_kept = self._chain.agrees(verdict.num_accepted, verdict.token_ids)
        own = verdict.token_ids[num_kept - verdict.num_accepted :]
        agreed = self.position + num_kept
        judged_end = max(agreed, verdict.position + verdict.num_draft_tokens)
        effects = self._commit(num_kept, own)
        reason = self._finish_reason() if effects else None
        if reason is not None:
            return [*effects, *self._finish(reason, tell_cloud=True)]
        if verdict.rejection is not None:
            attempt, self._judged = self._asked or (0, True)
            self._asked = None
            self._branch_off(judged_end)
            recover = Recover(self.branch, agreed, verdict.rejection, attempt, self._judged)
            return [*effects, recover]
        if effects:
            self._asked = None  # coupled: the probed position is committed
            if self._paused:
                self._unpause()
        if own:
            self._branch_off(judged_end)
            effects.append(Rollback(self.branch, agreed, own))
        return effects + self._advance(now)

    # -- what follows from the state -------------------------------------------------------------

    def _advance(self, now: float) -> list[Effect]:
        """Extend the drafter's limit, send what is due, ask where the drafter has nothing."""
        effects: list[Effect] = []
        if self.state in (EdgeState.DRAFTING, EdgeState.OFFLINE):
            effects += self._allow()
        if self.state is EdgeState.DRAFTING and self._asked is None:
            effects += self._send_due(now, round_is_over=self._round_is_over())
            if self._exhausted and not len(self._chain) and not self._awaits_first:
                self._asked = (0, False)
                effects.append(Send(self._chain.probe(1)))
        return effects

    def _send_due(self, now: float, *, round_is_over: bool) -> list[Effect]:
        frames = self._chain.frames(self._max_frame, round_is_over=round_is_over, now=now)
        if not self._chain.unsent:
            self._round_since = None
        elif self._round_since is None or frames:
            self._round_since = now
        return [Send(frame) for frame in frames]

    def _allow(self) -> list[Effect]:
        if self._exhausted:
            return []  # more room changes nothing; the next branch gets it
        limit = self.position + self._window
        if not self._policy.parallel_draft:
            if not len(self._chain) and self.position >= self._round_limit:
                self._round_limit = self.position + min(self._chain.draft_length, self._window)
            limit = self._round_limit
        limit = min(limit, self._length_max)
        if limit <= self._limit:
            return []
        self._limit = limit
        return [Allow(limit)]

    def _unpause(self) -> None:
        """Have `_allow` tell the drafter to go on, even if its limit stays."""
        self._paused = False
        self._limit = min(self._limit, self._chain.end)

    def _round_is_over(self) -> bool:
        """Whether the drafter can add nothing to the chain before something is judged."""
        blocked = self._chain.end >= self._limit and not self.in_flight
        stopped = self._exhausted or self._paused
        return stopped or blocked or self._chain.end >= self._length_max

    def _open(self) -> Open:
        policy = self._policy
        probing = self.state is EdgeState.PROBING and self._asked is not None
        return Open(
            session_id=self._session_id,
            prompt_token_ids=self._prompt,
            output_token_ids=np.array(self.output, np.int32),
            sampling=self._sampling,
            mode=policy.mode,
            max_tokens=self._max_tokens,
            stop_token_ids=tuple(sorted(self._stop_token_ids)),
            exact=policy.exact,
            sparse_k=(
                min(policy.sparse_k, self._card.limits.max_sparse_k)
                if policy.split_rejection
                else 0
            ),
            assist=AssistPolicy.NEVER if self._split else policy.assist,
            verify_whole_rounds=not policy.fast_verify,
            probe=self._asked[0] + 1 if probing and self._asked is not None else 0,
            protocol_version=min(validation.PROTOCOL_VERSION, self._card.protocol_version),
        )

    def _branch_off(self, judged_end: int) -> None:
        """Give up the chain, of which the drafts before `judged_end` were judged."""
        self.stale_tokens += self._chain.branch_off(judged_end)
        self.branch += 1
        self._exhausted = self._paused = False
        self._round_since = None
        self._round_limit = 0

    def _commit(self, num_kept: int, own: tuple[int, ...]) -> list[Effect]:
        """Commit the chain's first drafts, then tokens that are not in it."""
        token_ids = self._chain.first(num_kept) + own
        self._chain.commit(num_kept, len(own))
        self.output += token_ids
        return [Commit(token_ids)] if token_ids else []

    def _finish_reason(self) -> FinishReason | None:
        """Why the output is complete, judged by its last token."""
        if self.output[-1] in self._stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.position >= self._length_max else None

    def _finish(self, reason: FinishReason, *, tell_cloud: bool) -> list[Effect]:
        self._move(EdgeEvent.FINISH)
        return [*([Send(Finish())] if tell_cloud else []), Finished(reason)]

    def _is_stale(self, branch: int, event: EdgeEvent) -> bool:
        """Whether a drafter's event is to be ignored; otherwise the state follows it."""
        if branch > self.branch:
            raise LocalProtocolError(f"Branch {branch} was never begun", event.value)
        if branch < self.branch or self.finished:
            return True
        self._move(event)
        return False

    def _require_position(self, position: int, expected: int) -> None:
        if position != expected:
            raise LocalProtocolError(
                f"The drafter is at position {position} instead of {expected}", "position"
            )

    def _move(self, event: EdgeEvent) -> None:
        """Follow TRANSITIONS, or raise in the name of whoever caused `event`."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            message = f"{event.value!r} is not allowed in state {self.state.value!r}"
            if event in FROM_CLOUD and self.state in ONLINE:
                raise RemoteOrderError(message, "verdict")
            raise LocalProtocolError(message, event.value)
        self.state = state
