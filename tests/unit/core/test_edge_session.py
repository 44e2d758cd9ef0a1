"""The edge's session: every (state, event) pair, the policies, recovery, resumption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from picospec.errors import LocalProtocolError, RemoteOrderError, RemoteProtocolError
from picospec.protocol.draft_chain import DraftChain
from picospec.protocol.drafting import (
    Allow,
    Drafted,
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
from picospec.protocol.edge_machine import TRANSITIONS, EdgeState, EventKind, SpeculationPolicy
from picospec.protocol.edge_session import EdgeSession, replay
from picospec.protocol.messages import (
    AssistPolicy,
    Finish,
    FinishReason,
    Open,
    Rejection,
    Verdict,
    VerificationMode,
)
from picospec.protocol.session_spec import SessionSpec
from picospec.sampling.distribution import Distribution
from tests.support.builders import (
    COUPLED,
    SAMPLED,
    SPLIT,
    make_card,
    make_draft,
    make_law,
    make_opened,
    make_rejection,
    make_verdict,
    token_array,
)

CARD = make_card()
STOP = 0
REJECTION = make_rejection(token_ids=(9,))  # of what the draft was not: 9 is recovered
STOPPING = make_rejection(token_ids=(STOP,))
# Q covers S, and more than P of the tail sample, which is refused: another is needed. Attempt 1's
# is outside of Q and taken.
UNRESOLVED = make_rejection(
    token_ids=(3,), probs=(0.25,), tail_mass=0.75, tail_token_id=4, tail_prob=0.2
)
RESOLVED = make_rejection(
    token_ids=(3,), probs=(0.25,), tail_mass=0.75, tail_token_id=9, tail_prob=0.2
)
OPENED = make_opened(first_position=2)


class CheckedSession(EdgeSession):
    """A session that is checked after every event."""

    def handle(self, event: EdgeEvent, now: float) -> list[Effect]:
        effects = super().handle(event, now)
        self.validate()
        return effects


def make_spec(max_tokens: int = 20, **policy: Any) -> SessionSpec:
    return SessionSpec(
        session_id="s",
        prompt_token_ids=token_array(1, 2),
        sampling=SAMPLED,
        max_tokens=max_tokens,
        stop_token_ids=(STOP,),
        card=CARD,
        policy=SpeculationPolicy(**{"mode": COUPLED, "draft_length": 2, "window": 4, **policy}),
    )


def new_session(max_tokens: int = 20, **policy: Any) -> EdgeSession:
    return CheckedSession(make_spec(max_tokens, **policy))


def started(max_tokens: int = 20, **policy: Any) -> EdgeSession:
    """Position 2 is committed: token 6."""
    session = new_session(max_tokens, **policy)
    session.handle(Start(), 0.0)
    session.handle(OPENED, 0.0)
    session.handle(make_verdict(position=2, token_ids=(6,)), 0.0)
    assert session.position == 3
    return session


def drafted(session: EdgeSession, *token_ids: int, now: float = 0.0) -> list[Effect]:
    laws = tuple(map(make_law, token_ids))
    return session.handle(
        Drafted(branch=session.branch, position=session.chain.end, token_ids=token_ids, laws=laws),
        now,
    )


def rejected(session: EdgeSession, rejection: Rejection = REJECTION) -> list[Effect]:
    """The second of the drafts in flight is rejected."""
    position = session.position
    verdict = make_verdict(
        position=position, num_accepted=1, rejection=rejection, num_draft_tokens=2
    )
    return session.handle(verdict, 0.0)


def frames(effects: list[Effect]) -> list[Any]:
    return [effect.frame for effect in effects if isinstance(effect, Send)]


def probing() -> EdgeSession:
    """Split; a draft was rejected at position 4, position 3 is committed: 7."""
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    rejected(session, UNRESOLVED)
    return session


def lost(session: EdgeSession) -> EdgeSession:
    session.handle(LinkLost(), 0.0)
    return session


def cancelled() -> EdgeSession:
    session = started(mode=SPLIT)
    session.handle(Cancel(), 0.0)
    return session


def drafting() -> EdgeSession:
    """Split, with a draft in flight."""
    session = started(mode=SPLIT)
    drafted(session, 7)
    return session


def reopened_probing() -> EdgeSession:
    session = lost(probing())
    session.handle(Resume(), 0.0)
    return session


def unopened() -> EdgeSession:
    session = new_session(mode=SPLIT)
    session.handle(Start(), 0.0)
    return session


IN_STATE: dict[EdgeState, Callable[[], EdgeSession]] = {
    EdgeState.NEW: lambda: new_session(mode=SPLIT),
    EdgeState.DRAFTING: drafting,
    EdgeState.PROBING: probing,
    EdgeState.OFFLINE: lambda: lost(drafting()),
    EdgeState.OFFLINE_PROBING: lambda: lost(probing()),
    EdgeState.FINISHED: cancelled,
}
NOT_OPENED = {EdgeState.DRAFTING: unopened, EdgeState.PROBING: reopened_probing}


def session_for(state: EdgeState, kind: EventKind) -> EdgeSession:
    """In `state`, and such that only the state can forbid the event."""
    if kind is EventKind.OPENED and state in NOT_OPENED:
        return NOT_OPENED[state]()
    return IN_STATE[state]()


def event_of(kind: EventKind, session: EdgeSession) -> EdgeEvent:
    """The event, right but, perhaps, for the state."""
    branch, end, position = session.branch, session.chain.end, session.position
    match kind:
        case EventKind.START:
            return Start()
        case EventKind.DRAFTED:
            return Drafted(branch=branch, position=end, token_ids=(9,), laws=(make_law(9),))
        case EventKind.EXHAUSTED:
            return Exhausted(branch, end)
        case EventKind.PAUSED:
            return Paused(branch, end)
        case EventKind.OPENED:
            return make_opened(first_position=position)
        case EventKind.VERDICT:
            return make_verdict(position=position, num_accepted=session.in_flight)
        case EventKind.REJECTION:
            return make_verdict(position=position, rejection=RESOLVED)
        case EventKind.UNRESOLVED:
            return make_verdict(position=position, rejection=UNRESOLVED)
        case EventKind.FINISH:
            return make_verdict(position=position, finish_reason=FinishReason.LENGTH)
        case EventKind.LINK_LOST:
            return LinkLost()
        case EventKind.RESUME:
            return Resume()
        case EventKind.CANCEL:
            return Cancel()


@pytest.mark.parametrize("kind", EventKind)
@pytest.mark.parametrize("state", EdgeState)
def test_every_pair_lands_in_its_state_or_raises(state: EdgeState, kind: EventKind) -> None:
    session = session_for(state, kind)
    event = event_of(kind, session)
    assert session.state is state
    expected = TRANSITIONS.get((state, kind))
    if expected is None:
        with pytest.raises((LocalProtocolError, RemoteOrderError)):
            session.handle(event, 0.0)
        assert session.state is state
    else:
        session.handle(event, 0.0)
        assert session.state is expected


def test_the_cloud_is_blamed_for_its_frames_only() -> None:
    session = probing()
    with pytest.raises(RemoteOrderError):
        session.handle(event_of(EventKind.VERDICT, session), 0.0)
    session = lost(drafting())
    with pytest.raises(LocalProtocolError):
        session.handle(event_of(EventKind.OPENED, session), 0.0)


# -- opening and drafting ------------------------------------------------------------------------


def test_the_opening_frame() -> None:
    session = new_session(mode=SPLIT, sparse_k=5000, assist=AssistPolicy.IDLE, fast_verify=False)
    effects = session.handle(Start(), 0.0)
    (request,) = frames(effects)
    assert isinstance(request, Open)
    assert request.prompt_token_ids.tolist() == [1, 2]
    assert request.sparse_k == CARD.limits.max_sparse_k
    assert request.assist is AssistPolicy.IDLE
    assert request.verify_whole_rounds
    assert request.probe == 0
    assert Allow(6) in effects


def test_drafts_go_out_at_once_and_before_the_opening_is_confirmed() -> None:
    session = new_session()
    session.handle(Start(), 0.0)
    assert frames(drafted(session, 6)) == [make_draft(base_position=2, token_ids=(6,))]
    assert frames(drafted(session, 7)) == [make_draft(base_position=3, token_ids=(7,))]
    session.handle(OPENED, 0.0)
    effects = session.handle(make_verdict(position=2, token_ids=(6,)), 0.0)
    assert effects == [Commit((6,)), Allow(7)]
    assert session.in_flight == 1
    assert session.branch == 0


def test_split_drafts_carry_their_probabilities() -> None:
    session = started(mode=SPLIT)
    effects = session.handle(
        Drafted(
            branch=session.branch,
            position=3,
            token_ids=(7,),
            laws=(Distribution(np.array([7], np.int32), np.array([1.0000001], np.float32)),),
        ),
        0.0,
    )
    assert frames(effects) == [make_draft(base_position=3, token_ids=(7,), draft_probs=(1.0,))]


def test_a_first_token_that_differs_starts_a_branch_and_an_epoch() -> None:
    session = new_session()
    session.handle(Start(), 0.0)
    drafted(session, 5, 6)
    session.handle(OPENED, 0.0)
    effects = session.handle(make_verdict(position=2, token_ids=(9,)), 0.0)
    assert effects == [Commit((9,)), Rollback(branch=1, length=2, token_ids=(9,)), Allow(7)]
    assert session.stale_tokens == 2
    assert frames(drafted(session, 4)) == [make_draft(epoch=1, base_position=3, token_ids=(4,))]


def test_an_epoch_in_which_nothing_was_sent_is_used_again() -> None:
    session = new_session()
    session.handle(Start(), 0.0)
    session.handle(OPENED, 0.0)
    session.handle(make_verdict(position=2, token_ids=(9,)), 0.0)
    assert session.branch == 1
    assert frames(drafted(session, 4)) == [make_draft(base_position=3, token_ids=(4,))]


def test_the_window_follows_what_is_committed() -> None:
    session = started(window=3)
    drafted(session, 7, 8, 9)
    with pytest.raises(LocalProtocolError):
        drafted(session, 10)
    assert session.handle(make_verdict(position=3, num_accepted=2, token_ids=(9,)), 0.0) == [
        Commit((7, 8, 9)),
        Allow(9),
    ]


def test_the_clouds_limits_cap_the_policy() -> None:
    session = new_session(window=500)
    assert Allow(66) not in session.handle(Start(), 0.0)  # max_tokens 20
    session = new_session(window=64, max_tokens=90)
    assert Allow(66) in session.handle(Start(), 0.0)
    session.handle(dataclasses.replace(OPENED, window=2, max_draft_tokens=1), 0.0)
    assert session.allowance.window == 2


def test_nothing_is_drafted_past_max_tokens() -> None:
    session = new_session(max_tokens=3, window=16)
    assert Allow(5) in session.handle(Start(), 0.0)


def test_without_parallel_drafting_a_round_waits_for_its_verdict() -> None:
    session = started(parallel_draft=False, draft_length=2, window=16)
    drafted(session, 7, 8)
    with pytest.raises(LocalProtocolError):
        drafted(session, 9)
    session = started(parallel_draft=False, draft_length=2, window=16)
    drafted(session, 7, 8)
    assert session.handle(make_verdict(position=3, num_accepted=1), 0.0) == [Commit((7,))]
    assert Allow(8) in session.handle(make_verdict(position=4, num_accepted=1, token_ids=(5,)), 0.0)


def test_whole_rounds_travel_in_one_frame() -> None:
    session = started(fast_verify=False, draft_length=3, window=8)
    assert frames(drafted(session, 7, 8)) == []
    assert frames(drafted(session, 9)) == [
        make_draft(base_position=3, token_ids=(7, 8, 9), end_of_round=True)
    ]


def test_a_round_ends_early_with_the_drafter_or_the_answer() -> None:
    session = started(fast_verify=False, draft_length=3, window=8)
    drafted(session, 7)
    assert frames(session.handle(Exhausted(session.branch, 4), 0.0)) == [
        make_draft(base_position=3, token_ids=(7,), end_of_round=True)
    ]
    session = started(max_tokens=3, fast_verify=False, draft_length=3, window=8)
    assert frames(drafted(session, 7, 8)) == [
        make_draft(base_position=3, token_ids=(7, 8), end_of_round=True)
    ]


def test_old_branches_are_ignored_and_unknown_ones_are_not() -> None:
    session = started()
    assert session.branch == 1
    assert session.handle(Drafted(branch=0, position=3, token_ids=(7,)), 0.0) == []
    assert session.handle(Exhausted(0, 3), 0.0) == []
    with pytest.raises(LocalProtocolError):
        session.handle(Drafted(branch=2, position=3, token_ids=(7,)), 0.0)
    with pytest.raises(LocalProtocolError):
        session.handle(Drafted(branch=1, position=4, token_ids=(7,)), 0.0)


# -- verdicts ------------------------------------------------------------------------------------


def test_a_bonus_token_equal_to_the_next_draft_is_no_rollback() -> None:
    session = started()
    drafted(session, 7, 8, 9)
    effects = session.handle(
        make_verdict(position=3, num_accepted=1, token_ids=(8,), num_draft_tokens=1), 0.0
    )
    assert effects == [Commit((7, 8)), Allow(9)]
    assert session.in_flight == 1


def test_a_bonus_token_that_differs_rolls_back_to_it() -> None:
    session = started()
    drafted(session, 7, 8, 9)
    effects = session.handle(
        make_verdict(position=3, num_accepted=1, token_ids=(5,), num_draft_tokens=1), 0.0
    )
    assert effects == [Commit((7, 5)), Rollback(branch=2, length=4, token_ids=(5,)), Allow(9)]
    assert session.stale_tokens == 2


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
def test_tokens_that_the_cloud_decoded_alone_agree_as_far_as_they_do(
    mode: VerificationMode,
) -> None:
    session = started(mode=mode)
    drafted(session, 7, 8, 9)
    effects = session.handle(make_verdict(position=3, token_ids=(7, 8, 4, 3)), 0.0)
    assert effects[:2] == [Commit((7, 8, 4, 3)), Rollback(branch=2, length=5, token_ids=(4, 3))]


def test_the_cloud_finishes() -> None:
    session = started()
    drafted(session, 7, STOP)
    verdict = make_verdict(position=3, num_accepted=2, finish_reason=FinishReason.STOP)
    assert session.handle(verdict, 0.0) == [Commit((7, STOP)), Finished(FinishReason.STOP)]
    assert session.handle(make_verdict(position=9, num_accepted=9), 0.0) == []


def test_the_edge_sees_the_end_itself_if_the_cloud_does_not_say_so() -> None:
    session = started(max_tokens=2)
    drafted(session, 7)
    effects = session.handle(make_verdict(position=3, num_accepted=1), 0.0)
    assert effects == [Commit((7,)), Send(Finish()), Finished(FinishReason.LENGTH)]


@pytest.mark.parametrize(
    ("verdict", "field"),
    [
        (make_verdict(position=4, num_accepted=1), "verdict.position"),
        (make_verdict(position=3, num_accepted=3), "verdict.num_accepted"),
        (make_verdict(epoch=1, position=3, num_accepted=1), "verdict.epoch"),
        (make_verdict(position=3, token_ids=(50,)), "verdict.token_ids"),
        (make_verdict(position=3, token_ids=tuple([5] * 20)), "verdict.token_ids"),
        (make_verdict(position=3, num_accepted=2, rejection=REJECTION), "verdict.rejection"),
    ],
)
def test_verdicts_that_do_not_fit(verdict: Verdict, field: str) -> None:
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    with pytest.raises(RemoteProtocolError) as caught:
        session.handle(verdict, 0.0)
    assert caught.value.field == field


def test_openings_that_do_not_fit() -> None:
    session = new_session()
    session.handle(Start(), 0.0)
    with pytest.raises(RemoteOrderError):
        session.handle(make_verdict(position=2, token_ids=(6,)), 0.0)
    session = new_session()
    session.handle(Start(), 0.0)
    with pytest.raises(RemoteOrderError):
        session.handle(dataclasses.replace(OPENED, first_position=3), 0.0)
    with pytest.raises(RemoteOrderError):
        started().handle(dataclasses.replace(OPENED, first_position=3), 0.0)


def test_round_trips_leave_out_queue_and_computation() -> None:
    session = started()
    drafted(session, 7, now=1.0)
    drafted(session, 8, now=2.0)
    session.handle(
        make_verdict(
            position=3, num_accepted=1, num_draft_tokens=1, queue_us=100_000, compute_us=50_000
        ),
        1.5,
    )
    assert session.round_trip_s == pytest.approx(0.35)
    session.handle(make_verdict(position=4), 2.5)
    assert session.round_trip_s is None
    session.handle(make_verdict(position=4, num_accepted=1, num_draft_tokens=1), 2.75)
    assert session.round_trip_s == pytest.approx(0.75)


# -- recovery ------------------------------------------------------------------------------------


def test_the_recovered_token_goes_out_alone_at_once() -> None:
    session = started(mode=SPLIT)
    drafted(session, 7, 8, 1)
    head = make_draft(epoch=1, base_position=4, token_ids=(9,), num_forced=1)
    assert rejected(session) == [
        Commit((7,)),
        Commit((9,)),
        Rollback(branch=2, length=4, token_ids=(9,)),
        Allow(9),
        Send(head),
    ]
    assert session.stale_tokens == 1
    assert frames(drafted(session, 5)) == [
        make_draft(epoch=1, base_position=5, token_ids=(5,), draft_probs=(0.5,))
    ]


def test_the_recovered_token_follows_what_the_drafts_law_leaves() -> None:
    """P is even over 3 and 9; the draft's law has as much for 3, and nothing for 9."""
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    even = make_rejection(token_ids=(3, 9), probs=(0.25, 0.75))
    assert Commit((9,)) in rejected(session, even)


