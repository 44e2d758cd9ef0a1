"""What steps take, and which drafts a step is worth."""

from __future__ import annotations

import doctest

import pytest

from cloud_server.engine import step_costs
from cloud_server.engine.step_costs import StepCosts, best_drafts


def test_worked_examples() -> None:
    assert doctest.testmod(step_costs).failed == 0


def test_each_length_is_timed_after_a_first_run() -> None:
    calls: list[int] = []
    times_s = step_costs.measure(calls.append, (1, 4, 16))
    assert list(times_s) == [1, 4, 16]
    assert calls[:3] == [1, 4, 16]
    assert len(calls) == 3 * (1 + step_costs.REPEATS)


def test_more_tokens_never_take_less() -> None:
    costs = StepCosts({1: 0.035, 2: 0.041, 4: 0.027, 8: 0.030})
    times_s = [costs.seconds(count) for count in range(1, 12)]
    assert times_s == sorted(times_s)
    assert costs.seconds(1) == pytest.approx(0.027)


def test_costs_follow_what_steps_take() -> None:
    costs = StepCosts({1: 0.020, 8: 0.030})
    for _ in range(200):
        costs.observe(1, 0.026)
    assert costs.seconds(1) == pytest.approx(0.026, rel=0.02)
    assert costs.seconds(8) == pytest.approx(0.039, rel=0.02)


def test_a_step_that_hangs_moves_little() -> None:
    costs = StepCosts({1: 0.020, 8: 0.030})
    costs.observe(1, 30.0)
    assert costs.seconds(1) < 0.0211


def test_the_likelier_drafts_come_first() -> None:
    costs = StepCosts({1: 0.020, 4: 0.021, 5: 0.060})
    assert best_drafts(costs, 2, [(0.5, 8), (0.9, 8)]) == [0, 2]


def test_nobody_gets_more_than_there_is() -> None:
    costs = StepCosts({1: 0.020, 64: 0.021})
    assert best_drafts(costs, 3, [(0.9, 0), (0.9, 1), (0.2, 3)]) == [0, 1, 3]


def test_a_full_batch_is_plain_decoding() -> None:
    costs = StepCosts({1: 0.010, 32: 0.320})
    assert best_drafts(costs, 16, [(0.9, 8)] * 16) == [0] * 16
