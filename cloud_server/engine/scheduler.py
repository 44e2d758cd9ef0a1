"""vLLM's scheduler, taught to verify drafts that arrive from outside.

A session is one vLLM request for the whole generation. What changes its state:
  - `add_request` opens it, and hands a delivered Draft to its `DraftQueue`;
  - `schedule` judges by kept rows (engine_session.py), turns queued drafts into the request's
    `spec_token_ids`, holds sessions that have nothing to judge, and tells the worker what each
    session's logits rows are for;
  - `update_from_output` lets vLLM commit what was accepted and reports a Verdict.
Nothing else may. A held session keeps its KV cache and costs no step; when memory is short it is
evicted (least recently used first), to be prefilled again when its edge speaks up.

In between steps, `request.num_computed_tokens == request.num_tokens - 1` for every running
session past its prefill: the last committed token is forwarded again, together with the drafts,
so that its logits row judges the first of them.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine import FinishReason as VLLMFinishReason
from vllm.v1.request import Request, RequestStatus

from cloud_server.engine.engine_session import EngineSession
from cloud_server.engine.envelope import (
    Delivery,
    StepOutcome,
    StepPlan,
    VerificationStep,
    unwrap,
    wrap,
)
from cloud_server.engine.interface import EngineEvent, EngineStats, Prefilled
from cloud_server.engine.judging.verification import StepKind, StepResult, VerificationParams
from cloud_server.engine.step_padding import Padding
from picospec.errors import NumericalError
from picospec.protocol.draft_queue import DraftQueue
from picospec.protocol.messages import AssistPolicy, FinishReason, Open, Rejection, Verdict

_FINISH_REASONS = {
    VLLMFinishReason.STOP: FinishReason.STOP,
    VLLMFinishReason.LENGTH: FinishReason.LENGTH,
}


class VerificationScheduler(Scheduler):
    """The engine's `scheduler_cls` (synchronous scheduling, one engine)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_draft_tokens = self.num_spec_tokens
        # vLLM pads one-token admissions with placeholder drafts to keep CUDA graphs uniform
        # (`pad_spec_decode`); they would be judged as if an edge had sent them.
        self.num_spec_tokens = 0
        self._sessions: dict[str, EngineSession] = {}
        self._events: dict[int, list[EngineCoreOutput]] = {}  # to send with the next outputs
        self._flushed = False  # the last step was empty, for the sake of the events
        self._padding: Padding = {}  # the worker tells with its first step
        # With more workers than this process holds, rows would have to travel.
        self._keep_rows = self.vllm_config.parallel_config.world_size == 1
        self._step_started_s = 0.0
        self._step_idle = True  # before the step was composed
        self._totals: Counter[str] = Counter()
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    # -- sessions come, speak and go ---------------------------------------------------------

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        value = unwrap(params.extra_args if params is not None else None)
        if isinstance(value, list):
            for delivery in value:
                self._deliver(delivery)
            return
        super().add_request(request)
        if isinstance(value, Open):
            whole_rounds = value.verify_whole_rounds
            session = EngineSession(
                request,
                value,
                DraftQueue(value.mode, request.all_token_ids, verify_whole_rounds=whole_rounds),
                VerificationParams.of(value, self.vllm_config.model_config.get_vocab_size()),
                keeps_rows=False,
            )
            session.keeps_rows = self._keep_rows and session.split and not whole_rounds
            self._sessions[request.request_id] = session

    def _deliver(self, delivery: Delivery) -> None:
        session = self._sessions.get(delivery.session_key)
        if session is None:
            return  # finished or aborted meanwhile
        stale = session.queue.stale_tokens
        recovered = session.queue.add(delivery.draft, delivery.arrived_s)
        self._totals["stale"] += session.queue.stale_tokens - stale
        if recovered is not None:
            reason = self._commit(session, recovered)
            if reason is not None:
                self._tell(session, session.request.num_tokens, finish_reason=reason)

    def _commit(self, session: EngineSession, token_id: int) -> FinishReason | None:
        """Append a token that no step sampled: recovered by the edge, or a draft that a row judged.

        Every token before it has been forwarded: the row it was judged by came from that.
        Returns why the output ends with it; then the session is gone.
        """
        request = session.request
        request.append_output_token_ids(token_id)
        session.unseen_forced.append(token_id)
        session.extended()
        if request.status == RequestStatus.RUNNING:
            request.num_computed_tokens = request.num_tokens - 1
        status = request.status
        if not check_stop(request, self.max_model_len):
            return None
        finished, request.status = request.status, status
        self.finish_requests(request.request_id, finished)
        stopped = finished == RequestStatus.FINISHED_STOPPED
        return FinishReason.STOP if stopped else FinishReason.LENGTH

    def _tell(
        self,
        session: EngineSession,
        position: int,
        *,
        num_drafts: int = 0,
        num_accepted: int = 0,
        rejection: Rejection | None = None,
        finish_reason: FinishReason | None = None,
    ) -> None:
        """Emit a verdict that no forward belongs to."""
        queue_us = 0
        if num_drafts:
            queue_us = max(0, int((self._step_started_s - session.arrived_s) * 1e6))
        verdict = Verdict(
            epoch=session.queue.epoch,
            position=position,
            num_accepted=num_accepted,
            rejection=rejection,
            finish_reason=finish_reason,
            num_draft_tokens=num_drafts,
            queue_us=queue_us,
            num_forwards=session.num_forwards,
        )
        session.num_forwards = 0
        self._emit(session.request, [verdict])

    def _emit(self, request: Request, events: Sequence[EngineEvent]) -> None:
        self._events.setdefault(request.client_index, []).append(
            EngineCoreOutput(request.request_id, [], kv_transfer_params=wrap(events))
        )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._sessions.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    # -- which sessions have something to do -------------------------------------------------

    def _has_step(self, session: EngineSession, idle: bool) -> bool:
        """Whether the next step can bring `session` forward; `idle` as `_idle` tells."""
        if session.has_own_step:
            return True
        assist = session.opening.assist
        return assist is AssistPolicy.ALWAYS or (assist is AssistPolicy.IDLE and idle)

    def _idle(self) -> bool:
        """Whether no session has drafts to verify or a prompt to prefill."""
        return not any(session.speaks for session in self._sessions.values())

    def has_unfinished_requests(self) -> bool:
        """Held sessions are left out: the engine sleeps while there are only those.

        Asked several times a step, so the first session that has a step answers. One that waits
        for an idle engine counts: there is an idle step for it, or another's step now.
        """
        if not super().has_unfinished_requests():
            return bool(self._events)
        return (
            bool(self._events)
            or len(self.requests) > len(self._sessions)
            or any(self._has_step(session, idle=True) for session in self._sessions.values())
        )

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """An evicted session stays out until its edge gives it something to do."""
        session = self._sessions.get(request.request_id)
        if session is not None and not self._has_step(session, self._step_idle):
            return False
        return super()._handle_blocked_waiting_request(request)

    # -- schedule ----------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._step_started_s = time.monotonic()
        for session in list(self._sessions.values()):
            if session.row is not None:
                self._judge_by_row(session)
        if self._events and not self._flushed:
            return self._empty_step()
        self._flushed = False
        self._step_idle = self._idle()
        running = self._running_sessions()
        held = [session for session in running if not self._plan(session)]
        if self._padding:
            self._pad([session for session in running if session not in held])
        self._make_room(held)
        output = super().schedule(*args, **kwargs)
        output.picospec = self._describe(output)  # type: ignore[attr-defined]
        return output

    def _empty_step(self) -> SchedulerOutput:
        """A step without a forward, so that what is decided does not wait for one."""
        self._flushed = True
        output = SchedulerOutput.make_empty()
        output.picospec = VerificationStep()  # type: ignore[attr-defined]
        return output

    def _judge_by_row(self, session: EngineSession) -> None:
        """Judge the draft or answer the probe that has arrived at the row's position, if one has.

        What is accepted is forwarded next and told with the verdict on what comes with it.
        """
        work = session.queue.take(1)
        if work is None:
            return
        session.arrived_s = work.arrived_s
        try:
            result = session.judge_by_row(work)
        except NumericalError as error:
            self.finish_requests(session.request.request_id, RequestStatus.FINISHED_ERROR)
            self._emit(session.request, [error])
            return
        num_drafts = len(work.token_ids)
        if result.rejection is not None:
            session.queue.judged(rejected=True)
            self._tell(session, work.position, num_drafts=num_drafts, rejection=result.rejection)
            return
        reason = self._commit(session, work.token_ids[0])
        session.queue.judged()
        if reason is None:
            session.num_by_row += 1
            return
        self._tell(
            session, work.position, num_drafts=num_drafts, num_accepted=1, finish_reason=reason
        )

    def _running_sessions(self) -> list[EngineSession]:
        return [
            session
            for request in self.running
            if (session := self._sessions.get(request.request_id)) is not None
        ]

    def _plan(self, session: EngineSession) -> bool:
        """Give a running session its drafts for this step, or hold it. True if it may run."""
        request = session.request
        request.spec_token_ids = []
        request.next_decode_eligible_step = 0
        session.work = None
        if session.prefilling:
            return True
        if not self._has_step(session, self._step_idle):
            request.next_decode_eligible_step = self.current_step + 2  # skip the coming step
            return False
        session.work = session.queue.take(self._room(request))
        if session.work is not None:
            request.spec_token_ids = list(session.work.token_ids)
        return True

    def _pad(self, sessions: list[EngineSession]) -> None:
        """Fill the coming step up, if it is one of few tokens and the table says so."""
        if not sessions or self.waiting or any(session.prefilling for session in sessions):
            return
        requests = [session.request for session in sessions]
        num_tokens = sum(1 + len(request.spec_token_ids) for request in requests)
        num_extra = self._padding.get(num_tokens, num_tokens) - num_tokens
        for request in requests:
            length = request.num_tokens + len(request.spec_token_ids)
            room = min(
                self._max_draft_tokens - len(request.spec_token_ids),
                self.max_model_len - 1 - length,
            )
            if 0 < num_extra <= room:
                request.spec_token_ids = request.spec_token_ids + [0] * num_extra
                return

    def _room(self, request: Request) -> int:
        """Most drafts that the request's remaining length can use in one step."""
        return min(
            self._max_draft_tokens,
            request.max_tokens - request.num_output_tokens,
            self.max_model_len - 1 - request.num_tokens,
        )

    def _make_room(self, held: list[EngineSession]) -> None:
        """Evict held sessions while those with work lack KV blocks or a place in the batch.

        vLLM preempts a running request only for another running one, so without this a new
        session would wait for ever behind sessions that wait for their edges.
        """
        if not held:
            return
        waiting = [
            session.request
            for session in self._sessions.values()
            if session.request.status != RequestStatus.RUNNING
            and self._has_step(session, self._step_idle)
        ]
        step_blocks = 1 + cdiv(self._max_draft_tokens + 1, self.block_size)
        needed = (len(self.running) - len(held)) * step_blocks
        if waiting:
            needed += cdiv(waiting[0].num_tokens, self.block_size) + step_blocks
        held.sort(key=lambda session: session.last_step, reverse=True)
        pool = self.kv_cache_manager.block_pool
        while held and (
            pool.get_num_free_blocks() < needed
            or (waiting and len(self.running) >= self.max_num_running_reqs)
        ):
            victim = held.pop().request
            self.running.remove(victim)
            self._evict(victim, self._step_started_s)
            self._totals["evicted"] += 1

    def _describe(self, output: SchedulerOutput) -> VerificationStep:
        """What the worker has to know about the step that vLLM has just composed."""
        step = VerificationStep()
        for request_id in output.num_scheduled_tokens:
            session = self._sessions.get(request_id)
            if session is None:
                continue
            session.last_step = self.current_step
            if session.unseen_forced:
                step.forced[request_id] = session.unseen_forced
                session.unseen_forced = []
            if not session.request.is_prefill_chunk:
                num_scheduled = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
                num_drafts = len(session.work.token_ids) if session.work is not None else 0
                plan = self._plan_rows(session, min(num_drafts, num_scheduled))
                if plan is not None:
                    step.plans[request_id] = plan
        return step

    def _plan_rows(self, session: EngineSession, num_drafts: int) -> StepPlan | None:
        """What the session's `num_drafts + 1` logits rows are for; None: nothing this time."""
        position = session.request.num_tokens
        work = session.work
        if num_drafts:
            assert work is not None
            return StepPlan(
                StepKind.DRAFTS,
                position,
                num_drafts,
                work.draft_probs[:num_drafts],
                keep_row=session.keeps_rows,
            )
        if not session.split:
            return StepPlan(StepKind.DRAFTS, position)
        if not session.opened:
            if session.opening.probe:
                return StepPlan(StepKind.PROBE, position, attempt=session.opening.probe - 1)
            return StepPlan(StepKind.FIRST, position)
        if work is not None and work.probe:
            return StepPlan(StepKind.PROBE, position, attempt=work.probe - 1)
        if self._room(session.request) < 1:
            # No room to verify a draft for the last position: the cloud draws it itself.
            return StepPlan(StepKind.FIRST, position)
        if session.keeps_rows:
            return StepPlan(StepKind.DRAFTS, position, keep_row=True)
        return None  # an evicted session is back; its drafts are judged in the next step

    # -- update ------------------------------------------------------------------------------

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        step: VerificationStep = scheduler_output.picospec  # type: ignore[attr-defined]
        outcome: StepOutcome = getattr(model_runner_output, "picospec", StepOutcome())
        # A session that stops is gone from `_sessions` before its last verdict is made.
        stepped = {
            request_id: self._sessions[request_id]
            for request_id in scheduler_output.num_scheduled_tokens
            if request_id in self._sessions
        }
        if outcome.padding is not None:
            self._padding = outcome.padding
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        emitted = {
            output.request_id: output for group in outputs.values() for output in group.outputs
        }
        compute_us = int((time.monotonic() - self._step_started_s) * 1e6)
        for request_id, session in stepped.items():
            request = session.request
            if not request.is_finished() and not request.is_prefill_chunk:
                request.num_computed_tokens = request.num_tokens - 1
            session.num_forwards += 1
            if request_id in step.plans:
                session.row, session.row_due = outcome.rows.get(request_id), False
            result = outcome.results.get(request_id)
            if isinstance(result, NumericalError):
                self.finish_requests(request_id, RequestStatus.FINISHED_ERROR)
                self._emit(request, [result])
            elif result is not None and request.status != RequestStatus.FINISHED_ABORTED:
                plan = step.plans[request_id]
                self._conclude(session, plan, result, emitted.get(request_id), compute_us)
        for client_index, events in self._events.items():
            group = outputs.setdefault(client_index, EngineCoreOutputs())
            group.outputs = [*group.outputs, *events]
        self._events.clear()
        if stepped:
            self._totals["steps"] += 1
            self._spent_s["step"] += time.monotonic() - self._step_started_s
            self._spent_s["forward"] += outcome.forward_s
            self._spent_s["sampling"] += outcome.sampling_s
        for group in outputs.values():
            if group.scheduler_stats is not None:  # now that the sessions are up to date
                group.scheduler_stats.kv_connector_stats = wrap(self._engine_stats())
        return outputs

    def _conclude(
        self,
        session: EngineSession,
        plan: StepPlan,
        result: StepResult,
        output: EngineCoreOutput | None,
        compute_us: int,
    ) -> None:
        """Make the session's Verdict from what vLLM committed (it cuts at a stop token).

        Drafts that a row accepted before the step are told with it.
        """
        token_ids = output.new_token_ids if output is not None else []
        finish_reason = None
        if output is not None and output.finish_reason is not None:
            finish_reason = _FINISH_REASONS.get(output.finish_reason)
        num_accepted = min(result.num_accepted, len(token_ids))
        work, session.work = session.work, None
        num_by_row, session.num_by_row = session.num_by_row, 0
        num_judged = num_by_row + plan.num_drafts
        rejection = result.rejection if finish_reason is None else None
        if token_ids and finish_reason is None and len(token_ids) > num_accepted:
            session.extended()
        if not num_judged and not token_ids and rejection is None and finish_reason is None:
            return  # a recovered token was forwarded, for its row
        queue_us = 0
        if num_judged:
            arrived_s = (
                work.arrived_s if work is not None and plan.num_drafts else session.arrived_s
            )
            queue_us = max(0, int((self._step_started_s - arrived_s) * 1e6))
        verdict = Verdict(
            epoch=session.queue.epoch,
            position=plan.position - num_by_row,
            num_accepted=num_by_row + num_accepted,
            token_ids=tuple(token_ids[num_accepted:]),
            rejection=rejection,
            finish_reason=finish_reason,
            num_draft_tokens=num_judged,
            queue_us=queue_us,
            compute_us=compute_us,
            num_forwards=session.num_forwards,
        )
        session.num_forwards = 0
        events: list[EngineEvent] = [verdict]
        if not session.opened:
            session.opened = True
            events.insert(0, _prefilled(session, plan, output))
        session.queue.judged(rejected=rejection is not None)
        if output is None:
            self._emit(session.request, events)
        else:
            output.kv_transfer_params = wrap(events)

    # -- what vLLM's own speculation would do --------------------------------------------------

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Drafts come over the wire, never from the runner."""

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> None:
        """Counted from the verdicts, in the gRPC process."""
        return

    def _engine_stats(self) -> EngineStats:
        running = waiting = 0
        idle = self._idle()
        for session in self._sessions.values():
            if self._has_step(session, idle):
                if session.request.status == RequestStatus.RUNNING:
                    running += 1
                else:
                    waiting += 1
        return EngineStats(
            running_sessions=running,
            held_sessions=len(self._sessions) - running - waiting,
            waiting_sessions=waiting,
            kv_cache_usage=self.kv_cache_manager.usage,
            evicted_sessions=self._totals["evicted"],
            preempted_sessions=self._totals["preempted"],
            stale_tokens=self._totals["stale"],
            steps=self._totals["steps"],
            step_s=self._spent_s["step"],
            forward_s=self._spent_s["forward"],
            sampling_s=self._spent_s["sampling"],
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._totals["preempted"] += 1
        self._evict(request, *args, **kwargs)

    def _evict(self, request: Request, *args: Any, **kwargs: Any) -> None:
        session = self._sessions.get(request.request_id)
        if session is not None:
            session.evicted()
        super()._preempt_request(request, *args, **kwargs)


def _prefilled(
    session: EngineSession, plan: StepPlan, output: EngineCoreOutput | None
) -> Prefilled:
    # vLLM hands the statistics out with the first token; a probe has none.
    stats = output.prefill_stats if output is not None else session.request.take_prefill_stats()
    return Prefilled(plan.position, stats.num_cached_tokens if stats is not None else 0)
