"""The arithmetic of verdicts, without vLLM."""

from __future__ import annotations

import doctest

import pytest

from cloud_server.engine import verdicts
from cloud_server.engine.judging.verification import StepResult
from cloud_server.engine.verdicts import Tally
from picospec.protocol.messages import FinishReason, Verdict
from tests.support.builders import make_rejection


def concluded(
    tally: Tally,
    result: StepResult,
    committed: list[int],
    *,
    num_drafts: int = 0,
    finish_reason: FinishReason | None = None,
) -> Verdict | None:
    return tally.conclude(
        result,
        committed,
        epoch=3,
        position=10,
        num_drafts=num_drafts,
        finish_reason=finish_reason,
        step_started_s=2.0,
        compute_us=5,
    )


def test_worked_examples() -> None:
    assert doctest.testmod(verdicts).failed == 0


def test_all_accepted_with_a_bonus_token() -> None:
    tally = Tally(num_forwards=1, arrived_s=1.5)
    verdict = concluded(tally, StepResult(num_accepted=2, token_ids=(8,)), [4, 5, 8], num_drafts=2)
    assert verdict == Verdict(
        epoch=3,
        position=10,
        num_accepted=2,
        token_ids=(8,),
        num_draft_tokens=2,
        queue_us=500_000,
        compute_us=5,
        num_forwards=1,
    )


def test_none_accepted_and_a_rejection() -> None:
    rejection = make_rejection()
    verdict = concluded(Tally(), StepResult(num_accepted=0, rejection=rejection), [], num_drafts=3)
    assert verdict is not None
    assert (verdict.num_accepted, verdict.num_draft_tokens) == (0, 3)
    assert verdict.rejection is rejection


@pytest.mark.parametrize("committed", [[4], [4, 5]])
def test_a_stop_inside_the_drafts_cuts_what_was_decided_behind_it(committed: list[int]) -> None:
    result = StepResult(num_accepted=3, rejection=make_rejection())
    verdict = concluded(Tally(), result, committed, num_drafts=4, finish_reason=FinishReason.STOP)
    assert verdict is not None
    assert verdict.num_accepted == len(committed)
    assert verdict.token_ids == ()
    assert verdict.rejection is None


def test_what_a_row_accepted_comes_first() -> None:
    tally = Tally(num_by_row=2, num_forwards=1)
    verdict = concluded(tally, StepResult(num_accepted=1), [4], num_drafts=2)
    assert verdict is not None
    assert (verdict.position, verdict.num_accepted, verdict.num_draft_tokens) == (8, 3, 4)
    again = concluded(tally, StepResult(num_accepted=1), [4], num_drafts=1)
    assert again is not None
    assert (again.position, again.num_accepted, again.num_forwards) == (10, 1, 0)


def test_a_forward_for_its_row_alone_tells_nothing_and_stays_on_the_account() -> None:
    tally = Tally(num_forwards=1)
    assert concluded(tally, StepResult(num_accepted=0), []) is None
    assert tally.num_forwards == 1


def test_no_wait_is_negative() -> None:
    tally = Tally(arrived_s=9.0)  # arrived while the step ran
    verdict = tally.verdict(epoch=0, position=4, step_started_s=2.0, num_drafts=1)
    assert verdict.queue_us == 0
