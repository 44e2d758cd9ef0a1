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

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from picospec.performance.chain import AcceptedChain
from picospec.performance.costs import Acceptance, Costs, Network, Scheme, check_acceptance

NEGLIGIBLE = 1e-3  # a chain this unlikely to be accepted so far is not walked on
PLACES_MIN, PLACES_MAX = 48, 192  # how far a likely one is
DRAFT_LENGTH_MAX = 8
RTT_MS_MAX = 10_000.0  # where the search for a break-even ends


@dataclass(frozen=True, slots=True)
class PaperPrediction:
    """The paper's model (arXiv 2603.19133) of one round of γ drafts."""

    sync_ms: float  # L_sync: everything in sequence
    async_ms: float  # L_async: drafting hidden behind network and verification
    bubble_ms: float  # T_bubble: the cloud's idle time
    tokens_per_round: float  # E[L], without a bonus token
    round_ms: float  # E[T]

    @property
    def tokens_per_s(self) -> float:
        """R = E[L] / E[T]."""
        return 1e3 * self.tokens_per_round / self.round_ms

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
        tokens_per_round=float(draft_length) if alpha == 1.0 else (1.0 - whole) / (1.0 - alpha),
        round_ms=whole * async_ms + (1.0 - whole) * sync_ms,
    )


def cloud_only(costs: Costs) -> float:
    """Tokens per second of the same engine decoding alone and streaming its tokens."""
    return 1e3 / (costs.step_ms(0) if costs.plain_ms is None else costs.plain_ms)


def predicted_goodput(costs: Costs, scheme: Scheme, link: Network, alpha: Acceptance) -> float:
    """Committed tokens per second of one session. Costs some ten microseconds to a few hundred.

    Raises ConfigError if `alpha` holds anything but probabilities.
    """
    places = check_acceptance(alpha)
    num_places_max = min(PLACES_MAX, max(PLACES_MIN, 4 * scheme.window, 4 * scheme.draft_length))
    chain = AcceptedChain(costs, scheme, link)
    tokens, time_ms, survival, known_ms = 0.0, 0.0, 1.0, 0.0
    for place in range(num_places_max):
        while place >= len(chain.recovered_ms):
            chain.step()
        time_ms += survival * (chain.recovered_ms[place] - known_ms)
        tokens += survival
        known_ms = chain.recovered_ms[place]
        if not chain.is_free[place]:
            survival *= places[min(place, len(places) - 1)]
        if survival < NEGLIGIBLE:
            return 1e3 * tokens / time_ms
    recovered_ms = chain.recovered_ms[:num_places_max]
    next_ms, slope_ms = _line_through_the_end(recovered_ms)
    later_free = chain.is_free[num_places_max // 2 : num_places_max]
    free_share = sum(later_free) / len(later_free)
    rate = free_share + (1.0 - free_share) * places[-1]
    if rate >= 1.0:
        return 1e3 / slope_ms
    time_ms += survival * (next_ms - recovered_ms[-1] + slope_ms * rate / (1.0 - rate))
    return 1e3 * (tokens + survival / (1.0 - rate)) / time_ms


def _line_through_the_end(times_ms: Sequence[float]) -> tuple[float, float]:
    """The next time to be expected, and the slope: rounds make steps, so quarters are averaged.

    >>> _line_through_the_end([0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0])
    (80.0, 10.0)
    """
    size = max(1, len(times_ms) // 4)
    last_ms = sum(times_ms[-size:]) / size
    slope_ms = (last_ms - sum(times_ms[-2 * size : -size]) / size) / size
    return last_ms + slope_ms * (size + 1) / 2, slope_ms


def best_draft_length(
    costs: Costs,
    scheme: Scheme,
    link: Network,
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
    link: Network | None = None,
    draft_length_max: int | None = None,
) -> float | None:
    """The RTT up to which speculation is no slower than cloud-only decoding.

    None if it is slower at any; infinity if at none below RTT_MS_MAX. With `draft_length_max`,
    each RTT is met with its best draft length. `link` gives everything but the RTT.
    """
    template = link if link is not None else Network()
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