def test_with_whole_rounds_it_heads_the_round() -> None:
    session = started(mode=SPLIT, fast_verify=False)
    drafted(session, 7, 8)
    assert frames(rejected(session)) == []
    assert frames(drafted(session, 5, 6)) == [
        make_draft(
            epoch=1,
            base_position=4,
            token_ids=(9, 5, 6),
            draft_probs=(0.5, 0.5),
            num_forced=1,
            end_of_round=True,
        )
    ]


def test_with_whole_rounds_and_no_draft_the_head_goes_before_the_probe() -> None:
    session = started(mode=SPLIT, fast_verify=False)
    drafted(session, 7, 8)
    rejected(session)
    assert frames(session.handle(Exhausted(session.branch, 5), 0.0)) == [
        make_draft(epoch=1, base_position=4, token_ids=(9,), num_forced=1, end_of_round=True),
        make_draft(epoch=1, base_position=5, probe=1),
    ]


def test_a_recovered_token_may_be_the_last() -> None:
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    assert rejected(session, STOPPING) == [
        Commit((7,)),
        Commit((STOP,)),
        Send(Finish()),
        Finished(FinishReason.STOP),
    ]


def test_probes_ask_for_fresh_tail_samples() -> None:
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    assert rejected(session, UNRESOLVED) == [
        Commit((7,)),
        Send(make_draft(epoch=1, base_position=4, probe=2)),
    ]
    again = make_verdict(epoch=1, position=4, rejection=UNRESOLVED)
    assert session.handle(again, 0.0) == [Send(make_draft(epoch=2, base_position=4, probe=3))]
    effects = session.handle(make_verdict(epoch=2, position=4, rejection=RESOLVED), 0.0)
    assert effects[:2] == [Commit((9,)), Rollback(branch=4, length=4, token_ids=(9,))]
    assert frames(effects) == [make_draft(epoch=3, base_position=4, token_ids=(9,), num_forced=1)]


