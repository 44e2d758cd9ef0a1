"""Live estimates of what speculation costs and brings, from what an edge sees of it.

Sums that decay with time, so that their ratios follow a change of round trip or load within a few
seconds; time is passed in by `age`. What is remembered survives silence: the ratios of decayed sums
stay, so a new chat starts with what the last one knew.
"""

import math
from dataclasses import dataclass, field

from picospec.performance.costs import Costs, Network, VerifyCost

TIME_CONSTANT_S = 1.5  # of speeds and round trips
ACCEPTANCE_TIME_CONSTANT_S = 10.0  # it hangs on the text, and is noisy
SILENCE_S = 1.0  # ages no more than this, however long it lasts

PLACES = 8  # the last stands for all beyond
ACCEPTANCE_PRIOR, ACCEPTANCE_PRIOR_WEIGHT = 0.7, 2.0
PLACE_PRIOR_WEIGHT = 20.0  # of the mean over all places, in each
SLOPE_PRIOR = 0.06  # of a draft in a step's cost, over the cost without any
SPREAD_MIN, SPREAD_PER_STEP_MIN = 4.0, 0.2  # squared drafts, to measure that slope
LOAD_CHANGE = 1.25  # of the base: more makes the slope doubtful


@dataclass(slots=True)
class DecayingMean:
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total += value * weight
        self.weight += weight

    def decay(self, factor: float) -> None:
        self.total *= factor
        self.weight *= factor

    @property
    def known(self) -> bool:
        return self.weight > 0.0

    def mean(self, default: float = 0.0) -> float:
        return self.total / self.weight if self.weight > 0.0 else default


@dataclass(slots=True)
class VerifyCostEstimate:
    """An engine step's milliseconds over the drafts forwarded behind its first token.

    Linear regression with forgetting: base · (1 + slope · drafts). Base and slope are remembered
    apart, since steps that are all alike tell the base only. A forward of one token may cost less
    than the line says and has its own mean.
    """

    steps: DecayingMean = field(default_factory=DecayingMean)  # ms
    drafts: DecayingMean = field(default_factory=DecayingMean)
    squares: DecayingMean = field(default_factory=DecayingMean)  # drafts²
    products: DecayingMean = field(default_factory=DecayingMean)  # drafts · ms
    plain: DecayingMean = field(default_factory=DecayingMean)  # ms without drafts
    slope: float = SLOPE_PRIOR  # of a draft, over the base
    sure_base_ms: float | None = None  # the base when the slope was last measured

    def add(self, num_drafts: int, step_ms: float) -> None:
        if not num_drafts:
            self.plain.add(step_ms)
            return
        self.steps.add(step_ms)
        self.drafts.add(num_drafts)
        self.squares.add(num_drafts**2)
        self.products.add(num_drafts * step_ms)
        self._measure_slope()

    def decay(self, factor: float) -> None:
        for sums in (self.steps, self.drafts, self.squares, self.products, self.plain):
            sums.decay(factor)

    @property
    def known(self) -> bool:
        return self.steps.known or self.plain.known

    @property
    def is_doubtful(self) -> bool:
        """Whether the slope was never measured, or under another load."""
        if self.sure_base_ms is None:
            return True
        ratio = self._base_ms() / self.sure_base_ms
        return not 1.0 / LOAD_CHANGE < ratio < LOAD_CHANGE

    def cost(self) -> VerifyCost:
        """To be asked only when something is known."""
        base_ms = self._base_ms()
        slope_ms = self.slope * base_ms
        # A plain step is measured, unless the line is below it: then load has gone.
        plain_ms = min(self.plain.mean(base_ms), base_ms + slope_ms)
        return VerifyCost.affine(base_ms, slope_ms, plain_ms)

    def _base_ms(self) -> float:
        is_stale = self.steps.weight < min(1.0, self.plain.weight / 4.0)
        if is_stale or not self.steps.known:
            return self.plain.mean()
        return self.steps.mean() / (1.0 + self.slope * self.drafts.mean())

    def _measure_slope(self) -> None:
        """Where the steps differ enough in their drafts to tell it."""
        step_ms, drafts = self.steps.mean(), self.drafts.mean()
        spread = self.squares.mean() - drafts**2
        if spread * self.steps.weight < SPREAD_MIN or spread < SPREAD_PER_STEP_MIN:
            return
        slope_ms = (self.products.mean() - drafts * step_ms) / spread
        slope_ms = min(max(slope_ms, 0.0), step_ms / (1.0 + drafts))
        base_ms = step_ms - slope_ms * drafts
        self.slope, self.sure_base_ms = slope_ms / base_ms, base_ms


