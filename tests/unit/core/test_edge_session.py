"""The edge's session: every (state, event) pair, the policies, recovery, resumption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from picospec.errors import LocalProtocolError, RemoteOrderError, RemoteProtocolError
from picospec.protocol.edge_machine import (
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
from picospec.protocol.edge_session import EdgeSession
from picospec.protocol.messages import (
    AssistPolicy,
    Draft,
    Finish,
    FinishReason,
    Limits,
    ModelCard,
    Open,
    Opened,
    Rejection,
    SamplingParams,
    Verdict,
    VerificationMode,
)

SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED
CARD = ModelCard("m", 50, "f", "", (0,), 100, (SPLIT, COUPLED), Limits(), 1)
PROMPT = np.array([1, 2], np.int32)
STOP = 0
REJECTION = Rejection(np.array([1], np.int32), np.ones(1, np.float32))
OPENED = Opened(2, 0, 16, 64, 64)


def new_session(max_tokens: int = 20, **policy: Any) -> EdgeSession:
    options = {"mode": COUPLED, "draft_length": 2, "window": 4, **policy}
    return EdgeSession(
        "s", PROMPT, SamplingParams(), max_tokens, (STOP,), CARD, SpeculationPolicy(**options)
    )


def started(max_tokens: int = 20, **policy: Any) -> EdgeSession:
    """Position 2 is committed: token 6."""
    session = new_session(max_tokens, **policy)
    session.start(0.0)
    session.receive(OPENED, 0.0)
    session.receive(Verdict(0, 2, 0, (6,)), 0.0)
    assert session.position == 3
    return session


def drafted(session: EdgeSession, *token_ids: int, now: float = 0.0) -> list[Effect]:
    position = session._chain.end
    return session.drafted(session.branch, position, token_ids, (0.5,) * len(token_ids), now)


def frames(effects: list[Effect]) -> list[Any]:
    return [effect.frame for effect in effects if isinstance(effect, Send)]


def recovering() -> EdgeSession:
    """Split; a draft was rejected at position 4, position 3 is committed: 7."""
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    session.receive(Verdict(0, 3, 1, (), REJECTION, num_draft_tokens=2), 0.0)
    return session


def probing() -> EdgeSession:
    session = recovering()
    session.probe_needed(session.branch, 4, 1, 0.0)
    return session


def lost(session: EdgeSession) -> EdgeSession:
    session.link_lost(0.0)
    return session


def reopening() -> EdgeSession:
    session = lost(recovering())
    session.resume(0.0)
    return session


def cancelled() -> EdgeSession:
    session = started(mode=SPLIT)
    session.cancel()
    return session


def drafting() -> EdgeSession:
    """Split, with a draft in flight."""
    session = started(mode=SPLIT)
    drafted(session, 7)
    return session


IN_STATE: dict[EdgeState, Callable[[], EdgeSession]] = {
    EdgeState.NEW: lambda: new_session(mode=SPLIT),
    EdgeState.DRAFTING: drafting,
    EdgeState.RECOVERING: recovering,
    EdgeState.PROBING: probing,
    EdgeState.OFFLINE: lambda: lost(drafting()),
    EdgeState.OFFLINE_RECOVERING: lambda: lost(recovering()),
    EdgeState.OFFLINE_PROBING: lambda: lost(probing()),
    EdgeState.REOPENING: reopening,
    EdgeState.FINISHED: cancelled,
}


def cause(session: EdgeSession, event: EdgeEvent) -> list[Effect]:
    """`event`, right but, perhaps, for the state."""
    branch, end, position = session.branch, session._chain.end, session.position
    num_in_flight = session.in_flight
    match event:
        case EdgeEvent.START:
            return session.start(0.0)
        case EdgeEvent.DRAFTED:
            return session.drafted(branch, end, (9,), (0.5,), 0.0)
        case EdgeEvent.EXHAUSTED:
            return session.exhausted(branch, end, 0.0)
        case EdgeEvent.PAUSED:
            return session.paused(branch, end, 0.0)
        case EdgeEvent.RECOVERED:
            return session.recovered(branch, position, 9, 0.0)
        case EdgeEvent.PROBE_NEEDED:
            return session.probe_needed(branch, position, 1, 0.0)
        case EdgeEvent.OPENED:
            session._opened = False
            return session.receive(dataclasses.replace(OPENED, first_position=position), 0.0)
        case EdgeEvent.VERDICT:
            session._opened = True
            return session.receive(Verdict(0, position, num_in_flight), 0.0)
        case EdgeEvent.REJECTION:
            session._opened = True
            return session.receive(Verdict(0, position, rejection=REJECTION), 0.0)
        case EdgeEvent.FINISH:
            session._opened = True
            return session.receive(Verdict(0, position, finish_reason=FinishReason.LENGTH), 0.0)
        case EdgeEvent.LINK_LOST:
            return session.link_lost(0.0)
        case EdgeEvent.RESUME:
            return session.resume(0.0)
        case EdgeEvent.CANCEL:
            return session.cancel()


@pytest.mark.parametrize("event", EdgeEvent)
@pytest.mark.parametrize("state", EdgeState)
def test_every_pair_lands_in_its_state_or_raises(state: EdgeState, event: EdgeEvent) -> None:
    session = IN_STATE[state]()
    assert session.state is state
    expected = TRANSITIONS.get((state, event))
    if expected is None:
        with pytest.raises((LocalProtocolError, RemoteOrderError)):
            cause(session, event)
        assert session.state is state
    else:
        cause(session, event)
        assert session.state is expected


def test_the_cloud_is_blamed_for_its_frames_only() -> None:
    with pytest.raises(RemoteOrderError):
        cause(recovering(), EdgeEvent.VERDICT)
    with pytest.raises(LocalProtocolError):
        cause(lost(drafting()), EdgeEvent.OPENED)


# -- opening and drafting ------------------------------------------------------------------------


def test_the_opening_frame() -> None:
    session = new_session(mode=SPLIT, sparse_k=5000, assist=AssistPolicy.IDLE, fast_verify=False)
    effects = session.start(0.0)
    (request,) = frames(effects)
    assert isinstance(request, Open)
    assert request.prompt_token_ids.tolist() == [1, 2]
    assert request.sparse_k == CARD.limits.max_sparse_k
    assert request.assist is AssistPolicy.NEVER  # split has none
    assert request.verify_whole_rounds
    assert request.probe == 0
    assert Allow(6) in effects


def test_drafts_go_out_at_once_and_before_the_opening_is_confirmed() -> None:
    session = new_session()
    session.start(0.0)
    assert frames(drafted(session, 6)) == [Draft(0, 2, (6,))]
    assert frames(drafted(session, 7)) == [Draft(0, 3, (7,))]
    session.receive(OPENED, 0.0)
    effects = session.receive(Verdict(0, 2, 0, (6,)), 0.0)
    assert effects == [Commit((6,)), Allow(7)]
    assert session.in_flight == 1
    assert session.branch == 0


def test_split_drafts_carry_their_probabilities() -> None:
    session = started(mode=SPLIT)
    effects = session.drafted(session.branch, 3, (7,), (1.0000001,), 0.0)
    assert frames(effects) == [Draft(0, 3, (7,), (1.0,))]


def test_a_first_token_that_differs_starts_a_branch_and_an_epoch() -> None:
    session = new_session()
    session.start(0.0)
    drafted(session, 5, 6)
    session.receive(OPENED, 0.0)
    effects = session.receive(Verdict(0, 2, 0, (9,)), 0.0)
    assert effects == [Commit((9,)), Rollback(1, 2, (9,)), Allow(7)]
    assert session.stale_tokens == 2
    assert frames(drafted(session, 4)) == [Draft(1, 3, (4,))]


def test_an_epoch_in_which_nothing_was_sent_is_used_again() -> None:
    session = new_session()
    session.start(0.0)
    session.receive(OPENED, 0.0)
    session.receive(Verdict(0, 2, 0, (9,)), 0.0)
    assert session.branch == 1
    assert frames(drafted(session, 4)) == [Draft(0, 3, (4,))]


def test_the_window_follows_what_is_committed() -> None:
    session = started(window=3)
    drafted(session, 7, 8, 9)
    with pytest.raises(LocalProtocolError):
        drafted(session, 10)
    assert session.receive(Verdict(0, 3, 2, (9,)), 0.0) == [Commit((7, 8, 9)), Allow(9)]


def test_the_clouds_limits_cap_the_policy() -> None:
    session = new_session(window=500)
    assert Allow(66) not in session.start(0.0)  # max_tokens 20
    session = new_session(window=64, max_tokens=90)
    assert Allow(66) in session.start(0.0)
    session.receive(dataclasses.replace(OPENED, window=2, max_draft_tokens=1), 0.0)
    assert session._window == 2


def test_nothing_is_drafted_past_max_tokens() -> None:
    session = new_session(max_tokens=3, window=16)
    assert Allow(5) in session.start(0.0)


def test_without_parallel_drafting_a_round_waits_for_its_verdict() -> None:
    session = started(parallel_draft=False, draft_length=2, window=16)
    drafted(session, 7, 8)
    with pytest.raises(LocalProtocolError):
        drafted(session, 9)
    session = started(parallel_draft=False, draft_length=2, window=16)
    drafted(session, 7, 8)
    assert session.receive(Verdict(0, 3, 1), 0.0) == [Commit((7,))]
    assert Allow(8) in session.receive(Verdict(0, 4, 1, (5,)), 0.0)


def test_whole_rounds_travel_in_one_frame() -> None:
    session = started(fast_verify=False, draft_length=3, window=8)
    assert frames(drafted(session, 7, 8)) == []
    assert frames(drafted(session, 9)) == [Draft(0, 3, (7, 8, 9), end_of_round=True)]


def test_a_round_ends_early_with_the_drafter_or_the_answer() -> None:
    session = started(fast_verify=False, draft_length=3, window=8)
    drafted(session, 7)
    assert frames(session.exhausted(session.branch, 4, 0.0)) == [
        Draft(0, 3, (7,), end_of_round=True)
    ]
    session = started(max_tokens=3, fast_verify=False, draft_length=3, window=8)
    assert frames(drafted(session, 7, 8)) == [Draft(0, 3, (7, 8), end_of_round=True)]


def test_old_branches_are_ignored_and_unknown_ones_are_not() -> None:
    session = started()
    assert session.branch == 1
    assert session.drafted(0, 3, (7,), (), 0.0) == []
    assert session.exhausted(0, 3, 0.0) == []
    with pytest.raises(LocalProtocolError):
        session.drafted(2, 3, (7,), (), 0.0)
    with pytest.raises(LocalProtocolError):
        session.drafted(1, 4, (7,), (), 0.0)


# -- verdicts ------------------------------------------------------------------------------------


def test_a_bonus_token_equal_to_the_next_draft_is_no_rollback() -> None:
    session = started()
    drafted(session, 7, 8, 9)
    effects = session.receive(Verdict(0, 3, 1, (8,), num_draft_tokens=1), 0.0)
    assert effects == [Commit((7, 8)), Allow(9)]
    assert session.in_flight == 1


def test_a_bonus_token_that_differs_rolls_back_to_it() -> None:
    session = started()
    drafted(session, 7, 8, 9)
    effects = session.receive(Verdict(0, 3, 1, (5,), num_draft_tokens=1), 0.0)
    assert effects == [Commit((7, 5)), Rollback(2, 4, (5,)), Allow(9)]
    assert session.stale_tokens == 2


def test_assist_tokens_agree_as_far_as_they_do() -> None:
    session = started()
    drafted(session, 7, 8, 9)
    effects = session.receive(Verdict(0, 3, 0, (7, 8, 4, 3)), 0.0)
    assert effects[:2] == [Commit((7, 8, 4, 3)), Rollback(2, 5, (4, 3))]


def test_the_cloud_finishes() -> None:
    session = started()
    drafted(session, 7, STOP)
    verdict = Verdict(0, 3, 2, (), None, FinishReason.STOP)
    assert session.receive(verdict, 0.0) == [Commit((7, STOP)), Finished(FinishReason.STOP)]
    assert session.receive(Verdict(0, 9, 9), 0.0) == []


def test_the_edge_sees_the_end_itself_if_the_cloud_does_not_say_so() -> None:
    session = started(max_tokens=2)
    drafted(session, 7)
    effects = session.receive(Verdict(0, 3, 1), 0.0)
    assert effects == [Commit((7,)), Send(Finish()), Finished(FinishReason.LENGTH)]


@pytest.mark.parametrize(
    ("verdict", "field"),
    [
        (Verdict(0, 4, 1), "verdict.position"),
        (Verdict(0, 3, 3), "verdict.num_accepted"),
        (Verdict(1, 3, 1), "verdict.epoch"),
        (Verdict(0, 3, 0, (50,)), "verdict.token_ids"),
        (Verdict(0, 3, 0, tuple([5] * 20)), "verdict.token_ids"),
        (Verdict(0, 3, 2, (), REJECTION), "verdict.rejection"),
        (Verdict(0, 3, 1, (5,)), "verdict.token_ids"),
    ],
)
def test_verdicts_that_do_not_fit(verdict: Verdict, field: str) -> None:
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    with pytest.raises(RemoteProtocolError) as caught:
        session.receive(verdict, 0.0)
    assert caught.value.field == field


def test_openings_that_do_not_fit() -> None:
    session = new_session()
    session.start(0.0)
    with pytest.raises(RemoteOrderError):
        session.receive(Verdict(0, 2, 0, (6,)), 0.0)
    session = new_session()
    session.start(0.0)
    with pytest.raises(RemoteOrderError):
        session.receive(dataclasses.replace(OPENED, first_position=3), 0.0)
    with pytest.raises(RemoteOrderError):
        started().receive(dataclasses.replace(OPENED, first_position=3), 0.0)


def test_round_trips_leave_out_queue_and_computation() -> None:
    session = started()
    drafted(session, 7, now=1.0)
    drafted(session, 8, now=2.0)
    session.receive(Verdict(0, 3, 1, num_draft_tokens=1, queue_us=100_000, compute_us=50_000), 1.5)
    assert session.round_trip_s == pytest.approx(0.35)
    session.receive(Verdict(0, 4, 0), 2.5)
    assert session.round_trip_s is None
    session.receive(Verdict(0, 4, 1, num_draft_tokens=1), 2.75)
    assert session.round_trip_s == pytest.approx(0.75)


# -- recovery ------------------------------------------------------------------------------------


def test_a_rejection_asks_the_drafter() -> None:
    session = started(mode=SPLIT)
    drafted(session, 7, 8, 9)
    effects = session.receive(Verdict(0, 3, 1, (), REJECTION, num_draft_tokens=2), 0.0)
    assert effects == [Commit((7,)), Recover(2, 4, REJECTION, attempt=0, judged=True)]
    assert session.stale_tokens == 1


def test_the_recovered_token_goes_out_alone_at_once() -> None:
    session = recovering()
    effects = session.recovered(session.branch, 4, 9, 0.0)
    head = Draft(1, 4, (9,), (), num_forced=1)
    assert effects == [Commit((9,)), Allow(9), Send(head)]
    assert frames(drafted(session, 5)) == [Draft(1, 5, (5,), (0.5,))]


def test_with_whole_rounds_it_heads_the_round() -> None:
    session = started(mode=SPLIT, fast_verify=False)
    drafted(session, 7, 8)
    session.receive(Verdict(0, 3, 1, (), REJECTION, num_draft_tokens=2), 0.0)
    assert frames(session.recovered(session.branch, 4, 9, 0.0)) == []
    assert frames(drafted(session, 5, 6)) == [
        Draft(1, 4, (9, 5, 6), (0.5, 0.5), num_forced=1, end_of_round=True)
    ]


def test_with_whole_rounds_and_no_draft_the_head_goes_before_the_probe() -> None:
    session = started(mode=SPLIT, fast_verify=False)
    drafted(session, 7, 8)
    session.receive(Verdict(0, 3, 1, (), REJECTION, num_draft_tokens=2), 0.0)
    session.recovered(session.branch, 4, 9, 0.0)
    assert frames(session.exhausted(session.branch, 5, 0.0)) == [
        Draft(1, 4, (9,), (), num_forced=1, end_of_round=True),
        Draft(1, 5, probe=1),
    ]


def test_a_recovered_token_may_be_the_last() -> None:
    session = recovering()
    assert session.recovered(session.branch, 4, STOP, 0.0) == [
        Commit((STOP,)),
        Send(Finish()),
        Finished(FinishReason.STOP),
    ]


def test_probes_ask_for_fresh_tail_samples() -> None:
    session = recovering()
    assert session.probe_needed(session.branch, 4, 1, 0.0) == [Send(Draft(1, 4, probe=2))]
    effects = session.receive(Verdict(1, 4, 0, (), REJECTION), 0.0)
    assert effects == [Recover(3, 4, REJECTION, attempt=1, judged=True)]
    assert session.probe_needed(3, 4, 2, 0.0) == [Send(Draft(2, 4, probe=3))]


def test_a_drafter_with_nothing_to_propose_probes_once() -> None:
    session = started(mode=SPLIT)
    assert frames(session.exhausted(session.branch, 3, 0.0)) == [Draft(0, 3, probe=1)]
    assert session.exhausted(session.branch, 3, 0.0) == []
    effects = session.receive(Verdict(0, 3, 0, (), REJECTION), 0.0)
    assert effects == [Recover(2, 3, REJECTION, attempt=0, judged=False)]


def test_it_probes_after_its_last_draft_is_judged() -> None:
    session = started()
    drafted(session, 7)
    assert session.exhausted(session.branch, 4, 0.0) == []
    effects = session.receive(Verdict(0, 3, 1), 0.0)
    assert effects == [Commit((7,)), Send(Draft(0, 4, probe=1))]
    effects = session.receive(Verdict(0, 4, 0, (8,)), 0.0)
    assert effects[:2] == [Commit((8,)), Rollback(2, 4, (8,))]
    assert frames(drafted(session, 9)) == [Draft(1, 5, (9,))]


def test_it_does_not_probe_for_the_first_token() -> None:
    session = new_session()
    session.start(0.0)
    assert session.exhausted(0, 2, 0.0) == []


# -- resumption ----------------------------------------------------------------------------------


def test_resuming_sends_everything_again_as_epoch_0() -> None:
    session = started()
    drafted(session, 7, 8)
    session.receive(Verdict(0, 3, 1, (5,), num_draft_tokens=1), 0.0)
    drafted(session, 1, 2)
    session.link_lost(1.0)
    assert session.in_flight == 0
    assert frames(drafted(session, 3)) == []
    effects = session.resume(2.0)
    request, chain = frames(effects)
    assert request.output_token_ids.tolist() == [6, 7, 5]
    assert chain == Draft(0, 5, (1, 2, 3))
    session.receive(dataclasses.replace(OPENED, first_position=5), 3.0)
    assert session.receive(Verdict(0, 5, 0, (1,)), 3.0) == [Commit((1,)), Allow(10)]


def test_the_drafter_goes_on_within_the_window_while_the_link_is_gone() -> None:
    session = lost(started())
    drafted(session, 7, 8, 9, 10)
    with pytest.raises(LocalProtocolError):
        drafted(session, 11)


def test_a_recovery_that_ends_while_the_link_is_gone_is_in_the_opening() -> None:
    session = lost(recovering())
    assert session.recovered(session.branch, 4, 9, 0.0) == [Commit((9,)), Allow(9)]
    (request,) = frames(session.resume(0.0))
    assert request.output_token_ids.tolist() == [6, 7, 9]
    assert request.probe == 0


def test_the_opening_waits_for_the_drafters_answer() -> None:
    session = reopening()
    effects = session.recovered(session.branch, 4, 9, 0.0)
    (request,) = frames(effects)
    assert request.output_token_ids.tolist() == [6, 7, 9]
    assert session.state is EdgeState.DRAFTING


@pytest.mark.parametrize("when", ["before", "after", "offline"])
def test_a_pending_probe_becomes_the_openings(when: str) -> None:
    session = recovering()
    branch = session.branch
    if when == "before":
        session.probe_needed(branch, 4, 1, 0.0)
        session.link_lost(0.0)
        effects = session.resume(0.0)
    elif when == "offline":
        session.link_lost(0.0)
        assert session.probe_needed(branch, 4, 1, 0.0) == []
        effects = session.resume(0.0)
    else:
        session.link_lost(0.0)
        session.resume(0.0)
        effects = session.probe_needed(branch, 4, 1, 0.0)
    (request,) = frames(effects)
    assert request.probe == 2
    assert request.output_token_ids.tolist() == [6, 7]
    session.receive(dataclasses.replace(OPENED, first_position=4), 0.0)
    effects = session.receive(Verdict(0, 4, 0, (), REJECTION), 0.0)
    assert effects == [Recover(branch + 1, 4, REJECTION, attempt=1, judged=True)]
    assert frames(session.recovered(branch + 1, 4, 9, 0.0)) == [Draft(0, 4, (9,), (), num_forced=1)]


def test_an_unanswered_exhaustion_probe_is_given_up_with_its_link() -> None:
    session = started(mode=SPLIT)
    session.exhausted(session.branch, 3, 0.0)
    session.link_lost(0.0)
    assert [type(frame) for frame in frames(session.resume(0.0))] == [Open]
    session.receive(dataclasses.replace(OPENED, first_position=3), 0.0)
    effects = session.receive(Verdict(0, 3, 0, (8,)), 0.0)
    assert effects[:2] == [Commit((8,)), Rollback(2, 3, (8,))]


def test_a_generation_may_end_without_a_link() -> None:
    session = lost(recovering())
    effects = session.recovered(session.branch, 4, STOP, 0.0)
    assert effects == [Commit((STOP,)), Finished(FinishReason.STOP)]
    assert session.resume(0.0) == []


def test_cancelling_tells_the_cloud_once() -> None:
    session = started()
    assert session.cancel() == [Send(Finish())]
    assert session.cancel() == []
    assert lost(started()).cancel() == []


# -- control: pauses, deadlines, lengths


def test_a_paused_drafter_goes_on_when_something_is_committed() -> None:
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    assert session.paused(session.branch, 5, 0.0) == []
    effects = session.receive(Verdict(0, 3, 1, num_draft_tokens=1), 0.0)
    assert effects == [Commit((7,)), Allow(8)]


def test_a_drafter_that_paused_too_late_goes_on_at_once() -> None:
    session = started(max_tokens=3, mode=SPLIT)  # its limit cannot grow any more
    assert session._limit == 5
    drafted(session, 7)
    session.receive(Verdict(0, 3, 1, num_draft_tokens=1), 0.0)
    assert session.paused(session.branch, 4, 0.0) == [Allow(5)]


def test_a_pause_ends_the_round() -> None:
    session = started(mode=SPLIT, fast_verify=False)
    assert frames(drafted(session, 7)) == []
    [frame] = frames(session.paused(session.branch, 4, 0.0))
    assert (frame.token_ids, frame.end_of_round) == ((7,), True)


def test_a_rollback_ends_a_pause() -> None:
    session = started(mode=COUPLED, fast_verify=False)
    drafted(session, 7)
    session.paused(session.branch, 4, 0.0)
    session.receive(Verdict(0, 3, 0, (5,), num_draft_tokens=1), 0.0)
    assert frames(drafted(session, 8)) == []


def test_a_slow_round_goes_out_short_at_its_deadline() -> None:
    session = started(mode=SPLIT, fast_verify=False, draft_length=4, round_timeout_s=0.5)
    assert session.deadline is None
    assert frames(drafted(session, 7, now=1.0)) == []
    drafted(session, 8, now=1.2)
    assert session.deadline == 1.5
    assert session.tick(1.4) == []
    [frame] = frames(session.tick(1.5))
    assert (frame.token_ids, frame.end_of_round) == ((7, 8), True)
    assert session.deadline is None
    assert session.tick(9.0) == []


def test_without_a_timeout_there_is_no_deadline() -> None:
    session = started(mode=SPLIT, fast_verify=False, draft_length=4)
    drafted(session, 7, now=1.0)
    assert session.deadline is None


def test_no_deadline_while_the_link_is_lost() -> None:
    session = started(mode=SPLIT, fast_verify=False, draft_length=4, round_timeout_s=0.5)
    drafted(session, 7, now=1.0)
    assert session.deadline == 1.5
    session.link_lost(1.1)
    assert session.deadline is None


def test_lengths_change_in_the_middle() -> None:
    session = started(mode=SPLIT, draft_length=2, window=4)
    [frame] = frames(drafted(session, 7))
    assert frame.step_limit == 2
    assert session.set_length(4, 8, 0.0) == [Allow(11)]
    [frame] = frames(drafted(session, 8))
    assert frame.step_limit == 4
    assert frames(drafted(session, 9))[0].step_limit == 0
    assert session.set_length(4, 2, 0.0) == []  # what was allowed stays allowed


def test_lengths_beyond_the_clouds_limits_are_capped() -> None:
    session = started(mode=SPLIT)
    assert session.set_length(99, 9999, 0.0) == [Allow(22)]  # all there is to generate
    [frame] = frames(drafted(session, 7))
    assert frame.step_limit == CARD.limits.max_draft_tokens


def test_a_new_stream_is_told_the_draft_length_again() -> None:
    session = started(mode=SPLIT, draft_length=3)
    assert frames(drafted(session, 7))[0].step_limit == 3
    session.link_lost(0.0)
    resent = frames(session.resume(0.0))[1]
    assert resent.step_limit == 3


def test_whole_rounds_need_no_step_limit() -> None:
    session = started(mode=SPLIT, fast_verify=False, draft_length=2)
    [frame] = frames(drafted(session, 7, 8))
    assert frame.step_limit == 0


def test_without_split_rejection_the_whole_distribution_is_asked_for() -> None:
    [request] = frames(new_session(mode=SPLIT, split_rejection=False).start(0.0))[:1]
    assert request.sparse_k == 0