def test_what_is_drafted_while_a_tail_sample_is_awaited_is_ignored() -> None:
    session = probing()
    assert session.handle(Drafted(branch=1, position=5, token_ids=(3,)), 0.0) == []


def test_a_drafter_with_nothing_to_propose_probes_once() -> None:
    session = started(mode=SPLIT)
    assert frames(session.handle(Exhausted(session.branch, 3), 0.0)) == [
        make_draft(base_position=3, probe=1)
    ]
    assert session.handle(Exhausted(session.branch, 3), 0.0) == []
    effects = session.handle(make_verdict(position=3, rejection=REJECTION), 0.0)
    assert effects[:2] == [Commit((9,)), Rollback(branch=2, length=3, token_ids=(9,))]


@pytest.mark.parametrize("assist", [AssistPolicy.ALWAYS, AssistPolicy.AUTO])
def test_where_the_cloud_goes_on_nothing_has_to_be_asked_for(assist: AssistPolicy) -> None:
    session = started(mode=SPLIT, assist=assist)
    assert session.handle(Exhausted(session.branch, 3), 0.0) == []


def test_it_probes_after_its_last_draft_is_judged() -> None:
    session = started()
    drafted(session, 7)
    assert session.handle(Exhausted(session.branch, 4), 0.0) == []
    effects = session.handle(make_verdict(position=3, num_accepted=1), 0.0)
    assert effects == [Commit((7,)), Send(make_draft(base_position=4, probe=1))]
    effects = session.handle(make_verdict(position=4, token_ids=(8,)), 0.0)
    assert effects[:2] == [Commit((8,)), Rollback(branch=2, length=4, token_ids=(8,))]
    assert frames(drafted(session, 9)) == [make_draft(epoch=1, base_position=5, token_ids=(9,))]


