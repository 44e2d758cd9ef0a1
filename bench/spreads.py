"""Medians and quartiles."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """`n` values, by their quartiles. All are 0 for no values."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    n: int


def spread(values: Sequence[float]) -> Spread:
    """
    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(median=3.0, low=2.0, high=4.0, n=5)
    >>> spread([7.0])
    Spread(median=7.0, low=7.0, high=7.0, n=1)
    """
    if not values:
        return Spread(0.0, 0.0, 0.0, 0)
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def mean_absolute_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Of predictions, as a share of what was measured. Raises ValueError if there are none.

    >>> mean_absolute_error([11.0, 9.0], [10.0, 10.0])
    0.1
    """
    if not measured:
        raise ValueError("nothing was measured")
    pairs = zip(predicted, measured, strict=True)
    return statistics.fmean(abs(guess - value) / value for guess, value in pairs)


def first_difference(text: Sequence[int], reference: Sequence[int]) -> int | None:
    """The index of the first token that differs; None if the texts are equal.

    >>> first_difference([1, 2, 3], [1, 2, 4]), first_difference([1], [1, 2])
    (2, 1)
    """
    for index, (token_id, expected) in enumerate(zip(text, reference, strict=False)):
        if token_id != expected:
            return index
    return None if len(text) == len(reference) else min(len(text), len(reference))
