"""What a step is made of, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cloud_server.engine.engine_session import EngineSession
from cloud_server.engine.judging.verification import StepKind
from cloud_server.engine.step_costs import StepCosts
from cloud_server.engine.step_plan import StepPlan, StepPlanner
from cloud_server.engine.takeover import Occasion
from picospec.protocol.messages import AssistPolicy, VerificationMode
from tests.support.builders import COUPLED, SPLIT
from tests.support.engine_sessions import PROMPT, make_session

STEP = 7
AT = len(PROMPT) + 1  # the position after one output token


def planner(*, max_draft_tokens: int = 4, max_model_len: int = 100) -> StepPlanner:
    return StepPlanner(max_draft_tokens=max_draft_tokens, max_model_len=max_model_len)


def composed(
    plan: StepPlanner,
    *sessions: EngineSession,
    engine_idle: bool = False,
    awaits_drafts: bool = False,
    admitting: bool = False,
) -> list[str]:
    """The ids of the sessions that are held."""
    occasion = Occasion(engine_idle, awaits_drafts)
    held = plan.compose(sessions, current_step=STEP, occasion=occasion, admitting=admitting)
    return [session.request.request_id for session in held]


def rows_of(
    plan: StepPlanner, session: EngineSession, scheduled: Sequence[int] | None = None
) -> StepPlan | None:
    """The plan of one session's logits rows, of which vLLM took the drafts `scheduled`."""
    composed(plan, session)
    drafts = session.request.spec_token_ids if scheduled is None else scheduled
    request_id = session.request.request_id
    return plan.describe([session], {request_id: drafts}).plans.get(request_id)


def test_drafts_become_speculative_tokens_as_far_as_a_step_takes_them() -> None:
    session = make_session(drafts=(2, 3, 4, 5, 6))
    assert composed(planner(), session) == []
    assert session.request.spec_token_ids == [2, 3, 4, 5]


def test_a_session_with_nothing_to_judge_sits_the_step_out() -> None:
    idle, busy = make_session("idle"), make_session("busy", drafts=(2,))
    assert composed(planner(), idle, busy) == ["idle"]
    assert idle.request.next_decode_eligible_step == STEP + 2
    assert busy.request.next_decode_eligible_step == 0


def test_a_session_that_prefills_joins() -> None:
    assert composed(planner(), make_session(opened=False)) == []


@pytest.mark.parametrize(
    ("assist", "engine_idle", "awaits_drafts", "joins"),
    [
        (AssistPolicy.NEVER, True, False, False),
        (AssistPolicy.IDLE, True, False, True),
        (AssistPolicy.IDLE, False, False, False),
        (AssistPolicy.ALWAYS, False, True, True),
        (AssistPolicy.AUTO, True, False, True),
        (AssistPolicy.AUTO, False, False, True),
        (AssistPolicy.AUTO, True, True, False),
    ],
)
@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
def test_the_cloud_decodes_alone_as_the_edge_allowed(
    mode: VerificationMode,
    assist: AssistPolicy,
    engine_idle: bool,
    awaits_drafts: bool,
    joins: bool,
) -> None:
    session = make_session(mode=mode, assist=assist)
    held = composed(planner(), session, engine_idle=engine_idle, awaits_drafts=awaits_drafts)
    assert held == ([] if joins else ["s1"])


def test_after_a_rejection_the_next_token_is_the_edges() -> None:
    session = make_session(mode=SPLIT, assist=AssistPolicy.ALWAYS, drafts=(2,))
    session.queue.judged(rejected=True)
    assert composed(planner(), session) == ["s1"]


def test_of_an_auto_session_as_many_drafts_are_judged_as_pay() -> None:
    plan = planner()
    plan.costs = StepCosts({1: 0.020, 3: 0.021, 9: 0.100})
    session = make_session(mode=COUPLED, assist=AssistPolicy.AUTO, drafts=(2, 3, 4, 5))
    composed(plan, session)
    assert session.request.spec_token_ids == [2, 3]
    assert session.draft_budget == 2


def test_at_full_load_nothing_but_decoding_pays() -> None:
    plan = planner()
    plan.costs = StepCosts({1: 0.010, 64: 0.640})  # every token costs the same
    sessions = [
        make_session(str(name), mode=COUPLED, assist=AssistPolicy.AUTO, drafts=(2, 3))
        for name in range(8)
    ]
    assert composed(plan, *sessions) == []
    assert [session.request.spec_token_ids for session in sessions] == [[]] * 8
    assert [session.draft_budget for session in sessions] == [0] * 8