def test_it_does_not_probe_for_the_first_token() -> None:
    session = new_session()
    session.handle(Start(), 0.0)
    assert session.handle(Exhausted(0, 2), 0.0) == []


# -- resumption ----------------------------------------------------------------------------------


def test_resuming_sends_everything_again_as_epoch_0() -> None:
    session = started()
    drafted(session, 7, 8)
    session.handle(
        make_verdict(position=3, num_accepted=1, token_ids=(5,), num_draft_tokens=1), 0.0
    )
    drafted(session, 1, 2)
    session.handle(LinkLost(), 1.0)
    assert session.in_flight == 0
    assert frames(drafted(session, 3)) == []
    effects = session.handle(Resume(), 2.0)
    request, chain = frames(effects)
    assert request.output_token_ids.tolist() == [6, 7, 5]
    assert chain == make_draft(base_position=5, token_ids=(1, 2, 3))
    session.handle(dataclasses.replace(OPENED, first_position=5), 3.0)
    assert session.handle(make_verdict(position=5, token_ids=(1,)), 3.0) == [
        Commit((1,)),
        Allow(10),
    ]


def test_the_drafter_goes_on_within_the_window_while_the_link_is_gone() -> None:
    session = lost(started())
    drafted(session, 7, 8, 9, 10)
    with pytest.raises(LocalProtocolError):
        drafted(session, 11)


