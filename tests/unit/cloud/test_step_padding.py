"""Which forwards are filled up, and how they are timed."""

from __future__ import annotations

import doctest

from cloud_server.engine import step_padding


def test_worked_examples() -> None:
    assert doctest.testmod(step_padding).failed == 0


def test_longer_is_slower_pads_nothing() -> None:
    assert step_padding.fastest({1: 0.040, 2: 0.049, 3: 0.053, 4: 0.058}) == {}


def test_small_gains_and_tiny_models_pad_nothing() -> None:
    assert step_padding.fastest({1: 0.0400, 2: 0.0385}) == {}
    assert step_padding.fastest({1: 0.0004, 2: 0.0001}) == {}


def test_each_length_is_timed_after_a_first_run() -> None:
    calls: list[int] = []
    times_s = step_padding.measure(calls.append)
    assert list(times_s) == list(range(1, step_padding.MEASURED_TOKENS_MAX + 1))
    assert calls[: len(times_s)] == list(times_s)
    assert len(calls) == len(times_s) * (1 + step_padding.REPEATS)
