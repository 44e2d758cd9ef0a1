"""What an edge has learnt: its drafter's pace, its link, its cloud, and where drafting pays.

`Estimates` is the edge's; all its generations feed and read it, and `as_json` / `from_json` carry
it over a restart. Speeds are kept by *setting* (how many sessions share the cloud's batch, the
round trip, greedy or sampled) and by *arm* (the mode that drafts, or no drafting at all), in tokens
per second of one generation. Without drafts the round trip does not matter. Arms are compared by
what was measured, never by a model: whatever slows a generation down counts, the memory that
drafter and engine may share included.
"""

import enum
import math
from dataclasses import dataclass, field, replace
from typing import Any

from picospec.protocol.messages import VerificationMode

TIME_CONSTANT_S = 1.5  # of paces and round trips
STEP_GUESS_MS = 20.0
ACCEPTANCE_TIME_CONSTANT_S = 10.0  # it hangs on the text, and is noisy
ACCEPTANCE_PRIOR, ACCEPTANCE_PRIOR_WEIGHT = 0.7, 4.0
ACCEPTANCE_HOPED, ACCEPTANCE_HOPED_WEIGHT = 0.97, 4.0
DRAFTING_FORGOTTEN = 1e-7  # of a token's weight: after half a minute of answers without drafts
RATE_MEMORY_S = 20.0  # of generation time, in an arm's rate
STALE_RATE_S = 1.0  # what an old rate weighs when its arm is looked at anew
FASTEST_FORGOTTEN = 0.01  # of the distance to the fastest step, with each step
RTT_FLOOR_MS = 16.0  # round trips are told apart by their logarithm, above this
RATES_MAX = 512


class Arm(enum.Enum):
    """What a generation does: draft in a mode, or leave it to the cloud."""

    OFF = "off"
    SPLIT = VerificationMode.SPLIT.value
    COUPLED = VerificationMode.COUPLED.value


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
        return self.weight > 1e-9

    def mean(self, default: float = 0.0) -> float:
        return self.total / self.weight if self.known else default


@dataclass(slots=True)
class Rate:
    """Tokens per second of one generation; the older a sample, the less it weighs."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        factor = math.exp(-seconds / RATE_MEMORY_S)
        self.tokens = self.tokens * factor + tokens
        self.seconds = self.seconds * factor + seconds

    def fade(self) -> None:
        """What was measured is old: new samples soon outweigh it."""
        if self.seconds > STALE_RATE_S:
            self.tokens, self.seconds = self.per_second * STALE_RATE_S, STALE_RATE_S

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What a rate depends on beside the arm, coarsely.

    >>> Setting.of(batch_size=5, round_trip_ms=21.0, sampled=False)
    Setting(batch=3, round_trip=5, sampled=False)
    """

    batch: int  # log2 of the sessions in the cloud's batch, rounded up
    round_trip: int  # log2 of the milliseconds above a floor
    sampled: bool

    @classmethod
    def of(cls, *, batch_size: int, round_trip_ms: float, sampled: bool) -> "Setting":
        batch = max(0, batch_size - 1).bit_length()
        return cls(batch, round(math.log2(RTT_FLOOR_MS + round_trip_ms)), sampled)


