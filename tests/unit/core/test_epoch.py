"""Worked examples of the account of epochs."""

from __future__ import annotations

import doctest

from picospec.protocol import epoch


def test_worked_examples() -> None:
    assert doctest.testmod(epoch).failed == 0
