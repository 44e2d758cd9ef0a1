"""Which forwards are filled up."""

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
