"""The rules of a line, at times of the test's own choosing."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.wan.line import Line, LineConditions


def line(link: LineConditions, seed: int = 0) -> Line[int]:
    return Line(link, random.Random(seed))


def arrivals(line: Line[int]) -> list[tuple[int, float]]:
    """Everything under way, and when it arrives."""
    found = []
    while (next_s := line.next_s) is not None:
        assert line.pop(math.nextafter(next_s, -math.inf)) is None
        item = line.pop(next_s)
        assert item is not None
        found.append((item, next_s))
    return found


def test_delay_and_bandwidth_add_up() -> None:
    slow = line(LineConditions(delay_s=0.5, bandwidth_bps=8000))
    slow.push(1, 1000, 0.0)
    slow.push(2, 1000, 0.0)
    slow.push(3, 0, 0.0)
    slow.push(4, 500, 10.0)
    assert arrivals(slow) == [(1, 1.5), (2, 2.5), (3, 2.5), (4, 11.0)]


def test_without_conditions_all_arrives_at_once() -> None:
    free = line(LineConditions())
    free.push(1, 10**9, 3.0)
    assert arrivals(free) == [(1, 3.0)]
    assert free.next_s is None


@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 5000)), min_size=1, max_size=40),
    st.floats(0, 2),
    st.floats(0, 2),
    st.none() | st.floats(1e3, 1e6),
    st.integers(0, 5),
)
def test_never_early_never_overtaking_never_too_fast(
    pushes: list[tuple[float, int]],
    delay_s: float,
    jitter_s: float,
    bandwidth_bps: float | None,
    seed: int,
) -> None:
    subject = line(LineConditions(delay_s, jitter_s, bandwidth_bps=bandwidth_bps), seed)
    now_s, entered_s, leaves_s = 0.0, [], 0.0
    for number, (gap_s, num_bytes) in enumerate(pushes):
        now_s += gap_s
        entered_s.append(now_s)
        subject.push(number, num_bytes, now_s)
    found = arrivals(subject)
    assert [item for item, _ in found] == list(range(len(pushes)))
    times_s = [time_s for _, time_s in found]
    assert times_s == sorted(times_s)
    latest_s = 0.0
    for (_, num_bytes), start_s, time_s in zip(pushes, entered_s, times_s, strict=True):
        leaves_s = max(leaves_s, start_s) + (num_bytes * 8 / bandwidth_bps if bandwidth_bps else 0)
        latest_s = max(latest_s, leaves_s + delay_s + jitter_s)
        assert leaves_s + delay_s <= time_s <= latest_s


def test_jitter_spreads_and_its_seed_fixes_it() -> None:
    def delays_s(seed: int) -> list[float]:
        subject = line(LineConditions(0.1, 0.05), seed)
        for number in range(200):
            subject.push(number, 1, float(number))
        return [time_s - number for number, time_s in arrivals(subject)]

    first = delays_s(1)
    assert first == delays_s(1) != delays_s(2)
    assert 0.1 <= min(first) < 0.11
    assert 0.14 < max(first) <= 0.15 + 1e-9


def test_a_change_reaches_what_has_not_left() -> None:
    subject = line(LineConditions(1.0, bandwidth_bps=8))
    for number in (1, 2, 3):
        subject.push(number, 1, 0.0)  # leave at 1, 2, 3 s
    subject.set(LineConditions(0.5), 1.5)
    subject.push(4, 1, 1.6)
    assert arrivals(subject) == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.1)]


def test_a_shorter_delay_does_not_let_anything_overtake() -> None:
    subject = line(LineConditions(5.0))
    subject.push(1, 1, 0.0)
    subject.set(LineConditions(0.1), 1.0)
    subject.push(2, 1, 1.0)
    assert arrivals(subject) == [(1, 5.0), (2, 5.0)]


def test_what_is_held_is_sent_again_at_the_release() -> None:
    subject = line(LineConditions(1.0, bandwidth_bps=8))
    subject.push(1, 1, 0.0)
    subject.hold()
    subject.push(2, 1, 5.0)
    assert subject.next_s is None
    assert subject.pop(100.0) is None
    subject.release(100.0)
    assert arrivals(subject) == [(1, 102.0), (2, 103.0)]


def test_a_release_without_a_hold_changes_nothing() -> None:
    subject = line(LineConditions(1.0))
    subject.push(1, 1, 0.0)
    subject.release(0.5)
    assert arrivals(subject) == [(1, 1.0)]


def test_what_is_discarded_frees_its_turn() -> None:
    subject = line(LineConditions(1.0, bandwidth_bps=8))
    for number in (1, 2, 3):
        subject.push(number, 1, 0.0)
    subject.discard(lambda item: item < 3, 1.0)  # the first has left already
    assert arrivals(subject) == [(1, 2.0), (3, 3.0)]
    subject.push(4, 1, 9.0)
    subject.clear()
    assert arrivals(subject) == []


def test_symmetric_halves_the_round_trip() -> None:
    assert LineConditions.symmetric(0.05, 0.01, 1e6) == LineConditions(
        0.025, 0.01, bandwidth_bps=1e6
    )


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["delay_s", "jitter_s", "bandwidth_bps"])
def test_impossible_links_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        LineConditions(**{name: value})


def test_a_link_without_bandwidth_is_refused() -> None:
    with pytest.raises(ValueError, match="bandwidth_bps"):
        LineConditions(bandwidth_bps=0)