class LiveEstimates:
    """Of one edge: its drafter, its link, its cloud. Shared by its generations."""

    def __init__(self) -> None:
        self._drafting = DecayingMean()  # ms per token
        self._round_trip = DecayingMean()  # ms
        self._contention = DecayingMean()  # ms, 0 without evidence
        self._verify = VerifyCostEstimate()
        self._acceptance = [DecayingMean() for _ in range(PLACES)]
        self._aged_s: float | None = None

    def age(self, now: float) -> None:
        """Forget what has become old; `now` in seconds, of one clock for all generations."""
        passed_s = 0.0 if self._aged_s is None else min(max(0.0, now - self._aged_s), SILENCE_S)
        self._aged_s = now if self._aged_s is None else max(now, self._aged_s)
        factor = math.exp(-passed_s / TIME_CONSTANT_S)
        for sums in (self._drafting, self._round_trip, self._contention):
            sums.decay(factor)
        self._verify.decay(factor)
        factor = math.exp(-passed_s / ACCEPTANCE_TIME_CONSTANT_S)
        for place in self._acceptance:
            place.decay(factor)

    def drafted(self, num_tokens: int, seconds: float) -> None:
        if num_tokens > 0:
            self._drafting.add(1e3 * seconds / num_tokens, num_tokens)

    def round_trip(self, seconds: float) -> None:
        self._round_trip.add(1e3 * max(0.0, seconds))

    def judged(self, place: int, num_judged: int, num_accepted: int) -> None:
        """`num_judged` drafts from `place` of their chain on (0 = after a recovered token)."""
        for index in range(place, place + num_accepted):
            self._acceptance[min(index, PLACES - 1)].add(1.0)
        if num_accepted < num_judged:
            self._acceptance[min(place + num_accepted, PLACES - 1)].add(0.0)

    def stepped(self, num_drafts: int, seconds: float) -> None:
        """An engine step that forwarded `num_drafts` behind its first token."""
        self._verify.add(num_drafts, 1e3 * seconds)

    def queued(self, seconds: float) -> None:
        """What the newest draft of a step waited, where the step took all there was and the
        drafter was free to go on: another came within a drafting time, so what is beyond was
        spent on other sessions."""
        self._contention.add(max(0.0, 1e3 * seconds - self._drafting.mean()))

    @property
    def known(self) -> bool:
        """Whether there is enough to plan by."""
        return self._drafting.known and self._round_trip.known and self._verify.known

    @property
    def is_slope_doubtful(self) -> bool:
        """Whether steps of another length would tell something new."""
        return self._verify.is_doubtful

    def costs(self) -> Costs:
        """To be asked only when `known`."""
        draft_ms = max(1e-3, self._drafting.mean())
        return Costs(
            draft_ms=draft_ms,
            verify_ms=self._verify.cost(),
            step_overhead_ms=self._contention.total / (1.0 + self._contention.weight),
        )

    def link(self) -> Network:
        return Network(rtt_ms=self._round_trip.mean())

    def acceptance(self) -> tuple[float, ...]:
        """By place in the chain."""
        total = sum(place.total for place in self._acceptance)
        weight = sum(place.weight for place in self._acceptance)
        mean = (total + ACCEPTANCE_PRIOR * ACCEPTANCE_PRIOR_WEIGHT) / (
            weight + ACCEPTANCE_PRIOR_WEIGHT
        )
        return tuple(
            (place.total + PLACE_PRIOR_WEIGHT * mean) / (place.weight + PLACE_PRIOR_WEIGHT)
            for place in self._acceptance
        )
