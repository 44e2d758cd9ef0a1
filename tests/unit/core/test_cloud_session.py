"""The cloud's session: every (state, event) pair, and each rule of order with its field."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from picospec.errors import LocalProtocolError, RemoteOrderError, RemoteProtocolError
from picospec.protocol.cloud_session import TRANSITIONS, CloudEvent, CloudSession, CloudState
from picospec.protocol.messages import (
    EMPTY_TOKENS,
    CloudFrame,
    Draft,
    EdgeFrame,
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
CARD = ModelCard(
    model_id="m",
    logits_width=50,
    tokenizer_fingerprint="f",
    chat_template_fingerprint="",
    eos_token_ids=(0,),
    max_model_len=100,
    modes=(SPLIT, COUPLED),
    limits=Limits(max_draft_tokens=4, max_window=6),
    protocol_version=1,
)
OPEN = Open(
    session_id="s",
    prompt_token_ids=np.array([1, 2], np.int32),
    output_token_ids=EMPTY_TOKENS,
    sampling=SamplingParams(),
    mode=SPLIT,
    max_tokens=20,
)
OPENED = Opened(first_position=2, cached_prompt_tokens=0, max_draft_tokens=4, window=6, sparse_k=64)
REJECTION = Rejection(np.array([1], np.int32), np.ones(1, np.float32))


def draft(epoch: int, base: int, *token_ids: int, forced: int = 0, probe: int = 0) -> Draft:
    return Draft(
        epoch=epoch,
        base_position=base,
        token_ids=token_ids,
        draft_probs=(0.5,) * (len(token_ids) - forced),
        num_forced=forced,
        end_of_round=False,
        probe=probe,
    )


def coupled_draft(epoch: int, base: int, *token_ids: int, probe: int = 0) -> Draft:
    return Draft(epoch=epoch, base_position=base, token_ids=token_ids, probe=probe)


def session_in(state: CloudState) -> CloudSession:
    """Split; where a stream is open, position 2 is committed and epoch 0 has (7, 8) from 3 on."""
    session = CloudSession(CARD)
    if state is CloudState.NEW:
        return session
    session.receive(OPEN)
    if state is CloudState.OPENING:
        session.receive(draft(0, 2, 6, 7, 8))
        return session
    session.send(OPENED)
    session.send(Verdict(epoch=0, position=2, num_accepted=0, token_ids=(6,)))
    session.receive(draft(0, 3, 7, 8))
    if state is CloudState.AWAITING_RECOVERY:
        session.send(
            Verdict(epoch=0, position=3, num_accepted=1, token_ids=(), rejection=REJECTION)
        )
    if state is CloudState.FINISHED:
        session.receive(Finish())
    assert session.state is state
    return session


def coupled_session() -> CloudSession:
    session = CloudSession(CARD)
    session.receive(dataclasses.replace(OPEN, mode=COUPLED))
    session.send(OPENED)
    session.send(Verdict(epoch=0, position=2, num_accepted=0, token_ids=(6,)))
    return session


def frame_of(event: CloudEvent, session: CloudSession) -> EdgeFrame | CloudFrame:
    """A frame that is right but, perhaps, for the state."""
    position, epoch = session.committed_end, session.epoch.number
    return {
        CloudEvent.OPEN: OPEN,
        CloudEvent.CHAIN: draft(epoch + 1, position, 9),
        CloudEvent.RECOVERY: draft(epoch + 1, position, 9, forced=1),
        CloudEvent.PROBE: draft(epoch + 1, position, probe=2),
        CloudEvent.EXTENSION: draft(max(epoch, 0), session.epoch.end, 9),
        CloudEvent.FINISH: Finish(),
        CloudEvent.OPENED: OPENED,
        CloudEvent.VERDICT: Verdict(epoch=0, position=position, num_accepted=0),
        CloudEvent.REJECTION: Verdict(
            epoch=0, position=position, num_accepted=0, token_ids=(), rejection=REJECTION
        ),
        CloudEvent.LAST_VERDICT: Verdict(0, position, finish_reason=FinishReason.LENGTH),
    }[event]


SENT = {
    CloudEvent.OPENED,
    CloudEvent.VERDICT,
    CloudEvent.REJECTION,
    CloudEvent.LAST_VERDICT,
}


@pytest.mark.parametrize("event", CloudEvent)
@pytest.mark.parametrize("state", CloudState)
def test_every_pair_lands_in_its_state_or_raises(state: CloudState, event: CloudEvent) -> None:
    session = session_in(state)
    frame: Any = frame_of(event, session)
    act = session.send if event in SENT else session.receive
    if state is CloudState.AWAITING_RECOVERY and event is CloudEvent.EXTENSION:
        # The rest of a dead epoch: dropped before the table is asked.
        assert session.receive(frame) is None
        assert session.stale_tokens == 1
        assert session.state is state
        return
    expected = TRANSITIONS.get((state, event))
    if expected is None:
        error = LocalProtocolError if event in SENT else RemoteOrderError
        with pytest.raises(error):
            act(frame)
    else:
        act(frame)
        assert session.state is expected


def raises(session: CloudSession, frame: EdgeFrame, field: str) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        session.receive(frame)
    assert caught.value.field == field
    return caught.value


def test_the_first_frame_must_be_an_open() -> None:
    raises(CloudSession(CARD), draft(0, 2, 5), "draft")


def test_a_second_open() -> None:
    assert isinstance(raises(session_in(CloudState.OPEN), OPEN, "open"), RemoteOrderError)


def test_content_is_checked() -> None:
    raises(CloudSession(CARD), dataclasses.replace(OPEN, max_tokens=0), "open.max_tokens")
    raises(session_in(CloudState.OPEN), draft(0, 5, 50), "draft.token_ids")
    raises(session_in(CloudState.OPEN), coupled_draft(0, 5, 4), "draft.draft_probs")
    raises(coupled_session(), draft(0, 3, 4), "draft.draft_probs")


@pytest.mark.parametrize(
    ("state", "frame", "field"),
    [
        (CloudState.OPEN, draft(2, 3, 9), "draft.epoch"),
        (CloudState.OPEN, draft(0, 6, 9), "draft.base_position"),  # a gap
        (CloudState.OPEN, draft(1, 4, 9), "draft.base_position"),  # beyond what was sent
        (CloudState.OPEN, draft(1, 1, 9), "draft.base_position"),  # in the prompt
        (CloudState.OPEN, draft(0, 1, 6, 6, 7, 8), "draft.base_position"),
        (CloudState.OPEN, draft(0, 3, 7, 9), "draft.token_ids"),  # other tokens than before
        (CloudState.OPEN, draft(0, 5, 9, forced=1), "draft.num_forced"),
        (CloudState.OPEN, draft(1, 3, 9, forced=1), "draft.num_forced"),
        (CloudState.OPEN, draft(0, 5, probe=1), "draft.base_position"),  # behind drafts
        (CloudState.OPENING, draft(1, 2, 9, forced=1), "draft.num_forced"),
        (CloudState.AWAITING_RECOVERY, draft(1, 4, 9), "draft.num_forced"),
        (CloudState.AWAITING_RECOVERY, draft(1, 3, 9, forced=1), "draft.base_position"),
        (CloudState.AWAITING_RECOVERY, draft(1, 5, 9, forced=1), "draft.base_position"),
        (CloudState.AWAITING_RECOVERY, draft(1, 3, probe=2), "draft.base_position"),
    ],
)
def test_frames_out_of_order(state: CloudState, frame: Draft, field: str) -> None:
    assert isinstance(raises(session_in(state), frame, field), RemoteOrderError)


def test_nothing_beyond_what_was_asked_for() -> None:
    session = CloudSession(CARD)
    session.receive(dataclasses.replace(OPEN, max_tokens=3))
    assert session.receive(draft(0, 2, 5, 5, 5)) is not None
    raises(session, draft(0, 5, 5), "draft.token_ids")


def test_the_window_is_kept() -> None:
    session = session_in(CloudState.OPEN)
    assert session.unverified_tokens == 2
    assert session.receive(draft(0, 5, 1, 1, 1, 1)) is not None
    assert session.unverified_tokens == 6
    raises(session, draft(0, 9, 1), "draft.token_ids")


def test_a_verdict_opens_the_window() -> None:
    session = session_in(CloudState.OPEN)
    session.receive(draft(0, 5, 1, 1, 1, 1))
    session.send(Verdict(epoch=0, position=3, num_accepted=2))
    assert session.receive(draft(0, 9, 1, 1)) is not None


def test_a_forced_head_is_no_unverified_token() -> None:
    session = session_in(CloudState.AWAITING_RECOVERY)
    assert session.receive(draft(1, 4, 9, 1, 1, 1, 1, forced=1)) is not None
    assert session.unverified_tokens == 4
    assert session.receive(draft(1, 9, 1, 1)) is not None


def test_older_epochs_are_dropped_and_counted() -> None:
    session = session_in(CloudState.AWAITING_RECOVERY)
    session.receive(draft(1, 4, 9, forced=1))
    assert session.receive(draft(0, 5, 1, 2, 3)) is None
    assert session.stale_tokens == 3


def test_duplicates_change_nothing() -> None:
    session = session_in(CloudState.OPEN)
    assert session.receive(draft(0, 3, 7, 8)) is None
    assert session.receive(draft(0, 4, 8)) is None
    assert session.duplicate_frames == 2
    assert session.receive(draft(0, 4, 8, 9)) is not None
    assert session.unverified_tokens == 3


def test_a_repeated_recovery_changes_nothing() -> None:
    session = session_in(CloudState.AWAITING_RECOVERY)
    head = draft(1, 4, 9, forced=1)
    assert session.receive(head) is not None
    assert session.receive(head) is None
    assert session.unverified_tokens == 0


def test_a_repeated_probe_changes_nothing() -> None:
    session = coupled_session()
    probe = coupled_draft(0, 3, probe=1)
    assert session.receive(probe) is not None
    assert session.receive(probe) is None
    session.send(Verdict(epoch=0, position=3, num_accepted=0, token_ids=(5,)))
    assert session.receive(coupled_draft(0, 4, probe=1)) is not None


def test_each_probe_of_a_recovery_begins_an_epoch() -> None:
    session = session_in(CloudState.AWAITING_RECOVERY)
    assert session.receive(draft(1, 4, probe=2)) is not None
    session.send(Verdict(epoch=1, position=4, num_accepted=0, token_ids=(), rejection=REJECTION))
    assert session.receive(draft(2, 4, probe=3)) is not None
    session.send(Verdict(epoch=2, position=4, num_accepted=0, token_ids=(), rejection=REJECTION))
    assert session.receive(draft(3, 4, 9, forced=1)) is not None


def test_an_epoch_may_go_on_behind_the_clouds_own_tokens() -> None:
    """Coupled: the bonus token equalled the edge's next draft, so it need not travel."""
    session = coupled_session()
    session.receive(coupled_draft(0, 3, 7))
    session.send(Verdict(epoch=0, position=3, num_accepted=1, token_ids=(8,)))
    assert session.receive(coupled_draft(0, 5, 9)) is not None
    assert session.unverified_tokens == 1
    assert session.receive(coupled_draft(0, 4, 8)) is None  # late, known
    raises(session, coupled_draft(0, 7, 9), "draft.base_position")