def test_a_pending_probe_becomes_the_openings() -> None:
    session = lost(probing())
    branch = session.branch
    (request,) = frames(session.handle(Resume(), 0.0))
    assert request.probe == 2
    assert request.output_token_ids.tolist() == [6, 7]
    session.handle(dataclasses.replace(OPENED, first_position=4), 0.0)
    effects = session.handle(make_verdict(position=4, rejection=RESOLVED), 0.0)
    assert effects[:2] == [Commit((9,)), Rollback(branch=branch + 1, length=4, token_ids=(9,))]
    assert frames(effects) == [make_draft(base_position=4, token_ids=(9,), num_forced=1)]


def test_an_unanswered_exhaustion_probe_is_given_up_with_its_link() -> None:
    session = started(mode=SPLIT)
    session.handle(Exhausted(session.branch, 3), 0.0)
    session.handle(LinkLost(), 0.0)
    assert [type(frame) for frame in frames(session.handle(Resume(), 0.0))] == [Open]
    session.handle(dataclasses.replace(OPENED, first_position=3), 0.0)
    effects = session.handle(make_verdict(position=3, token_ids=(8,)), 0.0)
    assert effects[:2] == [Commit((8,)), Rollback(branch=2, length=3, token_ids=(8,))]


def test_cancelling_tells_the_cloud_once() -> None:
    session = started()
    assert session.handle(Cancel(), 0.0) == [Send(Finish())]
    assert session.handle(Cancel(), 0.0) == []
    assert lost(started()).handle(Cancel(), 0.0) == []


