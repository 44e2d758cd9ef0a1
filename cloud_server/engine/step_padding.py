"""Forwards of few tokens, filled up to more where that makes them faster.

On a CPU the matrix kernels for one to three rows can be slower than those for four: with
SmolLM2-135M in fp32 on AVX2, oneDNN takes 35 ms for one token and 27 ms for four. Verification
forwards one token often, a recovered one ahead of its drafts. So forwards of 1, 2, 3 ... tokens are
timed when the worker starts, and the scheduler fills shorter steps up with drafts that nobody
judges.
"""

import statistics
import time
from collections.abc import Callable, Mapping

MEASURED_TOKENS_MAX = 8
REPEATS = 5
GAIN_MIN = 0.07  # of a step's time: below it padding is not worth its KV slots
GAIN_MIN_S = 5e-4  # and below it nothing is: noise, on a tiny model

Padding = Mapping[int, int]  # tokens of a step: tokens it is to be filled up to


def measure(forward: Callable[[int], object]) -> dict[int, float]:
    """Median seconds of `forward(n)`, by n; the lengths take turns."""
    counts = range(1, MEASURED_TOKENS_MAX + 1)
    times_s: dict[int, list[float]] = {count: [] for count in counts}
    for count in counts:
        forward(count)  # kernels are chosen and buffers made
    for _ in range(REPEATS):
        for count in counts:
            started_s = time.perf_counter()
            forward(count)
            times_s[count].append(time.perf_counter() - started_s)
    return {count: statistics.median(each) for count, each in times_s.items()}


def fastest(times_s: Mapping[int, float]) -> Padding:
    """What to fill up, and to how much.

    >>> fastest({1: 0.035, 2: 0.041, 3: 0.031, 4: 0.027, 5: 0.028})
    {1: 4, 2: 4, 3: 4}
    """
    padding = {}
    for count, own_s in times_s.items():
        best = min((other for other in times_s if other >= count), key=lambda n: times_s[n])
        gain_s = own_s - times_s[best]
        if gain_s > max(GAIN_MIN * own_s, GAIN_MIN_S):
            padding[count] = best
    return padding


def at_least(min_tokens: int) -> Padding:
    """Every step of fewer tokens filled up to `min_tokens`; 1 pads nothing.

    >>> at_least(3)
    {1: 3, 2: 3}
    """
    return dict.fromkeys(range(1, min_tokens), min_tokens)
