"""vLLM's scheduler, taught to verify drafts that arrive from outside: vLLM's overrides.

A session is one vLLM request for the whole generation. What changes its state:
  - `add_request` opens it, and hands a delivered Draft to its `DraftQueue`;
  - `schedule` judges by kept rows (engine_session.py), has the step composed (step_plan.py) and
    evicts held sessions where others lack memory (residency.py);
  - `update_from_output` lets vLLM commit what was accepted and reports a Verdict (verdicts.py).
Nothing else may. When the cloud decodes without a draft, and how long it waits: takeover.py.
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
    MIN_STEP_TOKENS,
    Delivery,
    EngineReport,
    StepOutcome,
    Wake,
    unwrap,
)
from cloud_server.engine.interface import EngineEvent, EngineStats, Prefilled
from cloud_server.engine.judging.verification import StepResult
from cloud_server.engine.readiness import ReadySessions
from cloud_server.engine.reports import ReportSender
from cloud_server.engine.residency import Residency
from cloud_server.engine.step_costs import HANDLING_S, StepCosts
from cloud_server.engine.step_padding import at_least, fastest
from cloud_server.engine.step_plan import StepPlan, StepPlanner, VerificationStep
from cloud_server.engine.takeover import DraftWait, Occasion, Tempo
from picospec.errors import NumericalError
from picospec.protocol.messages import FinishReason, Rejection

TEMPO_GAP_MAX_S = 0.5  # between two steps of the same sessions; a longer pause was idleness
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
        additional: Any = self.vllm_config.additional_config
        self._min_step_tokens = additional[MIN_STEP_TOKENS]
        self._reports = ReportSender(self.vllm_config.instance_id)
        self._events: dict[str, list[EngineEvent]] = {}  # to send with the next report
        self._wait = DraftWait()
        self._tempo = Tempo()
        self._step_started_s = self._step_ended_s = 0.0
        self._next_end_s = 0.0  # as in EngineReport.step_ends_s
        self._batch_size = 1  # sessions in the last step
        self._occasion = Occasion(engine_idle=True, awaits_drafts=False)  # of the last step
        self._totals: Counter[str] = Counter()
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    # -- sessions come, are fed and go -------------------------------------------------------

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        value = unwrap(params.extra_args if params is not None else None)
        if isinstance(value, Wake):
            if self._wait.until_s <= value.until_s:
                self._wait.expired()
            return
        if isinstance(value, list):
            for delivery in value:
                self._deliver(delivery)
            if self._events:
                self._report()
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
        recovered = session.deliver(delivery.draft, delivery.arrived_s)
        self._totals["stale"] += session.queue.stale_tokens - stale
        if recovered is not None:
            reason = self._append(session, recovered)
            if reason is not None:
                self._tell(session, finish_reason=reason)
                return
        if session.row is not None:
            self._judge_by_row(session)
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
        token_ids: tuple[int, ...] = (),
        rejection: Rejection | None = None,
        finish_reason: FinishReason | None = None,
    ) -> None:
        """Emit a verdict that no forward belongs to; `token_ids` are in the request."""
        now = time.monotonic()
        verdict = session.tally.verdict(
            epoch=session.queue.epoch,
            position=session.request.num_tokens - len(token_ids),
            step_started_s=now,
            num_drafts=num_drafts,
            token_ids=token_ids,
            rejection=rejection,
            finish_reason=finish_reason,
            batch_size=self._batch_size,
            draft_budget=self._planner.budget_of(session),
        )
        session.told(verdict, now)
        self._emit(session, verdict)

    def _emit(self, session: EngineSession, *events: EngineEvent) -> None:
        self._events.setdefault(session.request.request_id, []).extend(events)

    def _report(self) -> None:
        """Send what has happened, and when to wake the engine."""
        events, self._events = self._events, {}
        stats, wake_s = self._stats(), self._wait.until_s
        self._reports.send(EngineReport(events, stats, wake_s, self._next_end_s))

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

    def _next_occasion(self) -> Occasion:
        idle = self._ready.engine_idle
        return Occasion(idle, awaits_drafts=idle and time.monotonic() < self._wait.until_s)

    def has_unfinished_requests(self) -> bool:
        """Held sessions are left out: the engine sleeps while there are only those.

        Asked several times per step, so the first session that has a step answers. One that waits
        for an idle engine counts: there is an idle step for it, or another's step now.
        """
        if not super().has_unfinished_requests():
            return False
        if len(self.requests) > len(self._sessions):
            return True
        awaits_drafts = time.monotonic() < self._wait.until_s
        occasion = Occasion(engine_idle=True, awaits_drafts=awaits_drafts)
        return any(True for _ in self._ready.with_step(occasion))

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """An evicted session stays out until its edge gives it something to do."""
        return not self._stays_out(request) and super()._handle_blocked_waiting_request(request)

    def _stays_out(self, request: Request) -> bool:
        session = self._sessions.get(request.request_id)
        return session is not None and not self._ready.has_step(session, self._occasion)

    # -- schedule ----------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._step_started_s = time.monotonic()
        self._occasion = occasion = self._next_occasion()
        if not occasion.awaits_drafts:
            if 0.0 < self._wait.until_s <= self._step_started_s:
                self._wait.expired()
            self._wait.clear()
        self._use_rows(occasion)
        if self._events:
            self._report()
        self._planner.compose(
            self._ready.resident(),
            current_step=self.current_step,
            occasion=occasion,
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
            self._tell(session, num_drafts=len(work.token_ids), rejection=result.rejection)
            return
        reason = self._append(session, work.token_ids[0])
        session.queue.judged()
        session.tally.num_by_row += 1
        if reason is not None:
            self._tell(session, finish_reason=reason)

    def _use_rows(self, occasion: Occasion) -> None:
        """Judge by rows what has come during the last step, or draw from them."""
        for session in list(self._ready.with_step(occasion)):
            if session.row is None:
                continue
            if session.queue.has_work:
                self._judge_by_row(session)
            elif session.is_taken_over(occasion):
                self._draw_from_row(session)
            self._changed(session)

    def _draw_from_row(self, session: EngineSession) -> None:
        """The cloud's own token, before a forward; it is forwarded next."""
        try:
            token_id = session.draw_from_row()
        except NumericalError as error:
            self._fail(session, error)
            return
        reason = self._append(session, token_id)
        self._tell(session, token_ids=(token_id,), finish_reason=reason)

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
        was_prefill = any(not each.opened or each.request.is_prefill_chunk for each in stepped)
        if outcome.step_s is not None:
            self._planner.costs = StepCosts(outcome.step_s, handling_s=HANDLING_S)
            self._planner.padding = (
                at_least(self._min_step_tokens)
                if self._min_step_tokens
                else fastest(outcome.step_s)
            )
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        emitted = {
            output.request_id: output for group in outputs.values() for output in group.outputs
        }
        compute_us = int((time.monotonic() - self._step_started_s) * 1e6)
        self._batch_size = len(stepped) or self._batch_size
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
                self._conclude(
                    session,
                    plan,
                    result,
                    emitted.get(request_id),
                    compute_us=compute_us,
                )
            self._changed(session)
        if stepped:
            num_tokens = sum(len(output.new_token_ids) for output in emitted.values())
            self._account(scheduler_output, outcome, 0 if was_prefill else num_tokens)
        self._plan_wait()
        now, self._next_end_s = time.monotonic(), 0.0
        if not was_prefill and self.has_unfinished_requests():
            self._next_end_s = now + (now - self._step_started_s)  # as long as the last one took
        self._report()
        # vLLM's own outputs tell the gRPC process of nothing but ends that nobody else reports.
        return {
            client: group
            for client, group in outputs.items()
            if any(output.finish_reason is not None for output in group.outputs)
        }

    def _account(self, scheduled: SchedulerOutput, outcome: StepOutcome, num_tokens: int) -> None:
        """Note what the step took; `num_tokens` are what it decoded, 0 for a prefill."""
        now = time.monotonic()
        step_s = now - self._step_started_s
        self._totals["steps"] += 1
        self._spent_s["step"] += step_s
        self._spent_s["forward"] += outcome.forward_s
        self._spent_s["sampling"] += outcome.sampling_s
        before_s, self._step_ended_s = self._step_ended_s, now
        if not num_tokens:
            return
        self._planner.costs.observe(scheduled.total_num_scheduled_tokens, step_s)
        if now - before_s < TEMPO_GAP_MAX_S:
            self._tempo.add(num_tokens, now - before_s)

    def _plan_wait(self) -> None:
        """Decide whether the engine waits for drafts, if nobody has other work for it."""
        if self._ready.working:
            return
        waiting = [session for session in self._ready.on_call if session.is_auto]
        if not waiting:
            return
        costs = self._planner.costs
        step_s = costs.seconds(len(waiting))
        self._wait.decide(
            [(session.flow, session.request.num_tokens) for session in waiting],
            rate=max(self._tempo.per_second, len(waiting) / step_s),
            draft_s=costs.seconds(len(waiting) + 1) - step_s,
            now=time.monotonic(),
        )

    def _conclude(
        self,
        session: EngineSession,
        plan: StepPlan,
        result: StepResult,
        output: EngineCoreOutput | None,
        *,
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
            batch_size=self._batch_size,
            draft_budget=self._planner.budget_of(session),
        )
        if verdict is None:
            return
        if verdict.token_ids and verdict.finish_reason is None:
            session.extended()
        session.told(verdict, time.monotonic())
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
        busy = list(self._ready.with_step(self._occasion))
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