# -- control: pauses, deadlines, lengths


def test_a_paused_drafter_goes_on_when_something_is_committed() -> None:
    session = started(mode=SPLIT)
    drafted(session, 7, 8)
    assert session.handle(Paused(session.branch, 5), 0.0) == []
    effects = session.handle(make_verdict(position=3, num_accepted=1, num_draft_tokens=1), 0.0)
    assert effects == [Commit((7,)), Allow(8)]


def test_a_drafter_that_paused_too_late_goes_on_at_once() -> None:
    session = started(max_tokens=3, mode=SPLIT)  # its limit cannot grow any more
    assert session.allowance.limit == 5
    drafted(session, 7)
    session.handle(make_verdict(position=3, num_accepted=1, num_draft_tokens=1), 0.0)
    assert session.handle(Paused(session.branch, 4), 0.0) == [Allow(5)]


def test_a_pause_ends_the_round() -> None:
    session = started(mode=SPLIT, fast_verify=False)
    assert frames(drafted(session, 7)) == []
    [frame] = frames(session.handle(Paused(session.branch, 4), 0.0))
    assert (frame.token_ids, frame.end_of_round) == ((7,), True)


def test_a_rollback_ends_a_pause() -> None:
    session = started(mode=COUPLED, fast_verify=False)
    drafted(session, 7)
    session.handle(Paused(session.branch, 4), 0.0)
    session.handle(make_verdict(position=3, token_ids=(5,), num_draft_tokens=1), 0.0)
    assert frames(drafted(session, 8)) == []


