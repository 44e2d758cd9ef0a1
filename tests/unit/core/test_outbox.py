"""Frames that wait to be written, and those that a newer epoch drops."""

from __future__ import annotations

import doctest

import pytest

from picospec.protocol import outbox
from picospec.protocol.codec import EdgeEncoder
from picospec.protocol.messages import Draft, EdgeFrame, Finish
from picospec.protocol.outbox import MAX_FRAMES, Outbox, OutboxFull


def a_draft(epoch: int, position: int) -> Draft:
    return Draft(epoch=epoch, base_position=position, token_ids=(7,))


def payloads(box: Outbox) -> list[bytes]:
    return [box.take() for _ in range(len(box))]


def test_worked_examples() -> None:
    assert doctest.testmod(outbox).failed == 0


def test_frames_leave_in_order_as_the_encoder_makes_them() -> None:
    frames: list[EdgeFrame] = [a_draft(0, 5), a_draft(0, 6), Finish()]
    box, encoder = Outbox(), EdgeEncoder()
    for frame in frames:
        box.put(frame)
    assert payloads(box) == [encoder.to_bytes(frame) for frame in frames]


def test_of_an_older_epoch_only_the_first_frame_stays() -> None:
    box, encoder = Outbox(), EdgeEncoder()
    expected = []
    for epoch in range(3):
        for position in (5, 6, 7):
            frame = a_draft(epoch, position)
            box.put(frame)
            payload = encoder.to_bytes(frame)
            if position == 5 or epoch == 2:
                expected.append(payload)
    assert payloads(box) == expected


def test_what_left_before_is_not_missed() -> None:
    box = Outbox()
    box.put(a_draft(0, 5))
    assert box.take()
    box.put(a_draft(1, 5))
    assert len(box) == 1


def test_it_is_bounded() -> None:
    box = Outbox()
    for position in range(MAX_FRAMES):
        box.put(a_draft(0, position))
    with pytest.raises(OutboxFull):
        box.put(Finish())
