"""Throughput without a simulation: the paper's closed form, and ours.

Ours is a renewal argument. From one recovered token to the next, nothing is random but the place
of the rejection: the edge and the cloud run as if every draft were accepted until they hear
otherwise. So one walk along the accepted chain gives the time C_j at which the edge has recovered
from a rejection of draft j, for every j; with S_j the probability that the first j drafts
are accepted,

    goodput = tokens / time = Σ_j S_j / (C_1 + Σ_{j ≥ 1} S_j (C_{j+1} − C_j)),   j from 0.

Exact for one session with constant costs, but for the end of the sum, which is extended
linearly, and bandwidth that verdicts have to share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from picospec.performance_chain import walk_accepted_chain
from picospec.performance_costs import Acceptance, Costs, Link, Scheme, check_acceptance

NEGLIGIBLE = 1e-3  # a chain this unlikely to be accepted so far is not walked on
PLACES_MIN, PLACES_MAX = 48, 160  # how far a likely one is
DRAFT_LENGTH_MAX = 8
RTT_MS_MAX = 10_000.0  # where the search for a break-even ends


@dataclass(frozen=True, slots=True)
class PaperPrediction:
    """The paper's model (arXiv 2603.19133) of one round of γ drafts."""

    sync_ms: float  # L_sync: everything in sequence
    async_ms: float  # L_async: drafting hidden behind network and verification
    bubble_ms: float  # T_bubble: the cloud's idle time
    tokens_a_round: float  # E[L], without a bonus token
    round_ms: float  # E[T]

    @property
    def tokens_per_s(self) -> float:
        """R = E[L] / E[T]."""
        return 1e3 * self.tokens_a_round / self.round_ms

    @property
    def speedup(self) -> float:
        """Over the synchronous scheme of the same draft length."""
        return self.sync_ms / self.round_ms


def paper_model(
    round_draft_ms: float,
    verify_ms: float,
    rtt_ms: float,
    alpha: float,
    draft_length: int,
    pre_verify_ms: float = 0.0,
) -> PaperPrediction:
    """The paper's closed form. `round_draft_ms` is T_d, for a whole round; `alpha` is a token's.

    Raises ConfigError if `alpha` is not a probability.

    >>> paper_model(100.0, 60.0, 40.0, alpha=1.0, draft_length=4).speedup  # 1 + (RTT + T_v) / T_d
    2.0
    """
    check_acceptance(alpha)
    sync_ms = round_draft_ms + rtt_ms + verify_ms
    async_ms = max(round_draft_ms, rtt_ms + verify_ms)
    whole = alpha**draft_length
    return PaperPrediction(
        sync_ms=sync_ms,
        async_ms=async_ms,
        bubble_ms=max(0.0, rtt_ms + verify_ms - round_draft_ms - pre_verify_ms),
        tokens_a_round=float(draft_length) if alpha == 1.0 else (1.0 - whole) / (1.0 - alpha),
        round_ms=whole * async_ms + (1.0 - whole) * sync_ms,
    )


def cloud_only(costs: Costs) -> float:
    """Tokens per second of the same engine decoding alone and streaming its tokens."""
    return 1e3 / (costs.step_ms(0) if costs.plain_ms is None else costs.plain_ms)


def predicted_goodput(costs: Costs, scheme: Scheme, link: Link, alpha: Acceptance) -> float:
    """Committed tokens per second of one session. Costs some ten microseconds to a few hundred.

    Raises ConfigError if `alpha` holds anything but probabilities.
    """
    places = check_acceptance(alpha)
    num_places = min(PLACES_MAX, max(PLACES_MIN, 3 * scheme.window, 3 * scheme.draft_length))
    survival = 1.0
    for place in range(num_places):
        survival *= places[min(place, len(places) - 1)]
        if survival < NEGLIGIBLE:
            num_places = place + 1
            break
    chain = walk_accepted_chain(costs, scheme, link, num_places)
    recovered_ms = chain.recovered_ms
    tokens, time_ms, survival = 0.0, recovered_ms[0], 1.0
    for place, (is_free, now_ms) in enumerate(zip(chain.is_free, recovered_ms, strict=True)):
        if place:
            time_ms += survival * (now_ms - recovered_ms[place - 1])
        tokens += survival
        if not is_free:
            survival *= places[min(place, len(places) - 1)]
    rate = places[-1] * (1.0 - _free_share(chain.is_free)) + _free_share(chain.is_free)
    half = len(recovered_ms) // 2
    slope_ms = (recovered_ms[-1] - recovered_ms[half]) / max(1, len(recovered_ms) - 1 - half)
    if rate >= 1.0:
        return 1e3 / slope_ms if survival > 0.0 else 1e3 * tokens / time_ms
    more = survival / (1.0 - rate)
    return 1e3 * (tokens + more) / (time_ms + more * slope_ms)


def _free_share(is_free: Sequence[bool]) -> float:
    """Of the places in the later half, those where the cloud's own token stands."""
    later = is_free[len(is_free) // 2 :]
    return sum(later) / len(later)


def best_draft_length(
    costs: Costs,
    scheme: Scheme,
    link: Link,
    alpha: Acceptance,
    draft_length_max: int = DRAFT_LENGTH_MAX,
) -> tuple[int, float]:
    """The draft length of highest predicted goodput, the shortest of equals, and the goodput."""
    goodputs = {
        length: predicted_goodput(
            costs, dataclasses.replace(scheme, draft_length=length), link, alpha
        )
        for length in range(1, draft_length_max + 1)
    }
    best = max(goodputs, key=lambda length: goodputs[length])
    return best, goodputs[best]


def break_even_rtt_ms(
    costs: Costs,
    scheme: Scheme,
    alpha: Acceptance,
    link: Link | None = None,
    draft_length_max: int | None = None,
) -> float | None:
    """The RTT up to which speculation is no slower than cloud-only decoding.

    None if it is slower at any; infinity if at none below RTT_MS_MAX. With `draft_length_max`,
    each RTT is met with its best draft length. `link` gives everything but the RTT.
    """
    template = link if link is not None else Link()
    wanted = cloud_only(costs)

    def wins(rtt_ms: float) -> bool:
        at = dataclasses.replace(template, rtt_ms=rtt_ms)
        if draft_length_max is not None:
            return best_draft_length(costs, scheme, at, alpha, draft_length_max)[1] >= wanted
        return predicted_goodput(costs, scheme, at, alpha) >= wanted

    low, high = 0.0, 50.0
    if not wins(low):
        return None
    while wins(high):
        low, high = high, 2 * high
        if high > RTT_MS_MAX:
            return math.inf
    while high - low > 0.1:
        middle = (low + high) / 2
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low
