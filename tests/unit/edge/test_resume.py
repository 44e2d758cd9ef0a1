"""When a lost generation is taken up again, without a link or a clock."""

from __future__ import annotations

import pytest

from edge_agent.resume import BACKOFF_MAX_S, Resumption


def delays_of(resumption: Resumption, *times: float) -> list[float | None]:
    return [resumption.delay_s(now) for now in times]


def test_pauses_double_up_to_a_limit() -> None:
    resumption = Resumption(attempts_max=9, timeout_s=1000.0)
    delays = delays_of(resumption, *(10.0 * n for n in range(9)))
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2] + [BACKOFF_MAX_S] * 3)


def test_attempts_are_bounded() -> None:
    resumption = Resumption(attempts_max=2, timeout_s=1000.0)
    assert delays_of(resumption, 0.0, 1.0, 2.0, 3.0) == [0.1, 0.2, None, None]
    assert resumption.attempts == 2


def test_without_attempts_the_first_loss_is_the_end() -> None:
    assert Resumption(attempts_max=0, timeout_s=1000.0).delay_s(0.0) is None


def test_the_time_from_the_first_loss_is_bounded_pause_included() -> None:
    resumption = Resumption(attempts_max=100, timeout_s=2.0)
    assert delays_of(resumption, 50.0, 51.0, 51.6) == [0.1, 0.2, 0.4]
    assert resumption.delay_s(51.3) is None  # 0.8 s later 2.1 s would have passed
    assert Resumption(attempts_max=100, timeout_s=0.05).delay_s(0.0) is None


def test_a_verdict_gives_all_attempts_back() -> None:
    resumption = Resumption(attempts_max=2, timeout_s=10.0)
    under_way = [resumption.under_way]
    delays_of(resumption, 0.0, 5.0)
    under_way.append(resumption.under_way)
    resumption.made_progress()
    assert [*under_way, resumption.under_way] == [False, True, False]
    assert delays_of(resumption, 100.0, 101.0, 102.0) == [0.1, 0.2, None]