@dataclass(slots=True)
class Estimates:
    drafting: DecayingMean = field(default_factory=DecayingMean)  # ms per token
    round_trip: DecayingMean = field(default_factory=DecayingMean)  # ms
    step: DecayingMean = field(default_factory=DecayingMean)  # ms of an engine step
    acceptance: DecayingMean = field(default_factory=DecayingMean)  # of drafts looked at
    rates: dict[tuple[Setting, Arm], Rate] = field(default_factory=dict)
    fastest_step_ms: float | None = None  # of one session without drafts
    aged_s: float = 0.0

    def age(self, now: float) -> None:
        """Forget what has become old; `now` in seconds. Silence ages nothing away: means stay."""
        passed_s = max(0.0, now - self.aged_s) if self.aged_s else 0.0
        self.aged_s = now
        factor = math.exp(-min(passed_s, 1.0) / TIME_CONSTANT_S)
        for mean in (self.drafting, self.round_trip, self.step):
            mean.decay(factor)
        self.acceptance.decay(math.exp(-min(passed_s, 1.0) / ACCEPTANCE_TIME_CONSTANT_S))

    @property
    def alpha(self) -> float:
        """Probability that a draft is accepted, given that those before it were."""
        return self._alpha(ACCEPTANCE_PRIOR, ACCEPTANCE_PRIOR_WEIGHT)

    @property
    def hoped_alpha(self) -> float:
        """The same, of drafts that nobody has seen yet: what is never tried is never known."""
        return self._alpha(ACCEPTANCE_HOPED, ACCEPTANCE_HOPED_WEIGHT)

    @property
    def hoped_draft_ms(self) -> float:
        """The drafter's time for a token, less and less while it does not draft."""
        return self.drafting.total / (self.drafting.weight + DRAFTING_FORGOTTEN)

    def _alpha(self, prior: float, weight: float) -> float:
        return (self.acceptance.total + prior * weight) / (self.acceptance.weight + weight)

    def stepped_alone(self, step_ms: float) -> None:
        """A step of one session without drafts took so long; a fast one is forgotten slowly."""
        fastest_ms = self.fastest_step_ms
        if fastest_ms is not None and step_ms > fastest_ms:
            step_ms = fastest_ms + FASTEST_FORGOTTEN * (step_ms - fastest_ms)
        self.fastest_step_ms = step_ms

    def bound(self, setting: Setting) -> float:
        """Tokens per second that a generation without drafts cannot exceed: one each step."""
        if setting.batch or not self.fastest_step_ms:
            return math.inf
        return 1e3 / self.fastest_step_ms

    @property
    def step_ms(self) -> float:
        """Of the cloud's engine; a guess until one is known."""
        return self.step.mean(STEP_GUESS_MS)

    @property
    def steps_away(self) -> float:
        """How many steps the cloud makes in a round trip."""
        return self.round_trip.mean() / self.step_ms

    def rate(self, setting: Setting, arm: Arm) -> Rate:
        """What `arm` makes in `setting`, to be added to."""
        if arm is Arm.OFF:
            setting = replace(setting, round_trip=0)
        key = setting, arm
        if key not in self.rates and len(self.rates) >= RATES_MAX:
            del self.rates[next(iter(self.rates))]
        return self.rates.setdefault(key, Rate())

    def as_json(self) -> dict[str, Any]:
        """What is worth keeping over a restart."""
        return {
            "version": 1,
            "drafting_ms": self.drafting.mean(),
            "round_trip_ms": self.round_trip.mean(),
            "step_ms": self.step.mean(),
            "alpha": self.alpha,
            "rates": [
                [setting.batch, setting.round_trip, setting.sampled, arm.value, rate.per_second]
                for (setting, arm), rate in self.rates.items()
                if rate.seconds
            ],
        }

    @classmethod
    def from_json(cls, document: Any) -> "Estimates":
        """The inverse of `as_json`, as old knowledge. Raises ValueError for anything else."""
        try:
            if document["version"] != 1:
                raise ValueError(f"version {document['version']!r}")
            estimates = cls()
            for name in ("drafting", "round_trip", "step"):
                if (value := _number(document[f"{name}_ms"])) > 0.0:
                    getattr(estimates, name).add(value, 1e-3)
            estimates.acceptance.add(min(1.0, _number(document["alpha"])), ACCEPTANCE_PRIOR_WEIGHT)
            for batch, round_trip, sampled, arm, per_second in document["rates"][:RATES_MAX]:
                setting = Setting(int(batch), int(round_trip), bool(sampled))
                rate = estimates.rate(setting, Arm(arm))
                rate.tokens, rate.seconds = _number(per_second) * STALE_RATE_S, STALE_RATE_S
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no estimates: {type(error).__name__}: {error}") from None
        return estimates


def _number(value: Any) -> float:
    """Raises ValueError unless `value` is a finite number, not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    if not math.isfinite(value) or value < 0.0:
        raise ValueError(f"{value!r} is out of range")
    return float(value)
