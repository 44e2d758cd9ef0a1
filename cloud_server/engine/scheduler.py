"""vLLM's scheduler, taught to verify drafts that arrive from outside: vLLM's overrides.

A session is one vLLM request for the whole generation. What changes its state:
  - `add_request` opens it, and hands a delivered Draft to its `DraftQueue`;
  - `schedule` judges by kept rows (engine_session.py), has the step composed (step_plan.py) and
    evicts held sessions where others lack memory (residency.py);
  - `update_from_output` lets vLLM commit what was accepted and reports a Verdict (verdicts.py).
Nothing else may. When the cloud decodes without a draft: takeover.py.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine import FinishReason as VLLMFinishReason
from vllm.v1.request import Request, RequestStatus

from cloud_server.engine.engine_session import EngineSession
from cloud_server.engine.envelope import (
    Delivery,
    EngineReport,
    StepOutcome,
    VerificationOutputs,
    unwrap,
)
from cloud_server.engine.interface import EngineEvent, EngineStats, Prefilled
from cloud_server.engine.judging.verification import StepResult
from cloud_server.engine.readiness import ReadySessions
from cloud_server.engine.residency import Residency
from cloud_server.engine.step_plan import StepPlan, StepPlanner, VerificationStep
from picospec.errors import NumericalError
from picospec.protocol.messages import FinishReason, Rejection

_CLIENT = 0  # the gRPC process is the engine's only client
_FINISH_REASONS = {
    VLLMFinishReason.STOP: FinishReason.STOP,
    VLLMFinishReason.LENGTH: FinishReason.LENGTH,
}


class VerificationScheduler(Scheduler):
    """The engine's `scheduler_cls` (synchronous scheduling, one engine)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        max_draft_tokens = self.num_spec_tokens
        # vLLM pads one-token admissions with placeholder drafts to keep CUDA graphs uniform
        # (`pad_spec_decode`); they would be judged as if an edge had sent them.
        self.num_spec_tokens = 0
        self._planner = StepPlanner(
            max_draft_tokens=max_draft_tokens, max_model_len=self.max_model_len
        )
        self._residency = Residency(
            block_size=self.block_size,
            max_resident=self.max_num_running_reqs,
            watermark_blocks=self.kv_cache_manager.watermark_blocks,
        )
        # With more workers than this process holds, rows would have to travel.
        self._may_keep_rows = self.vllm_config.parallel_config.world_size == 1
        self._sessions: dict[str, EngineSession] = {}
        self._ready = ReadySessions()  # of them
        self._events: dict[str, list[EngineEvent]] = {}  # to send with the next outputs
        self._flushed = False  # the last step was empty, for the sake of the events
        self._step_started_s = 0.0
        self._step_idle = True  # before the step was composed
        self._totals: Counter[str] = Counter()
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    # -- sessions come, are fed and go -------------------------------------------------------

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        value = unwrap(params.extra_args if params is not None else None)
        if isinstance(value, list):
            for delivery in value:
                self._deliver(delivery)
            return
        super().add_request(request)
        if value is not None:
            session = EngineSession.of(
                request,
                value,
                logits_width=self.vllm_config.model_config.get_vocab_size(),
                may_keep_rows=self._may_keep_rows,
            )
            self._sessions[request.request_id] = session
            self._ready.note(session)

    def _deliver(self, delivery: Delivery) -> None:
        session = self._sessions.get(delivery.session_key)
        if session is None:
            return  # finished or aborted meanwhile
        stale = session.queue.stale_tokens
        recovered = session.queue.add(delivery.draft, delivery.arrived_s)
        self._totals["stale"] += session.queue.stale_tokens - stale
        if recovered is not None:
            reason = self._append(session, recovered)
            if reason is not None:
                self._tell(session, finish_reason=reason)
        self._changed(session)

    def _append(self, session: EngineSession, token_id: int) -> FinishReason | None:
        """Append a token that no step sampled: recovered by the edge, or a draft that a row judged.

        Returns why the output ends with it; then the session is gone.
        """
        request = self.requests[session.request.request_id]
        request.append_output_token_ids(token_id)
        session.append(token_id)
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
        *,
        num_drafts: int = 0,
        rejection: Rejection | None = None,
        finish_reason: FinishReason | None = None,
    ) -> None:
        """Emit a verdict that no forward belongs to."""
        verdict = session.tally.verdict(
            epoch=session.queue.epoch,
            position=session.request.num_tokens,
            step_started_s=self._step_started_s,
            num_drafts=num_drafts,
            rejection=rejection,
            finish_reason=finish_reason,
        )
        self._emit(session, verdict)

    def _emit(self, session: EngineSession, *events: EngineEvent) -> None:
        self._events.setdefault(session.request.request_id, []).extend(events)

    def _fail(self, session: EngineSession, error: NumericalError) -> None:
        self.finish_requests(session.request.request_id, RequestStatus.FINISHED_ERROR)
        self._emit(session, error)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        session = self._sessions.pop(request.request_id, None)
        if session is not None:
            self._ready.drop(session)
        return super()._free_request(request, *args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._totals["preempted"] += 1
        self._evict(request, *args, **kwargs)

    def _evict(self, request: Request, *args: Any, **kwargs: Any) -> None:
        session = self._sessions.get(request.request_id)
        if session is not None:
            session.evicted()
            self._ready.note(session)
        super()._preempt_request(request, *args, **kwargs)

    # -- which sessions have something to do -------------------------------------------------

    def _changed(self, session: EngineSession) -> None:
        """Note what happened to `session`, if that did not end it."""
        if session.request.request_id in self._sessions:
            self._ready.note(session)

    def has_unfinished_requests(self) -> bool:
        """Held sessions are left out: the engine sleeps while there are only those.

        Asked several times per step, so the first session that has a step answers. One that waits
        for an idle engine counts: there is an idle step for it, or another's step now.
        """
        if self._events or not super().has_unfinished_requests():
            return bool(self._events)
        return len(self.requests) > len(self._sessions) or any(
            True for _ in self._ready.with_step(engine_idle=True)
        )

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """An evicted session stays out until its edge gives it something to do."""
        return not self._stays_out(request) and super()._handle_blocked_waiting_request(request)

    def _stays_out(self, request: Request) -> bool:
        session = self._sessions.get(request.request_id)
        return session is not None and not self._ready.has_step(
            session, engine_idle=self._step_idle
        )

    # -- schedule ----------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._step_started_s = time.monotonic()
        for session in self._ready.working:
            if session.row is not None:
                self._judge_by_row(session)
                self._changed(session)
        if self._events and not self._flushed:
            return self._empty_step()
        self._flushed = False
        self._step_idle = self._ready.engine_idle
        self._planner.compose(
            self._ready.resident(),
            current_step=self.current_step,
            engine_idle=self._step_idle,
            admitting=bool(self.waiting),
        )
        self._make_room()
        output = super().schedule(*args, **kwargs)
        self._totals["forwarded"] += output.total_num_scheduled_tokens
        scheduled = self._sessions_of(output.num_scheduled_tokens)
        for session in scheduled:
            session.scheduled(self.current_step)
        output.picospec = self._planner.describe(  # type: ignore[attr-defined]
            scheduled, output.scheduled_spec_decode_tokens
        )
        return output

    def _sessions_of(self, request_ids: Iterable[str]) -> list[EngineSession]:
        found = map(self._sessions.get, request_ids)
        return [session for session in found if session is not None]

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
        try:
            result = session.judge_by_row(work)
        except NumericalError as error:
            self._fail(session, error)
            return
        if result.rejection is not None:
            session.queue.judged(rejected=True)
            self._tell(session, num_drafts=len(work.token_ids), rejection=result.rejection)
            return
        reason = self._append(session, work.token_ids[0])
        session.queue.judged()
        session.tally.num_by_row += 1
        if reason is not None:
            self._tell(session, finish_reason=reason)

    def _make_room(self) -> None:
        """Evict what the coming step needs, where there is somebody to evict."""
        eligible = self.current_step + 1
        resident = [session.request for session in self._ready.resident()]
        # In vLLM's own order: behind a request that does not fit, it admits nobody.
        ready = (request for request in self.waiting if not self._stays_out(request))
        for session in self._residency.evictions(
            (each for each in self._sessions.values() if each.is_held(eligible)),
            joining=[each for each in resident if each.next_decode_eligible_step <= eligible],
            num_resident=len(self.running),
            waiting=next(ready, None),
            num_free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks,
        ):
            victim = self.requests[session.request.request_id]
            self.running.remove(victim)
            self._evict(victim, self._step_started_s)
            self._totals["evicted"] += 1

    # -- update ------------------------------------------------------------------------------

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        step: VerificationStep = scheduler_output.picospec  # type: ignore[attr-defined]
        outcome: StepOutcome = getattr(model_runner_output, "picospec", StepOutcome())
        # A session that stops is gone from `_sessions` before its last verdict is made.
        stepped = self._sessions_of(scheduler_output.num_scheduled_tokens)
        if outcome.padding is not None:
            self._planner.padding = outcome.padding
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        emitted = {
            output.request_id: output for group in outputs.values() for output in group.outputs
        }
        compute_us = int((time.monotonic() - self._step_started_s) * 1e6)
        for session in stepped:
            request_id = session.request.request_id
            if request_id in self._sessions and not session.request.is_prefill_chunk:
                session.request.num_computed_tokens = session.request.num_tokens - 1
            session.tally.num_forwards += 1
            if request_id in step.plans:
                session.row, session.row_due = outcome.rows.get(request_id), False
            result = outcome.results.get(request_id)
            if isinstance(result, NumericalError):
                self._fail(session, result)
            elif result is not None:
                plan = step.plans[request_id]
                self._conclude(session, plan, result, emitted.get(request_id), compute_us)
            self._changed(session)
        if stepped:
            self._totals["steps"] += 1
            self._spent_s["step"] += time.monotonic() - self._step_started_s
            self._spent_s["forward"] += outcome.forward_s
            self._spent_s["sampling"] += outcome.sampling_s
        events, self._events = self._events, {}
        outputs[_CLIENT] = VerificationOutputs.of(
            outputs.get(_CLIENT, EngineCoreOutputs()), EngineReport(events, self._stats())
        )
        return outputs

    def _conclude(
        self,
        session: EngineSession,
        plan: StepPlan,
        result: StepResult,
        output: EngineCoreOutput | None,
        compute_us: int,
    ) -> None:
        """Emit the session's verdict on the step, if there is something to tell."""
        work, session.work = session.work, None
        if work is not None and plan.num_drafts:
            session.tally.arrived_s = work.arrived_s
        finished = output.finish_reason if output is not None else None
        verdict = session.tally.conclude(
            result,
            output.new_token_ids if output is not None else [],
            epoch=session.queue.epoch,
            position=plan.position,
            num_drafts=plan.num_drafts,
            finish_reason=_FINISH_REASONS.get(finished) if finished is not None else None,
            step_started_s=self._step_started_s,
            compute_us=compute_us,
        )
        if verdict is None:
            return
        session.told(verdict)
        if not session.opened:
            session.opened = True
            # vLLM hands the statistics out with the first token; a probe has none.
            if output is not None:
                stats = output.prefill_stats
            else:
                stats = self.requests[session.request.request_id].take_prefill_stats()
            cached = stats.num_cached_tokens if stats is not None else 0
            self._emit(session, Prefilled(plan.position, cached))
        self._emit(session, verdict)

    def _stats(self) -> EngineStats:
        busy = list(self._ready.with_step(engine_idle=self._ready.engine_idle))
        num_running = sum(session.resident for session in busy)
        return EngineStats(
            running_sessions=num_running,
            held_sessions=len(self._sessions) - len(busy),
            waiting_sessions=len(busy) - num_running,
            kv_cache_usage=self.kv_cache_manager.usage,
            evicted_sessions=self._totals["evicted"],
            preempted_sessions=self._totals["preempted"],
            stale_tokens=self._totals["stale"],
            forwarded_tokens=self._totals["forwarded"],
            steps=self._totals["steps"],
            step_s=self._spent_s["step"],
            forward_s=self._spent_s["forward"],
            sampling_s=self._spent_s["sampling"],
        )

    # -- what vLLM's own speculation would do --------------------------------------------------

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Drafts come over the wire, never from the runner."""

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> None:
        """Counted from the verdicts, in the gRPC process."""
        return