def test_a_slow_round_goes_out_short_at_its_deadline() -> None:
    session = started(mode=SPLIT, fast_verify=False, draft_length=4, round_timeout_s=0.5)
    assert session.deadline is None
    assert frames(drafted(session, 7, now=1.0)) == []
    drafted(session, 8, now=1.2)
    assert session.deadline == 1.5
    assert session.handle(Tick(), 1.4) == []
    [frame] = frames(session.handle(Tick(), 1.5))
    assert (frame.token_ids, frame.end_of_round) == ((7, 8), True)
    assert session.deadline is None
    assert session.handle(Tick(), 9.0) == []


def test_without_a_timeout_there_is_no_deadline() -> None:
    session = started(mode=SPLIT, fast_verify=False, draft_length=4)
    drafted(session, 7, now=1.0)
    assert session.deadline is None


def test_no_deadline_while_the_link_is_lost() -> None:
    session = started(mode=SPLIT, fast_verify=False, draft_length=4, round_timeout_s=0.5)
    drafted(session, 7, now=1.0)
    assert session.deadline == 1.5
    session.handle(LinkLost(), 1.1)
    assert session.deadline is None


def test_a_new_epochs_echo_tells_the_round_trip_though_its_drafts_come_too_late() -> None:
    session = started(mode=COUPLED, assist=AssistPolicy.AUTO, window=8)
    drafted(session, 7, now=1.0)
    session.handle(make_verdict(position=3, token_ids=(5,)), 1.1)  # 7 is dead
    assert session.round_trip_s is None
    drafted(session, 8, now=1.2)
    session.handle(make_verdict(position=4, token_ids=(8,)), 1.25)  # of the old epoch
    assert session.round_trip_s is None
    echo = make_verdict(position=5, token_ids=(9,), epoch=1, compute_us=20_000)
    session.handle(echo, 1.45)
    assert session.round_trip_s == pytest.approx(0.23)
    session.handle(make_verdict(position=6, token_ids=(9,), epoch=1), 1.47)
    assert session.round_trip_s is None


def test_lengths_change_in_the_middle() -> None:
    session = started(mode=SPLIT, draft_length=2, window=4)
    [frame] = frames(drafted(session, 7))
    assert frame.step_limit == 2
    assert session.handle(SetLength(4, 8), 0.0) == [Allow(11)]
    [frame] = frames(drafted(session, 8))
    assert frame.step_limit == 4
    assert frames(drafted(session, 9))[0].step_limit == 0
    assert session.handle(SetLength(4, 2), 0.0) == []  # what was allowed stays allowed


def test_a_window_of_0_stops_the_drafter() -> None:
    session = started(mode=SPLIT, assist=AssistPolicy.AUTO)
    drafted(session, 7)
    assert session.handle(SetLength(2, 0), 0.0) == [Allow(3)]
    assert frames(drafted(session, 8))  # it was under way
    effects = session.handle(make_verdict(position=3, num_accepted=2, token_ids=(4,)), 0.0)
    assert effects == [Commit((7, 8, 4)), Rollback(branch=2, length=5, token_ids=(4,))]
    assert session.handle(SetLength(2, 4), 0.0) == [Allow(10)]


def test_a_window_may_be_0_from_the_start() -> None:
    session = started(mode=SPLIT, assist=AssistPolicy.AUTO, window=0)
    assert session.allowance.limit == 0
    assert session.handle(SetLength(2, 4), 0.0) == [Allow(7)]
    assert [frame.token_ids for frame in frames(drafted(session, 7))] == [(7,)]


def test_drafts_that_would_land_behind_the_cloud_wait_for_those_that_do_not() -> None:
    session = started(mode=COUPLED, assist=AssistPolicy.AUTO, window=8)
    session.handle(SetLength(4, 8, lead=2), 0.0)
    assert frames(drafted(session, 7)) == frames(drafted(session, 8)) == []
    assert [frame.token_ids for frame in frames(drafted(session, 9))] == [(7, 8, 9)]
    # The cloud has gone on by itself; the same lead counts from there.
    session.handle(make_verdict(position=3, token_ids=(7, 8)), 0.0)
    assert not frames(drafted(session, 10))
    assert frames(drafted(session, 11))[0].token_ids == (10, 11)


def test_a_cloud_that_waits_is_never_ahead() -> None:
    session = started(mode=COUPLED, assist=AssistPolicy.IDLE, window=8)
    session.handle(SetLength(4, 8, lead=2), 0.0)
    assert frames(drafted(session, 7))