def test_a_new_chain_may_begin_below_what_was_sent_meanwhile() -> None:
    """Coupled with assist: verdicts are on their way to the edge as it begins the epoch."""
    session = coupled_session()
    session.send(Verdict(epoch=0, position=3, num_accepted=0, token_ids=(5,)))
    session.send(Verdict(epoch=0, position=4, num_accepted=0, token_ids=(5,)))
    assert session.receive(coupled_draft(0, 3, 5, 5, 5)) is not None


def test_a_session_opened_with_a_probe_recovers_in_epoch_0() -> None:
    session = CloudSession(CARD)
    session.receive(dataclasses.replace(OPEN, probe=2))
    session.send(OPENED)
    session.send(Verdict(epoch=0, position=2, num_accepted=0, token_ids=(), rejection=REJECTION))
    assert session.receive(draft(0, 2, 9, forced=1)) is not None


def test_after_the_end_everything_is_dropped() -> None:
    session = session_in(CloudState.OPEN)
    session.send(
        Verdict(
            epoch=0,
            position=3,
            num_accepted=2,
            token_ids=(),
            rejection=None,
            finish_reason=FinishReason.STOP,
        )
    )
    assert session.finished
    for frame in (OPEN, draft(0, 5, 9), draft(7, 1, 9), Finish()):
        assert session.receive(frame) is None


def test_a_verdict_elsewhere_is_the_engines_fault() -> None:
    with pytest.raises(LocalProtocolError):
        session_in(CloudState.OPEN).send(Verdict(epoch=0, position=4, num_accepted=1))