def test_a_split_session_without_rows_judges_one_draft_even_if_none_pays() -> None:
    """Else it would have work, get none, and be asked again for ever."""
    plan = planner()
    plan.costs = StepCosts({1: 0.010, 64: 0.640})
    session = make_session(mode=SPLIT, assist=AssistPolicy.AUTO, drafts=(2, 3), may_keep_rows=False)
    assert composed(plan, session) == []
    assert session.request.spec_token_ids == [2]


def test_a_split_session_taken_over_draws_from_its_row_or_by_itself() -> None:
    keeps = make_session(mode=SPLIT, assist=AssistPolicy.AUTO)
    assert rows_of(planner(), keeps) == StepPlan(StepKind.DRAFTS, AT, keep_row=True)
    alone = make_session(mode=SPLIT, assist=AssistPolicy.AUTO, may_keep_rows=False)
    assert rows_of(planner(), alone) == StepPlan(StepKind.FIRST, AT)


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "taken"), [(40, 100, 4), (3, 100, 2), (40, AT + 2, 1)]
)
def test_drafts_stay_within_the_answer_and_the_model(
    max_tokens: int, max_model_len: int, taken: int
) -> None:
    session = make_session(drafts=(2, 3, 4, 5), max_tokens=max_tokens)
    composed(planner(max_model_len=max_model_len), session)
    assert len(session.request.spec_token_ids) == taken


def test_a_short_step_is_padded_where_the_table_says_so() -> None:
    plan = planner()
    plan.padding = {2: 4}
    session = make_session(drafts=(2,))
    composed(plan, session)
    assert session.request.spec_token_ids == [2, 0, 0]
    rows = rows_of(plan, session)
    assert rows is not None
    assert rows.num_drafts == 1  # dummies are not judged


def test_a_step_that_others_may_join_is_not_padded() -> None:
    plan = planner()
    plan.padding = {2: 4}
    session, prefilling = make_session(drafts=(2,)), make_session("new", opened=False)
    composed(plan, session, admitting=True)
    assert session.request.spec_token_ids == [2]
    composed(plan, session, prefilling)
    assert session.request.spec_token_ids == [2]


def test_padding_needs_a_session_with_room_for_it() -> None:
    plan = planner(max_draft_tokens=2)
    plan.padding = {2: 4}
    session = make_session(drafts=(2,))
    composed(plan, session)
    assert session.request.spec_token_ids == [2]


def test_split_drafts_are_judged_with_their_probabilities_and_the_row_is_kept() -> None:
    assert rows_of(planner(), make_session(drafts=(2, 3))) == StepPlan(
        StepKind.DRAFTS, AT, num_drafts=2, draft_probs=(0.5, 0.5), keep_row=True
    )


def test_only_what_vllm_took_is_judged() -> None:
    plan = rows_of(planner(), make_session(drafts=(2, 3, 4)), scheduled=(2,))
    assert plan is not None
    assert (plan.num_drafts, plan.draft_probs) == (1, (0.5,))


def test_the_first_token_is_the_clouds_own() -> None:
    assert rows_of(planner(), make_session(opened=False)) == StepPlan(StepKind.FIRST, AT)


def test_a_probe_is_answered_with_its_tail_sample() -> None:
    assert rows_of(planner(), make_session(probe=3)) == StepPlan(StepKind.PROBE, AT, attempt=2)


def test_coupled_rows_always_judge() -> None:
    session = make_session(mode=COUPLED, assist=AssistPolicy.ALWAYS)
    assert rows_of(planner(), session) == StepPlan(StepKind.DRAFTS, AT)


def test_where_no_draft_fits_any_more_the_cloud_draws() -> None:
    session = make_session(output=(1, 1), max_tokens=2)
    session.row_due = True
    assert rows_of(planner(), session) == StepPlan(StepKind.FIRST, AT + 1)


def test_a_split_session_that_is_back_only_computes() -> None:
    session = make_session(may_keep_rows=False)
    assert rows_of(planner(), session) is None


def test_the_worker_hears_once_of_what_was_appended() -> None:
    plan, session = planner(), make_session(mode=SPLIT)
    session.append(9)
    step = plan.describe([session], {})
    assert step.appended_token_ids == {"s1": [9]}
    assert plan.describe([session], {}).appended_token_ids == {}