def test_a_window_within_the_lead_is_sent_all_the_same() -> None:
    session = started(mode=COUPLED, assist=AssistPolicy.AUTO, window=8)
    session.handle(SetLength(4, 2, lead=5), 0.0)
    assert not frames(drafted(session, 7))
    assert frames(drafted(session, *range(8, 15)))  # what was allowed before


@pytest.mark.parametrize("stopped", [Paused, Exhausted])
def test_a_drafter_that_stops_leaves_nothing_behind(stopped: type[Paused | Exhausted]) -> None:
    session = started(mode=COUPLED, assist=AssistPolicy.AUTO, window=8)
    session.handle(SetLength(4, 8, lead=5), 0.0)
    assert not frames(drafted(session, 7, 8))
    [frame] = frames(session.handle(stopped(session.branch, session.chain.end), 0.0))
    assert frame.token_ids == (7, 8)


def test_lengths_beyond_the_clouds_limits_are_capped() -> None:
    session = started(mode=SPLIT)
    assert session.handle(SetLength(99, 9999), 0.0) == [Allow(22)]  # all there is to generate
    [frame] = frames(drafted(session, 7))
    assert frame.step_limit == CARD.limits.max_draft_tokens


def test_a_new_stream_is_told_the_draft_length_again() -> None:
    session = started(mode=SPLIT, draft_length=3)
    assert frames(drafted(session, 7))[0].step_limit == 3
    session.handle(LinkLost(), 0.0)
    resent = frames(session.handle(Resume(), 0.0))[1]
    assert resent.step_limit == 3


def test_whole_rounds_need_no_step_limit() -> None:
    session = started(mode=SPLIT, fast_verify=False, draft_length=2)
    [frame] = frames(drafted(session, 7, 8))
    assert frame.step_limit == 0


def test_without_split_rejection_the_whole_distribution_is_asked_for() -> None:
    [request] = frames(new_session(mode=SPLIT, split_rejection=False).handle(Start(), 0.0))[:1]
    assert request.sparse_k == 0


# -- the log and the checks


def test_a_log_replays_a_run() -> None:
    spec = make_spec(mode=SPLIT)
    session = CheckedSession(spec)
    seen = []
    for now, event in enumerate(
        (
            Start(),
            OPENED,
            make_verdict(position=2, token_ids=(6,)),
            Drafted(branch=1, position=3, token_ids=(7, 8), laws=(make_law(7), make_law(8))),
            make_verdict(position=3, num_accepted=1, rejection=UNRESOLVED, num_draft_tokens=2),
            SetLength(3, 9),
            LinkLost(),
            Resume(),
            Cancel(),
        )
    ):
        seen.append(session.handle(event, float(now)))
    again = CheckedSession(spec)
    assert repr(replay(again, session.log)) == repr(seen)  # an Open's arrays have no equality
    assert (again.state, again.branch, again.output) == (session.state, 2, session.output)
    assert again.log == session.log


def test_a_replay_fails_as_the_run_did() -> None:
    session = started()
    with pytest.raises(LocalProtocolError) as failed:
        session.handle(Drafted(branch=9, position=3, token_ids=(7,)), 0.0)
    again = new_session()
    with pytest.raises(LocalProtocolError) as replayed:
        replay(again, session.log)
    assert str(replayed.value) == str(failed.value)


def test_the_log_is_bounded() -> None:
    session = EdgeSession(make_spec(), log_length=3)
    for now in range(9):
        session.handle(Tick(), float(now))
    assert list(session.log) == [(6.0, Tick()), (7.0, Tick()), (8.0, Tick())]


def test_validation_sees_an_output_that_was_tampered_with() -> None:
    session = drafting()
    session.output.append(5)
    with pytest.raises(AssertionError, match="the position is where"):
        session.validate()


def test_validation_sees_a_state_that_does_not_fit() -> None:
    session = drafting()
    session.state = EdgeState.PROBING
    with pytest.raises(AssertionError, match="the chain grows only while drafting"):
        session.validate()
    session.state = EdgeState.OFFLINE
    with pytest.raises(AssertionError, match="without a stream nothing is in flight"):
        session.validate()


def test_validation_sees_a_chain_that_forgets_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftChain, "commit", lambda *_args: None)
    with pytest.raises(AssertionError, match="the position is where"):
        started()


def test_validation_sees_drafts_beyond_what_was_allowed() -> None:
    session = drafting()
    session.chain.extend((7,) * 9, (make_law(7),) * 9)
    with pytest.raises(AssertionError, match="no draft is beyond the limit"):
        session.validate()
