"""The engine's queue of drafts: rules 2 to 4 against what is really committed."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picospec.protocol import draft_chain, draft_queue
from picospec.protocol.draft_queue import DraftQueue, Work
from picospec.protocol.messages import Draft, VerificationMode

SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED


def coupled(*committed: int, whole: bool = False) -> tuple[DraftQueue, list[int]]:
    tokens = list(committed)
    return DraftQueue(COUPLED, tokens, verify_whole_rounds=whole), tokens


def split(*committed: int) -> tuple[DraftQueue, list[int]]:
    tokens = list(committed)
    return DraftQueue(SPLIT, tokens), tokens


def rejected_at_two() -> tuple[DraftQueue, list[int]]:
    """A split queue that awaits recovery at position 2."""
    queue, committed = split(7, 7)
    queue.add(Draft(epoch=0, base_position=2, token_ids=(4, 5), draft_probs=(0.5, 0.5)), 0.0)
    assert queue.take(1) is not None
    queue.judged(rejected=True)
    return queue, committed


@pytest.mark.parametrize("module", [draft_queue, draft_chain])
def test_worked_examples(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_take_repeats_itself_until_judged() -> None:
    queue, committed = coupled(7, 7)
    queue.add(Draft(epoch=0, base_position=2, token_ids=(1, 2, 3)), 1.5)
    work = Work(epoch=0, position=2, token_ids=(1, 2), draft_probs=(), probe=0, arrived_s=1.5)
    assert queue.take(2) == queue.take(2) == work
    committed += [1, 2, 9]
    queue.judged()
    assert not queue.has_work


def test_the_arrival_is_the_newest_drafts_taken() -> None:
    queue, _ = coupled(7)
    queue.add(Draft(epoch=0, base_position=1, token_ids=(1,)), 1.0)
    queue.add(Draft(epoch=0, base_position=2, token_ids=(2,)), 2.0)
    queue.add(Draft(epoch=0, base_position=3, token_ids=(3,)), 3.0)
    assert [queue.take(n).arrived_s for n in (1, 2, 3)] == [1.0, 2.0, 3.0]  # type: ignore[union-attr]
    assert queue.take(0) is None


def test_drafts_before_the_first_token_serve_with_their_tail() -> None:
    queue, committed = split(7, 7)
    queue.add(Draft(epoch=0, base_position=2, token_ids=(4, 5), draft_probs=(0.5, 0.25)), 0.0)
    committed.append(4)
    assert queue.take(9) == Work(epoch=0, position=3, token_ids=(5,), draft_probs=(0.25,))
    assert queue.stale_tokens == 0


def test_a_first_token_that_differs_kills_the_epoch_and_the_next_one_lives() -> None:
    queue, committed = split(7, 7)
    queue.add(Draft(epoch=0, base_position=2, token_ids=(4, 5), draft_probs=(0.5, 0.25)), 0.0)
    committed.append(9)
    assert queue.take(9) is None
    queue.add(Draft(epoch=0, base_position=4, token_ids=(6,), draft_probs=(0.5,)), 0.0)
    assert not queue.has_work
    assert queue.stale_tokens == 3
    queue.add(Draft(epoch=1, base_position=3, token_ids=(8,), draft_probs=(0.5,)), 0.0)
    assert queue.take(9) == Work(epoch=1, position=3, token_ids=(8,), draft_probs=(0.5,))


def test_an_older_epoch_is_counted() -> None:
    queue, _ = coupled(7)
    queue.add(Draft(epoch=0, base_position=1, token_ids=(1,)), 0.0)
    queue.add(Draft(epoch=1, base_position=1, token_ids=(2,)), 0.0)
    queue.add(Draft(epoch=0, base_position=2, token_ids=(1,)), 0.0)
    assert queue.take(9) == Work(epoch=1, position=1, token_ids=(2,))
    assert queue.stale_tokens == 2


def test_a_duplicate_changes_nothing() -> None:
    queue, _ = coupled(7)
    for _ in range(2):
        queue.add(Draft(epoch=0, base_position=1, token_ids=(1, 2)), 0.0)
    queue.add(Draft(epoch=0, base_position=2, token_ids=(2, 3)), 0.0)
    assert queue.take(9) == Work(epoch=0, position=1, token_ids=(1, 2, 3))
    assert queue.stale_tokens == 0


def test_a_gap_kills_the_epoch() -> None:
    queue, _ = coupled(7)
    queue.add(Draft(epoch=0, base_position=1, token_ids=(1,)), 0.0)
    queue.add(Draft(epoch=0, base_position=3, token_ids=(3,)), 0.0)
    assert not queue.has_work
    assert queue.stale_tokens == 2


def test_the_cloud_may_go_ahead_of_the_edge() -> None:
    """Assist: a late frame is compared with what the cloud committed itself."""
    queue, committed = coupled(7)
    committed += [1, 2, 3]
    queue.add(Draft(epoch=0, base_position=1, token_ids=(1, 2)), 0.0)
    assert not queue.has_work
    queue.add(Draft(epoch=0, base_position=3, token_ids=(3, 4)), 0.0)
    assert queue.take(9) == Work(epoch=0, position=4, token_ids=(4,))


def test_whole_rounds_wait_for_their_end() -> None:
    queue, committed = coupled(7, whole=True)
    queue.add(Draft(epoch=0, base_position=1, token_ids=(1, 2)), 0.0)
    assert not queue.has_work
    queue.add(Draft(epoch=0, base_position=3, token_ids=(3,), end_of_round=True), 0.0)
    queue.add(Draft(epoch=0, base_position=4, token_ids=(4,)), 0.0)
    assert queue.take(9) == Work(epoch=0, position=1, token_ids=(1, 2, 3))
    committed += [1, 2, 3, 4]
    queue.judged()
    assert not queue.has_work
    queue.add(Draft(epoch=0, base_position=5, token_ids=(5,), end_of_round=True), 0.0)
    assert queue.take(9) == Work(epoch=0, position=5, token_ids=(5,))


def test_a_rejection_ends_the_epoch() -> None:
    queue, _ = rejected_at_two()
    assert queue.awaiting_recovery
    assert queue.stale_tokens == 1  # 5; 4 was judged
    queue.add(Draft(epoch=0, base_position=4, token_ids=(6,), draft_probs=(0.5,)), 0.0)
    assert not queue.has_work
    assert queue.stale_tokens == 2


def test_recovery_by_a_forced_head_alone_then_drafts() -> None:
    queue, committed = rejected_at_two()
    assert queue.add(Draft(epoch=1, base_position=2, token_ids=(9,), num_forced=1), 0.0) == 9
    committed.append(9)
    assert not queue.awaiting_recovery
    assert not queue.has_work
    assert (
        queue.add(Draft(epoch=1, base_position=3, token_ids=(8,), draft_probs=(0.5,)), 0.0) is None
    )
    assert queue.take(9) == Work(epoch=1, position=3, token_ids=(8,), draft_probs=(0.5,))


def test_a_repeated_forced_head_is_committed_once() -> None:
    queue, committed = rejected_at_two()
    frame = Draft(epoch=1, base_position=2, token_ids=(9, 8), draft_probs=(0.5,), num_forced=1)
    assert queue.add(frame, 0.0) == 9
    committed.append(9)
    assert queue.add(frame, 0.0) is None
    longer = Draft(
        epoch=1, base_position=2, token_ids=(9, 8, 7), draft_probs=(0.5, 0.25), num_forced=1
    )
    assert queue.add(longer, 0.0) is None
    assert queue.take(9) == Work(epoch=1, position=3, token_ids=(8, 7), draft_probs=(0.5, 0.25))


@pytest.mark.parametrize(
    "frame",
    [
        Draft(epoch=1, base_position=2, token_ids=(9,), draft_probs=(0.5,)),  # not forced
        Draft(epoch=1, base_position=1, token_ids=(9,), draft_probs=(), num_forced=1),  # elsewhere
        Draft(epoch=1, base_position=3, token_ids=(9,), draft_probs=(), num_forced=1),
        Draft(1, 3, probe=2),
    ],
)
def test_nothing_else_recovers(frame: Draft) -> None:
    queue, _committed = rejected_at_two()
    assert queue.add(frame, 0.0) is None
    assert queue.awaiting_recovery
    assert not queue.has_work
    assert queue.add(Draft(epoch=2, base_position=2, token_ids=(9,), num_forced=1), 0.0) == 9


def test_a_forced_head_without_a_rejection_is_dropped() -> None:
    queue, _ = split(7, 7)
    assert (
        queue.add(
            Draft(epoch=0, base_position=2, token_ids=(9, 8), draft_probs=(0.5,), num_forced=1), 0.0
        )
        is None
    )
    assert not queue.has_work
    assert queue.stale_tokens == 2


def test_probes_of_a_recovery() -> None:
    queue, _committed = rejected_at_two()
    queue.add(Draft(1, 2, probe=2), 4.0)
    work = Work(1, 2, probe=2, arrived_s=4.0)
    assert queue.take(9) == queue.take(9) == work
    queue.judged(rejected=True)
    assert not queue.has_work
    queue.add(Draft(1, 2, probe=2), 5.0)  # a repeated frame: answered already
    assert not queue.has_work
    queue.add(Draft(2, 2, probe=3), 6.0)
    assert queue.take(9) == Work(2, 2, probe=3, arrived_s=6.0)


def test_a_probe_behind_a_forced_head() -> None:
    queue, committed = rejected_at_two()
    committed.append(
        queue.add(Draft(epoch=1, base_position=2, token_ids=(9,), num_forced=1), 0.0) or 0
    )
    queue.add(Draft(1, 3, probe=1), 2.0)
    assert queue.take(9) == Work(1, 3, probe=1, arrived_s=2.0)


def test_a_probe_of_a_committed_position_is_ignored() -> None:
    queue, committed = coupled(7)
    queue.add(Draft(0, 1, probe=1), 0.0)
    assert queue.has_work
    committed.append(5)
    assert not queue.has_work
    queue.add(Draft(0, 1, probe=1), 0.0)
    assert not queue.has_work


def test_the_answer_to_an_opening_probe() -> None:
    """Epoch 0 was not used, so the recovered token comes in it."""
    queue, _ = split(7, 7)
    queue.judged(rejected=True)
    assert queue.epoch == 0
    assert queue.add(Draft(epoch=0, base_position=2, token_ids=(9,), num_forced=1), 0.0) == 9


frames = st.builds(
    Draft,
    epoch=st.integers(0, 3),
    base_position=st.integers(1, 8),
    token_ids=st.lists(st.integers(0, 2), max_size=3).map(tuple),
    num_forced=st.integers(0, 1),
    end_of_round=st.booleans(),
    probe=st.integers(0, 2),
)
steps = st.one_of(frames, st.sampled_from(["judge", "reject", "commit"]))


@given(st.sampled_from(VerificationMode), st.booleans(), st.lists(steps, max_size=30))
def test_whatever_comes_work_starts_at_the_first_uncommitted_position(
    mode: VerificationMode, whole: bool, script: list[object]
) -> None:
    committed = [0]
    queue = DraftQueue(mode, committed, verify_whole_rounds=whole)
    for step in script:
        if isinstance(step, Draft):
            num_forced = min(step.num_forced, len(step.token_ids))
            probs = (0.5,) * (len(step.token_ids) - num_forced)
            frame = Draft(
                epoch=step.epoch,
                base_position=step.base_position,
                token_ids=step.token_ids,
                draft_probs=probs if mode is SPLIT else (),
                num_forced=num_forced if mode is SPLIT else 0,
                end_of_round=step.end_of_round,
                probe=0 if step.token_ids else 1 + step.probe,
            )
            recovered = queue.add(frame, 0.0)
            if recovered is not None:
                assert mode is SPLIT
                assert frame.base_position == len(committed)
                committed.append(recovered)
        elif step == "commit":
            committed.append(1)
        else:
            work = queue.take(2)
            assert (work is not None) == queue.has_work
            if work is None:
                continue
            assert work.position == len(committed)
            assert bool(work.token_ids) != bool(work.probe)
            if step == "judge":
                committed += work.token_ids
                committed += (2,) if mode is COUPLED else ()
            queue.judged(rejected=step == "reject" and mode is SPLIT)
        assert queue.stale_tokens >= 0


def test_a_step_takes_no_more_than_the_edge_asks_for() -> None:
    queue, committed = split(7)
    queue.add(
        Draft(epoch=0, base_position=1, token_ids=(1, 2, 3), draft_probs=(0.5,) * 3, step_limit=2),
        0.0,
    )
    work = queue.take(9)
    assert work is not None
    assert work.token_ids == (1, 2)
    committed += [1, 2]
    queue.judged()
    queue.add(
        Draft(epoch=0, base_position=4, token_ids=(4, 5, 6), draft_probs=(0.5,) * 3), 0.0
    )  # says nothing: as before
    assert len(queue.take(9).token_ids) == 2  # type: ignore[union-attr]
    queue.add(
        Draft(epoch=0, base_position=7, token_ids=(7,), draft_probs=(0.5,), step_limit=8), 0.0
    )
    assert len(queue.take(9).token_ids) == 5  # type: ignore[union-attr]
