"""Forwards of few tokens, filled up to more where that makes them faster.

On a CPU the matrix kernels for one to three rows can be slower than those for four: with
SmolLM2-135M in fp32 on AVX2, oneDNN takes 35 ms for one token and 27 ms for four. Verification
forwards one token often, a recovered one ahead of its drafts. Where that was measured when the
worker started (step_costs.py), the scheduler fills shorter steps up with drafts that nobody judges.
"""

from collections.abc import Mapping

PADDED_TOKENS_MAX = 8
GAIN_MIN = 0.07  # of a step's time: below it padding is not worth its KV slots
GAIN_MIN_S = 5e-4  # and below it nothing is: noise, on a tiny model

Padding = Mapping[int, int]  # tokens of a step: tokens it is to be filled up to


def fastest(times_s: Mapping[int, float]) -> Padding:
    """What to fill up, and to how much.

    >>> fastest({1: 0.035, 2: 0.041, 3: 0.031, 4: 0.027, 5: 0.028})
    {1: 4, 2: 4, 3: 4}
    """
    padding = {}
    times_s = {count: seconds for count, seconds in times_s.items() if count <= PADDED_TOKENS_MAX}
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
