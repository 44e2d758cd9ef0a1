"""The parallel drafter: joins a drafting context, an EdgeSession and a stream to the cloud.

The context is there only while the drafter drafts and works: without it the cloud goes on alone.

The rules of this file:
1. It runs on the event loop and computes nothing: the session decides, the drafter's process
   and the cloud compute. Here effects are carried out and time is read.
2. The session is told of everything in the order in which it happened; each event's effects
   are carried out before the next.
3. One stream at a time: a lost one is closed before its successor opens, so no late frame can
   reach the session. When to resume is `resume`'s to say.
4. When `aclose` returns no task, context or stream of the generation is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable

import numpy as np

from edge_agent.accounting import Account
from edge_agent.control import Control, Course, DraftPlan, FixedControl
from edge_agent.drafting.context import DraftContext, Drafting
from edge_agent.drafting.messages import ContextFailed, ContextSpec, DraftEvent
from edge_agent.generation import GenerationChunk, GenerationRequest, GenerationStats
from edge_agent.link import Link, Stream
from edge_agent.observer import NullObserver, PipelineObserver
from edge_agent.resume import Resumption
from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    DrafterFailed,
    LocalProtocolError,
    PicoSpecError,
)
from picospec.protocol.drafting import Allow, Drafted, Rollback
from picospec.protocol.edge_events import (
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
from picospec.protocol.edge_machine import SpeculationPolicy
from picospec.protocol.edge_session import EdgeSession
from picospec.protocol.messages import (
    AssistPolicy,
    EdgeFrame,
    FinishReason,
    ModelCard,
    Open,
    Verdict,
)
from picospec.protocol.session_spec import SessionSpec

__all__ = ["SpeculationPolicy", "SpeculativeGeneration", "SpeculativeGenerator"]

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
        control: Control | None = None,
    ) -> None:
        """`card` gives the model served; raises CloudUnavailable, ModelMismatch. `control` decides
        on mode and lengths; without one they stay as in `policy`."""
        self.link = link
        self.drafting = drafting
        self.card = card
        self.policy = policy
        self.observer = observer if observer is not None else NullObserver()
        self.control = control or FixedControl(policy)
        self._drafted = (drafting.timed_tokens, drafting.drafting_s)  # when last looked at

    def generate(self, request: GenerationRequest) -> SpeculativeGeneration:
        return SpeculativeGeneration(self, request)

    def report_drafting(self) -> None:
        """Tell the control what the drafter has done since it was last told."""
        before = self._drafted
        self._drafted = (self.drafting.timed_tokens, self.drafting.drafting_s)
        self.control.drafted(self._drafted[0] - before[0], self._drafted[1] - before[1])


class SpeculativeGeneration:
    """A `generation.Generation`. Starts when iterated; to be iterated once.

    Iterating raises CloudUnavailable, CapacityError, DrafterFailed, ModelMismatch ...
    Committed tokens that the reader has not taken yet come together in its next chunk, so a slow
    reader costs no more memory than the answer.
    """

    def __init__(self, generator: SpeculativeGenerator, request: GenerationRequest) -> None:
        self._generator = generator
        self._request = request
        self._policy = policy = generator.policy
        self.stats = GenerationStats(prompt_tokens=len(request.prompt_token_ids))
        self._observer = generator.observer
        self._account = Account(self.stats, generator.observer)
        self._course: Course
        self._plan = DraftPlan(policy.draft_length, policy.window)
        self._resumption = Resumption(
            attempts_max=policy.resume_attempts, timeout_s=policy.resume_timeout_s
        )
        self._spec: SessionSpec
        self._session: EdgeSession
        self._context: DraftContext | None = None
        self._has_drafter = True  # or may get a context of it
        self._num_measured = 0  # output tokens that the course has heard of
        self._stream: Stream | None = None
        self._stream_opened = asyncio.Event()
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
            self._close_context()
            self._course.end()
            self._observer.generation_finished(self._outcome())

    def _outcome(self) -> str:
        if self._reason is not None:
            return self._reason.value
        return type(self._error).__name__ if self._error is not None else "cancelled"

    def _start(self) -> None:
        """Open context and session, and let them run. Raises PicoSpecError."""
        if self._closed or self._task is not None:
            raise LocalProtocolError("A generation runs once", "generation")
        request, card = self._request, self._generator.card()
        self._course = self._generator.control.begin(
            request.sampling, seeded=request.seeded, now=self._now()
        )
        self._plan = self._course.plan(self._now())
        self._policy = policy = dataclasses.replace(self._policy, mode=self._course.mode)
        self.stats.mode = policy.mode.value
        self._spec = spec = SessionSpec(
            session_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop_token_ids=request.stop_token_ids,
            card=card,
            policy=policy,
        )
        self._session = EdgeSession(spec)
        self._handle(self._lengths())
        self._follow_plan()
        self._observer.generation_started()
        self._task = asyncio.create_task(self._run(), name="generation")

    def _lengths(self) -> SetLength:
        return SetLength(self._plan.draft_length, self._plan.window, self._plan.lead)

    # -- the drafter and the clock ---------------------------------------------------------------

    def _follow_plan(self) -> None:
        """Have a drafting context if the plan is to draft. Without one the cloud goes on alone."""
        if self._context is not None or not self._plan.window or not self._has_drafter:
            return
        request, policy = self._request, self._policy
        output = np.array(self._session.output, np.int32)
        try:
            self._context = self._generator.drafting.open(
                ContextSpec(
                    request_id=request.request_id,
                    token_ids=np.concatenate([request.prompt_token_ids, output]),
                    sampling=request.sampling,
                    mode=policy.mode,
                    stop_token_ids=request.stop_token_ids,
                    prompt_length=len(request.prompt_token_ids),
                    max_length=len(request.prompt_token_ids) + request.max_tokens,
                    logits_width=self._spec.card.logits_width,
                    confidence_stop=policy.confidence_stop,
                ),
                self._on_draft_event,
                branch=self._session.branch,
            )
        except (DrafterFailed, CapacityError) as error:
            self._lose_drafter(error)

    def _lose_drafter(self, error: PicoSpecError) -> None:
        """Go on without drafts, if the cloud does."""
        if self._policy.assist not in (AssistPolicy.ALWAYS, AssistPolicy.AUTO):
            self._fail(error)
            return
        self._has_drafter = False
        self._close_context()
        logger.warning("the cloud goes on alone: %s", error)

    def _close_context(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.close()

    def _on_draft_event(self, event: DraftEvent) -> None:
        """Called on the event loop, between any two other events of the session."""
        if isinstance(event, ContextFailed):
            if not self._closed:
                self._lose_drafter(event.error)
        else:
            self._handle_guarded(event)

    def _on_deadline(self) -> None:
        self._timer = None
        self._handle_guarded(Tick())

    def _handle_guarded(self, event: EdgeEvent) -> None:
        """Whatever `event` raises ends the generation."""
        if self._error is not None or self._closed:
            return
        if isinstance(event, Drafted):
            self._observer.drafted(len(event.token_ids))
        try:
            self._handle(event)
        except Exception as error:
            self._fail(self._named(error))

    def _named(self, error: Exception) -> PicoSpecError:
        """`error` as one of ours; what has no name is a bug of ours."""
        if isinstance(error, PicoSpecError):
            return error
        events = [type(event).__name__ for _, event in self._session.log]
        logger.exception("the pipeline failed; the session's last events: %s", ", ".join(events))
        return LocalProtocolError(f"{type(error).__name__} in the pipeline", "pipeline")

    # -- the cloud -------------------------------------------------------------------------------

    async def _run(self) -> None:
        """From the first stream to the last, until the generation is finished."""
        try:
            self._handle(Start())
            while not self._session.finished:
                try:
                    await self._receive_all()
                except (CloudUnavailable, CapacityError) as error:
                    await self._resume(error)
        except Exception as error:
            self._fail(self._named(error))
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
            self._account.moved(stream)
            self._account.received(frame)
            self._handle(frame)
            if isinstance(frame, Verdict):
                self._resumption.made_progress()
                self._steer(frame)
        # The status is on its way here, or Finish on its way there.
        with contextlib.suppress(PicoSpecError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                while await stream.receive() is not None:
                    pass

    def _steer(self, verdict: Verdict) -> None:
        """Tell the course what was measured, and follow its plan."""
        self._generator.report_drafting()
        round_trip_s = self._session.round_trip_s
        if round_trip_s is not None:
            self._observer.round_trip(round_trip_s)
        num_new = self.stats.output_tokens - self._num_measured
        self._num_measured = self.stats.output_tokens
        self._course.heard(verdict, num_new, round_trip_s, self._now())
        plan = self._course.plan(self._now())
        if plan != self._plan:
            self._plan = plan
            self._observer.planned(plan.draft_length, plan.window)
            self._follow_plan()
            self._handle(self._lengths())

    async def _resume(self, error: CloudUnavailable | CapacityError) -> None:
        """Take the session up again on a new stream, or raise `error`."""
        resumption = self._resumption
        refused = isinstance(error, CapacityError) and not self.stats.output_tokens
        if refused and not resumption.under_way:
            raise error  # it was never let in
        delay_s = resumption.delay_s(self._now())
        if delay_s is None:
            raise error
        logger.info("the link was lost (%s); attempt %d to resume", error, resumption.attempts)
        self._account.resuming()
        self._handle(LinkLost())
        await self._close_stream()
        await asyncio.sleep(delay_s)
        self._handle(Resume())

    # -- events and effects ------------------------------------------------------------------------

    def _handle(self, event: EdgeEvent) -> None:
        """Tell the session, and carry out what follows."""
        for effect in self._session.handle(event, self._now()):
            self._carry_out(effect)
        self._set_timer()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(frame):
                self._send(frame)
            case Commit(token_ids):
                self.stats.output_tokens += len(token_ids)
                self._committed += token_ids
                self._news.set()
            case Allow():
                if self._context is not None:
                    self._context.send(effect)
            case Rollback():
                if self._context is not None:
                    self._context.send(effect)
                self._account.rolled_back(self._session.stale_tokens)
            case Finished(reason):
                self._reason = reason
                self._close_context()
                self._stream_opened.set()
                self._news.set()

    def _send(self, frame: EdgeFrame) -> None:
        if isinstance(frame, Open):
            self._stream = self._generator.link.open_stream(self._request.request_id)
            self._stream_opened.set()
        if self._stream is not None:
            self._stream.send(frame)
            self._account.moved(self._stream)

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

    async def _close_stream(self) -> None:
        """Idempotent."""
        self._stream_opened.clear()
        stream, self._stream = self._stream, None
        if stream is not None:
            self._account.closed(stream)
            await stream.aclose()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
