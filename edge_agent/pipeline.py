"""The parallel drafter: joins a drafting context, an EdgeSession and a stream to the cloud.

The laws of this file:
1. It runs on the event loop and computes nothing: the session decides, the drafter's process
   and the cloud compute. Here effects are carried out and time is read.
2. The session is told of everything in the order in which it happened; each call's effects
   are carried out before the next.
3. A stream at a time: a lost one is closed before its successor opens, so no late frame can
   reach the session. Resuming is bounded in attempts and in time.
4. When `aclose` returns no task, context or stream of the generation is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from edge_agent.control import DraftLengthController, DraftPlan, FixedLength
from edge_agent.drafting.context import DraftContext, Drafting
from edge_agent.drafting.messages import (
    ContextFailed,
    ContextSpec,
    Drafted,
    DraftEvent,
    Exhausted,
    Paused,
    ProbeNeeded,
    Recovered,
)
from edge_agent.generation import GenerationChunk, GenerationRequest, GenerationStats
from edge_agent.link import Link, Stream
from edge_agent.observer import NullObserver, PipelineObserver
from picospec.errors import CapacityError, CloudUnavailable, LocalProtocolError, PicoSpecError
from picospec.protocol.edge_machine import (
    Allow,
    Commit,
    Effect,
    Finished,
    Recover,
    Rollback,
    Send,
    SpeculationPolicy,
)
from picospec.protocol.edge_session import EdgeSession
from picospec.protocol.messages import CloudFrame, FinishReason, ModelCard, Open, Opened, Verdict

__all__ = ["SpeculationPolicy", "SpeculativeGeneration", "SpeculativeGenerator"]

BACKOFF_FIRST_S = 0.1  # doubles with each attempt to resume
BACKOFF_MAX_S = 5.0
LAST_WORDS_S = 0.05  # for a finished stream to end well, so that it counts as no cancellation

logger = logging.getLogger(__name__)


class SpeculativeGenerator:
    """A `generation.Generator` by speculation."""

    def __init__(
        self,
        link: Link,
        drafting: Drafting,
        card: Callable[[], ModelCard],
        policy: SpeculationPolicy,
        observer: PipelineObserver | None = None,
        control: Callable[[], DraftLengthController] | None = None,
    ) -> None:
        """`card` gives the model served; raises CloudUnavailable, ModelMismatch. `control` makes
        each generation's controller; without one, lengths stay as in `policy`."""
        self._link = link
        self._drafting = drafting
        self._card = card
        self._policy = policy
        self._observer = observer if observer is not None else NullObserver()
        self._control = control or (lambda: FixedLength(_plan_of(policy)))

    def generate(self, request: GenerationRequest) -> SpeculativeGeneration:
        return SpeculativeGeneration(
            self._link,
            self._drafting,
            self._card,
            self._policy,
            self._observer,
            self._control(),
            request,
        )


def _plan_of(policy: SpeculationPolicy) -> DraftPlan:
    return DraftPlan(policy.draft_length, policy.window)


