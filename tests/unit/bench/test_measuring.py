"""The benchmark's arithmetic: what frames tell, what a stopwatch tells, and in which order."""

from __future__ import annotations

import numpy as np
import pytest

from bench.metering import MeteredLink, steps_ms, traffic
from bench.results import Record
from bench.spreads import first_difference, mean_absolute_error, spread
from edge_agent.link import ScriptedLink
from picospec.protocol import codec
from picospec.protocol.messages import (
    CloudFrame,
    Draft,
    EdgeFrame,
    Finish,
    FinishReason,
    Rejection,
    Verdict,
)
from tests.support.builders import make_opened

REJECTION = Rejection(np.array([3, 4], np.int32), np.array([0.5, 0.5], np.float32))


def test_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]).low == 2.0
    assert spread([2.0, 4.0]).median == 3.0
    assert spread([]).n == 0


def test_errors_are_relative_to_what_was_measured() -> None:
    assert mean_absolute_error([5.0, 30.0], [10.0, 20.0]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="nothing"):
        mean_absolute_error([], [])


def test_texts_differ_where_one_ends() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([9], [1, 2]) == 0


def test_speed_leaves_the_first_commit_out() -> None:
    record = Record("a", 0, token_ids=[1, 2, 3, 4, 5], ttft_s=9.0, seconds=2.0, num_first=1)
    assert record.tokens_per_s == 2.0
    assert Record("a", 0, token_ids=[], ttft_s=0.0, seconds=0.0, error="lost").tokens_per_s == 0.0


def test_drafts_after_a_rejection_say_nothing_about_acceptance() -> None:
    record = Record("a", 0, token_ids=[], ttft_s=0.0, seconds=0.0, drafted=10, accepted=3, misses=1)
    assert record.acceptance == 0.75


async def test_a_metered_link_keeps_every_frame_and_counts_it() -> None:
    first = Draft(0, 5, token_ids=(1, 2, 3), draft_probs=(0.5, 0.5, 0.5), end_of_round=True)
    second = Draft(1, 7, token_ids=(4, 8), draft_probs=(0.5,), num_forced=1)
    accepted = Verdict(0, 5, num_accepted=3, num_draft_tokens=3, queue_us=100, compute_us=50_000)
    rejected = Verdict(
        1, 8, rejection=REJECTION, num_draft_tokens=1, queue_us=300, compute_us=40_000
    )
    scripted = ScriptedLink()
    link = MeteredLink(scripted)
    stream = link.open_stream("one")
    frames: tuple[EdgeFrame, ...] = (first, second, Finish())
    for frame in frames:
        stream.send(frame)
    scripted.streams[0].feed(make_opened(first_position=5), accepted, rejected, None)
    while await stream.receive() is not None:
        pass
    assert stream.bytes_up == scripted.streams[0].bytes_up

    seen = traffic(link.sent, link.received)
    assert seen.drafts_sent == 4  # the forced token is none
    encoder = codec.EdgeEncoder()
    assert seen.draft_bytes == sum(len(encoder.to_bytes(each)) for each in (first, second))
    assert (seen.verdicts, seen.drafted, seen.accepted, seen.rejections) == (2, 4, 3, 1)
    assert seen.misses == 1
    assert seen.outcomes == "+++-"
    assert link.first_draft_s == 0.0  # the stream's first frame
    assert link.restarts_s == []  # the head was sent before the rejection came
    assert seen.rejection_bytes == len(codec.encode_cloud(rejected).SerializeToString())
    assert (seen.queue_us, seen.compute_us) == (200.0, 45_000.0)
    link.reset()
    assert traffic(link.sent, link.received).verdicts == 0


async def test_a_restart_is_timed_from_the_rejection_before_it() -> None:
    scripted = ScriptedLink()
    link = MeteredLink(scripted)
    stream = link.open_stream("one")
    scripted.streams[0].feed(Verdict(0, 5, rejection=REJECTION), Verdict(1, 6, num_accepted=1))
    await stream.receive()
    stream.send(Draft(1, 5, token_ids=(4,), num_forced=1))
    await stream.receive()
    stream.send(Draft(1, 6, token_ids=(4,), draft_probs=(0.5,)))
    [restart_s] = link.restarts_s
    [metered] = link.streams
    assert restart_s == metered.sent_s[0] - metered.received_s[0]


def test_the_first_token_has_an_outcome_too() -> None:
    first = Verdict(0, 5, token_ids=(7,))
    rest = Verdict(0, 6, num_accepted=2, num_draft_tokens=3)
    assert (
        traffic([Draft(0, 5, token_ids=(7,), draft_probs=(0.5,))], [first, rest]).outcomes == "+++-"
    )
    assert (
        traffic([Draft(0, 5, token_ids=(8,), draft_probs=(0.5,))], [first, rest]).outcomes == "-++-"
    )
    assert traffic([], [first]).outcomes == "-"
    last = Verdict(0, 6, num_accepted=1, num_draft_tokens=3, finish_reason=FinishReason.STOP)
    assert traffic([], [first, last]).outcomes == "-+"


def test_a_draft_that_a_row_judged_took_no_place_in_the_forward() -> None:
    verdicts: list[CloudFrame] = [
        make_opened(first_position=5),
        Verdict(0, 5, token_ids=(7,), num_forwards=1, compute_us=90_000),
        # The first token was forwarded ahead, so a row judged the first of three.
        Verdict(0, 6, num_accepted=3, num_draft_tokens=3, num_forwards=2, compute_us=30_000),
        Verdict(0, 9, num_draft_tokens=1, num_forwards=0, rejection=REJECTION),  # a row alone
        # The recovered token came with two drafts.
        Verdict(1, 10, num_accepted=2, num_draft_tokens=2, num_forwards=1, compute_us=28_000),
    ]
    assert steps_ms(verdicts, keeps_rows=True) == [(2, 30.0), (2, 28.0)]
    assert steps_ms(verdicts, keeps_rows=False) == [(3, 30.0), (2, 28.0)]
