"""What an engine step is made of: each session's drafts, padding, and what its logits rows are for.

`StepPlanner.compose` decides before vLLM schedules the step, `describe` tells the worker after it.
In between steps, `request.num_computed_tokens == request.num_tokens - 1` for every resident
session past its prefill: the last committed token is forwarded again, together with the drafts,
so that its logits row judges the first of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cloud_server.engine.engine_session import EngineRequest, EngineSession
from cloud_server.engine.judging.verification import StepKind
from cloud_server.engine.step_costs import StepCosts, best_drafts, hopeful
from cloud_server.engine.step_padding import Padding
from cloud_server.engine.takeover import Occasion

BUDGET_STEPS = 16  # for which what pays in one step stays as it is, if the batch does


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one engine step decides for one session."""

    kind: StepKind
    position: int  # of the first logits row
    num_drafts: int = 0  # those scheduled beyond are padding
    draft_probs: tuple[float, ...] = ()  # split, one for each draft
    attempt: int = 0  # number of the tail sample, for a probe
    keep_row: bool = False  # hand out the row after the last draft, if all are accepted


@dataclass(slots=True)
class VerificationStep:
    """The engine step as the worker must know it.

    `appended_token_ids`: what the scheduler appended since the session last ran, and the worker's
    copy of the session has not seen. A session without a plan computes KV only.
    """

    plans: dict[str, StepPlan] = field(default_factory=dict)
    appended_token_ids: dict[str, list[int]] = field(default_factory=dict)


class StepPlanner:
    """Composes engine steps from what the sessions' queues hold."""

    def __init__(self, *, max_draft_tokens: int, max_model_len: int) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._max_model_len = max_model_len
        self.padding: Padding = {}  # the worker tells with its first step, and ...
        self.costs = StepCosts()  # ... what steps take
        self._budgeted = (0, 0)  # the batch's size and the step when budgets were made

    def compose(
        self,
        resident: Iterable[EngineSession],
        *,
        current_step: int,
        occasion: Occasion,
        admitting: bool,
    ) -> list[EngineSession]:
        """Give resident sessions their drafts for step `current_step + 1`; returns those held.

        With `admitting`, waiting requests may join: the step's length is open, so nothing is
        padded.
        """
        held, joining = [], []
        for session in resident:
            session.work = None
            session.goes_alone = False
            session.request.spec_token_ids = []
            session.request.next_decode_eligible_step = 0
            if session.prefilling:
                joining.append(session)
            elif session.has_step(occasion):
                joining.append(session)
                session.goes_alone = not session.edge_waits
            else:
                held.append(session)
                session.request.next_decode_eligible_step = current_step + 2  # skip the coming one
        self._take_drafts(joining, current_step)
        if self.padding and joining and not admitting:
            self._pad(joining)
        return held

    def _take_drafts(self, joining: list[EngineSession], current_step: int) -> None:
        """What each session has to judge; of those whose policy is `auto`, what pays."""
        working = [session for session in joining if not session.prefilling]
        auto = [session for session in working if session.is_auto]
        rooms = {
            id(session): min(self._room(session.request), session.queue.num_ready)
            for session in auto
        }
        available = [(session.flow.acceptance, rooms[id(session)]) for session in auto]
        if any(count for _, count in available):
            for session, count in zip(
                auto, best_drafts(self.costs, len(joining), available), strict=True
            ):
                if count == 0 and session.split and not session.keeps_rows:
                    count = min(1, rooms[id(session)])  # without any it would forward for nothing
                rooms[id(session)] = count
        for session in working:
            room = rooms.get(id(session), self._room(session.request))
            session.work = session.queue.take(room)
            if session.work is not None:
                session.request.spec_token_ids = list(session.work.token_ids)
        if auto:
            self._tell_budgets(auto, len(joining), current_step)

    def _tell_budgets(self, auto: list[EngineSession], num_joining: int, current_step: int) -> None:
        """How many drafts of each session would pay in one step, had it any number of them."""
        batch_size, since = self._budgeted
        is_recent = batch_size == num_joining and current_step - since < BUDGET_STEPS
        if is_recent and all(session.draft_budget is not None for session in auto):
            return
        self._budgeted = num_joining, current_step
        wanted = [
            (session.flow.acceptance, hopeful(session.flow.acceptance, self._max_draft_tokens))
            for session in auto
        ]
        budgets = best_drafts(self.costs, num_joining, wanted)
        for session, budget in zip(auto, budgets, strict=True):
            session.draft_budget = budget

    def budget_of(self, session: EngineSession) -> int:
        """Most drafts of `session` that pay in one step, as far as is known."""
        return self._max_draft_tokens if session.draft_budget is None else session.draft_budget

    def describe(
        self, scheduled: Iterable[EngineSession], drafts: Mapping[str, Sequence[int]]
    ) -> VerificationStep:
        """What the worker has to know about the step in which vLLM has `scheduled` sessions.

        `drafts` are those that vLLM took, by request id: the first ones, where not all fit.
        """
        step = VerificationStep()
        for session in scheduled:
            request = session.request
            if session.appended_token_ids:
                step.appended_token_ids[request.request_id] = session.appended_token_ids
                session.appended_token_ids = []
            if not request.is_prefill_chunk:
                num_drafts = len(session.work.token_ids) if session.work is not None else 0
                num_drafts = min(num_drafts, len(drafts.get(request.request_id, ())))
                plan = self._plan_rows(session, num_drafts)
                if plan is not None:
                    step.plans[request.request_id] = plan
        return step

    def _pad(self, joining: list[EngineSession]) -> None:
        """Fill the step up with dummy drafts if the table says that a longer one is faster."""
        if any(session.prefilling for session in joining):
            return
        requests = [session.request for session in joining]
        num_tokens = sum(1 + len(request.spec_token_ids) for request in requests)
        num_extra = self.padding.get(num_tokens, num_tokens) - num_tokens
        for request in requests:
            num_drafts = len(request.spec_token_ids)
            room = min(
                self._max_draft_tokens - num_drafts,
                self._max_model_len - 1 - (request.num_tokens + num_drafts),
            )
            if 0 < num_extra <= room:
                request.spec_token_ids = request.spec_token_ids + [0] * num_extra
                return

    def _room(self, request: EngineRequest) -> int:
        """Most drafts that the request's remaining length can use in one step."""
        return min(
            self._max_draft_tokens,
            request.max_tokens - request.num_output_tokens,
            self._max_model_len - 1 - request.num_tokens,
        )

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
        if session.goes_alone:
            return StepPlan(StepKind.FIRST, position)
        return None  # an evicted session is back; its drafts are judged in the next step