class SpeculativeGeneration:
    """A `generation.Generation`. Starts when iterated; to be iterated once.

    Iterating raises CloudUnavailable, CapacityError, DrafterFailed, ModelMismatch ...
    Committed tokens that the reader has not taken yet come together in its next chunk, so a slow
    reader costs no more memory than the answer.
    """

    def __init__(
        self,
        link: Link,
        drafting: Drafting,
        card: Callable[[], ModelCard],
        policy: SpeculationPolicy,
        observer: PipelineObserver,
        control: DraftLengthController,
        request: GenerationRequest,
    ) -> None:
        self.stats = GenerationStats(
            mode=policy.mode.value, prompt_tokens=len(request.prompt_token_ids)
        )
        self._link = link
        self._drafting = drafting
        self._card = card
        self._policy = policy
        self._observer = observer
        self._control = control
        self._plan = _plan_of(policy)
        self._drafted = (drafting.drafted_tokens, drafting.drafting_s)  # when last looked at
        self._request = request
        self._session: EdgeSession
        self._context: DraftContext | None = None
        self._stream: Stream | None = None
        self._stream_opened = asyncio.Event()
        self._counted_bytes = (0, 0)  # of the current stream: up, down
        self._lost_at: float | None = None  # the first loss since the last verdict
        self._attempts = 0  # to resume since then
        self._resuming = False
        self._task: asyncio.Task[None] | None = None
        self._committed: list[int] = []  # not yet taken by the reader
        self._reason: FinishReason | None = None
        self._error: PicoSpecError | None = None
        self._timer: asyncio.TimerHandle | None = None  # for the session's deadline
        self._news = asyncio.Event()  # for the reader
        self._closed = False

    # -- the reader ----------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        self._start()
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                # More may be committed, or all be over, while the reader has the chunk.
                token_ids, self._committed = tuple(self._committed), []
                reason, error = self._reason, self._error
                if token_ids or reason is not None:
                    yield GenerationChunk(token_ids, reason)
                if error is not None:
                    raise error
                if reason is not None or self._closed:
                    return
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Cancel what still runs, and free everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._news.set()
        if self._task is None:
            return
        try:
            if self._reason is not None:
                await asyncio.wait({self._task}, timeout=2 * LAST_WORDS_S)
        finally:  # also when the reader is cancelled meanwhile
            self._stop_timer()
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            await self._close_stream()
            if self._context is not None:
                self._context.close()
            self._observer.generation_finished(self._outcome())

    def _outcome(self) -> str:
        if self._reason is not None:
            return self._reason.value
        return type(self._error).__name__ if self._error is not None else "cancelled"

    def _start(self) -> None:
        """Open context and session, and let them run. Raises PicoSpecError."""
        if self._closed or self._task is not None:
            raise LocalProtocolError("A generation runs once", "generation")
        request, card = self._request, self._card()
        self._session = EdgeSession(
            request.request_id,
            request.prompt_token_ids,
            request.sampling,
            request.max_tokens,
            request.stop_token_ids,
            card,
            self._policy,
        )
        self._context = self._drafting.open(
            ContextSpec(
                request_id=request.request_id,
                token_ids=request.prompt_token_ids,
                sampling=request.sampling,
                mode=self._policy.mode,
                stop_token_ids=request.stop_token_ids,
                prompt_length=len(request.prompt_token_ids),
                max_length=len(request.prompt_token_ids) + request.max_tokens,
                logits_width=card.logits_width,
                confidence_stop=self._policy.confidence_stop,
            ),
            self._on_draft_event,
        )
        self._observer.generation_started()
        self._task = asyncio.create_task(self._run(), name="generation")

    # -- the drafter -----------------------------------------------------------------------------

    def _on_draft_event(self, event: DraftEvent) -> None:
        """Called on the event loop, between any two other inputs of the session."""
        self._guarded(lambda: self._hear(event))

    def _on_deadline(self) -> None:
        self._timer = None
        self._guarded(lambda: self._session.tick(self._now()))

    def _guarded(self, cause: Callable[[], list[Effect]]) -> None:
        """Carry out what follows from `cause`; whatever it raises ends the generation."""
        if self._error is not None or self._closed:
            return
        try:
            self._execute(cause())
        except PicoSpecError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("the drafter's or the clock's news could not be carried out")
            self._fail(LocalProtocolError(f"{type(error).__name__} in the pipeline", "pipeline"))

    def _hear(self, event: DraftEvent) -> list[Effect]:
        session, now = self._session, self._now()
        match event:
            case Drafted(branch, position, token_ids, probs):
                self._observer.drafted(len(token_ids))
                return session.drafted(branch, position, token_ids, probs, now)
            case Exhausted(branch, position):
                return session.exhausted(branch, position, now)
            case Paused(branch, position):
                return session.paused(branch, position, now)
            case Recovered(branch, position, token_id):
                return session.recovered(branch, position, token_id, now)
            case ProbeNeeded(branch, position, attempt):
                return session.probe_needed(branch, position, attempt, now)
            case ContextFailed(error):
                raise error

    # -- the cloud -------------------------------------------------------------------------------

    async def _run(self) -> None:
        """From the first stream to the last, until the generation is finished."""
        try:
            self._execute(self._session.start(self._now()))
            while not self._session.finished:
                try:
                    await self._receive_all()
                except (CloudUnavailable, CapacityError) as error:
                    if not self._session.finished:  # by the token that the drafter recovered
                        await self._resume(error)
        except PicoSpecError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("the pipeline failed")
            self._fail(LocalProtocolError(f"{type(error).__name__} in the pipeline", "pipeline"))
        finally:
            await self._close_stream()

    async def _receive_all(self) -> None:
        """Frames of the current stream until the generation or the stream ends."""
        session = self._session
        await self._stream_opened.wait()
        stream = self._stream
        if stream is None:
            return  # finished while it was lost
        while not session.finished:
            frame = await stream.receive()
            if frame is None:
                raise CloudUnavailable("The cloud ended the stream before the answer was complete")
            self._note(frame)
            self._execute(session.receive(frame, self._now()))
            if isinstance(frame, Verdict):
                self._lost_at = None
                if session.round_trip_s is not None:
                    self._observer.round_trip(session.round_trip_s)
                self._steer(frame)
        # The status is on its way here, or Finish on its way there.
        with contextlib.suppress(PicoSpecError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                while await stream.receive() is not None:
                    pass

    def _steer(self, verdict: Verdict) -> None:
        """Tell the controller what was measured, and follow its plan."""
        control, session, drafting = self._control, self._session, self._drafting
        before, self._drafted = self._drafted, (drafting.drafted_tokens, drafting.drafting_s)
        control.drafted(self._drafted[0] - before[0], self._drafted[1] - before[1])
        if session.round_trip_s is not None:
            control.round_trip(session.round_trip_s)
        control.judged(
            verdict.num_draft_tokens,
            verdict.num_accepted,
            verdict.num_forwards,
            verdict.queue_us * 1e-6,
            verdict.compute_us * 1e-6,
        )
        now = self._now()
        plan = control.plan(now)
        if plan != self._plan:
            self._plan = plan
            self._observer.planned(plan.draft_length, plan.window)
            self._execute(session.set_length(plan.draft_length, plan.window, now))

    async def _resume(self, error: CloudUnavailable | CapacityError) -> None:
        """Take the session up again on a new stream, or raise `error`."""
        policy, now = self._policy, self._now()
        if self._lost_at is None:
            self._lost_at, self._attempts = now, 0
            if isinstance(error, CapacityError) and not self.stats.output_tokens:
                raise error  # it was never let in
        delay_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**self._attempts)
        waited_s = now + delay_s - self._lost_at
        if self._attempts >= policy.resume_attempts or waited_s > policy.resume_timeout_s:
            raise error
        self._attempts += 1
        self._resuming = True
        logger.info("the link was lost (%s); attempt %d to resume", error, self._attempts)
        self._execute(self._session.link_lost(now))
        await self._close_stream()
        await asyncio.sleep(delay_s)
        self._execute(self._session.resume(self._now()))

    def _note(self, frame: CloudFrame) -> None:
        """Count a frame before the session sees it."""
        stats = self.stats
        self._count_bytes()
        if isinstance(frame, Opened):
            stats.cached_prompt_tokens = frame.cached_prompt_tokens
            if self._resuming:
                self._resuming = False
                stats.resumes += 1
                self._observer.resumed()
            return
        stats.verdicts += 1
        stats.forwards += frame.num_forwards
        stats.drafted_tokens += frame.num_draft_tokens
        stats.accepted_tokens += frame.num_accepted
        self._observer.verdict(frame)

    # -- effects ---------------------------------------------------------------------------------

    def _execute(self, effects: list[Effect]) -> None:
        assert self._context is not None
        for effect in effects:
            match effect:
                case Send(frame):
                    if isinstance(frame, Open):
                        self._stream = self._link.open_stream(self._request.request_id)
                        self._stream_opened.set()
                    if self._stream is not None:
                        self._stream.send(frame)
                        self._count_bytes()
                case Commit(token_ids):
                    self.stats.output_tokens += len(token_ids)
                    self._committed += token_ids
                    self._news.set()
                case Allow(limit):
                    self._context.allow(limit)
                case Rollback(branch, length, token_ids):
                    self._context.rollback(branch, length, token_ids)
                    self._count_rollback()
                case Recover(branch, position, rejection, attempt, judged):
                    self._context.recover(branch, position, rejection, attempt, judged)
                    self._count_rollback()
                case Finished(reason):
                    self._reason = reason
                    self._context.close()
                    self._stream_opened.set()
                    self._news.set()
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = self._session.deadline
        if self._timer is not None and self._timer.when() != deadline:
            self._stop_timer()
        if deadline is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._on_deadline)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fail(self, error: PicoSpecError) -> None:
        """End the generation with `error`, unless it has ended."""
        if self._error is None and self._reason is None:
            self._error = error
            self._news.set()

    def _count_rollback(self) -> None:
        self.stats.rollbacks += 1
        self._observer.rollback()
        num_stale, self._session.stale_tokens = self._session.stale_tokens, 0
        if num_stale:
            self._observer.stale(num_stale)

    def _count_bytes(self) -> None:
        if self._stream is None:
            return
        counted = (self._stream.bytes_up, self._stream.bytes_down)
        up, down = counted[0] - self._counted_bytes[0], counted[1] - self._counted_bytes[1]
        self._counted_bytes = counted
        self.stats.bytes_up += up
        self.stats.bytes_down += down
        if up:
            self._observer.bytes_up(up)
        if down:
            self._observer.bytes_down(down)

    async def _close_stream(self) -> None:
        """Idempotent."""
        self._stream_opened.clear()
        stream = self._stream
        if stream is None:
            return
        self._count_bytes()
        self._stream, self._counted_bytes = None, (0, 0)
        await stream.aclose()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
