"""What the performance models are fed: measured costs, the scheme, the link. Frozen, checked.

Times are milliseconds throughout, sizes bytes on the wire. `prediction` and
`simulation` both take these and nothing else.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from picospec.errors import ConfigError
from picospec.protocol.messages import VerificationMode

# The probability that a draft is accepted, given that all before it were: one for all, or one
# for each place in the chain since the last rejection, of which the last holds for all beyond.
Acceptance = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class Text:
    """A text of which is known what comes of every draft; the simulation can replay it.

    The edge may draft before it has the first token, so that one has an outcome, too.
    """

    accepted: tuple[bool, ...]  # by output position
    cloud_prefill_ms: float = 0.0  # from the opening's arrival to the first token
    edge_prefill_ms: float = 0.0  # from the opening to where the drafter can begin

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not self.accepted:
            raise ConfigError("a text has one token at least")


BYTES_PER_LOGIT = 4  # float32; the ids of a whole law do not travel


@dataclass(frozen=True, slots=True)
class VerifyCost:
    """Milliseconds of an engine step that forwards the last committed token and k drafts.

    Linear between the measured points, and beyond the last by the slope of the last two.

    >>> cost = VerifyCost(((0, 40.0), (1, 49.0), (3, 55.0)))
    >>> cost(0), cost(2), cost(5)
    (40.0, 52.0, 61.0)
    """

    points: tuple[tuple[int, float], ...]  # (k, ms), k ascending

    def __post_init__(self) -> None:
        """Raises ConfigError for a cost that no engine can have."""
        counts = [k for k, _ in self.points]
        if not counts or counts != sorted(set(counts)) or counts[0] < 0:
            raise ConfigError("verify_ms needs distinct, ascending numbers of drafts, from 0 on")
        if not all(math.isfinite(ms) and ms > 0.0 for _, ms in self.points):
            raise ConfigError("verify_ms must be positive")

    @classmethod
    def measured(cls, points: Mapping[int, float]) -> Self:
        """From milliseconds by number of drafts. Raises ConfigError."""
        return cls(tuple(sorted(points.items())))

    @classmethod
    def affine(cls, base_ms: float, draft_ms: float, plain_ms: float | None = None) -> Self:
        """base_ms + k · draft_ms, but `plain_ms` at k = 0 where it is given. Raises ConfigError."""
        points = {1: base_ms + draft_ms, 2: base_ms + 2 * draft_ms}
        return cls.measured({0: base_ms if plain_ms is None else plain_ms, **points})

    def times(self, factor: float) -> Self:
        """The same on an engine so many times as slow. Raises ConfigError."""
        return type(self)(tuple((k, factor * ms) for k, ms in self.points))

    def __call__(self, num_drafts: int) -> float:
        points = self.points
        if len(points) == 1 or num_drafts <= points[0][0]:
            return points[0][1]
        index = min(bisect_left(points, (num_drafts, -math.inf)), len(points) - 1)
        (low, low_ms), (high, high_ms) = points[index - 1], points[index]
        slope = (high_ms - low_ms) / (high - low)
        return max(0.0, low_ms + slope * (num_drafts - low))


@dataclass(frozen=True, slots=True)
class Costs:
    """What either side computes, in milliseconds."""

    draft_ms: float  # to draft a token
    verify_ms: VerifyCost  # an engine step
    step_overhead_ms: float = 0.0  # of a step, where verify_ms does not hold it
    row_judge_ms: float = 0.0  # to judge a draft by a kept row
    recover_ms: float = 0.0  # split: the edge draws the recovered token
    # Where both sides share a machine's memory: a step's time while the drafter computes, over its
    # time alone. Known to the simulation; the closed form takes `verify_ms` as it is.
    contention: float = 1.0
    plain_ms: float | None = None  # a token of cloud-only decoding; None: verify_ms(0)

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for name in ("draft_ms", "step_overhead_ms", "row_judge_ms", "recover_ms", "plain_ms"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"{name} must be 0 or more, not {value}")
        if self.draft_ms == 0.0:
            raise ConfigError("draft_ms must be above 0")
        if not (math.isfinite(self.contention) and self.contention >= 1.0):
            raise ConfigError(f"contention must be 1 or more, not {self.contention}")

    def step_ms(self, num_drafts: int) -> float:
        """A step that forwards one token and `num_drafts` more."""
        return self.verify_ms(num_drafts) + self.step_overhead_ms


@dataclass(frozen=True, slots=True)
class Scheme:
    """How edge and cloud speculate; the fields of `SpeculationPolicy` that cost or save time.

    `kept_rows` says that the engine keeps the logits row after the last accepted draft (split
    mode; in coupled mode the bonus token, drawn from that row, does the same in any case).
    """

    draft_length: int = 4  # tokens per round, and most drafts that a step takes
    window: int = 16  # most unverified tokens
    parallel_draft: bool = True
    fast_verify: bool = True
    mode: VerificationMode = VerificationMode.SPLIT
    kept_rows: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.draft_length < 1 or self.window < 1:
            raise ConfigError("draft_length and window must be 1 or more")

    @property
    def split(self) -> bool:
        return self.mode is VerificationMode.SPLIT

    @property
    def round_length(self) -> int:
        """A round never exceeds the window."""
        return min(self.draft_length, self.window)

    @property
    def frame_length(self) -> int:
        """Drafts that travel together."""
        return 1 if self.fast_verify else self.round_length


@dataclass(frozen=True, slots=True)
class Network:
    """The network. The sizes hold HTTP/2 framing and are what docs/benchmarks.md measured."""

    rtt_ms: float = 0.0
    bandwidth_bps: float | None = None  # each way; None = unlimited
    frame_bytes_up: int = 45  # of a message, beside its tokens
    token_bytes_up: int = 10
    verdict_bytes: int = 100
    rejection_bytes: int = 550  # split: of its verdict, in addition

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not (math.isfinite(self.rtt_ms) and self.rtt_ms >= 0.0):
            raise ConfigError(f"rtt_ms must be 0 or more, not {self.rtt_ms}")
        if self.bandwidth_bps is not None and not self.bandwidth_bps > 0.0:
            raise ConfigError("bandwidth_bps must be above 0")

    def transfer_ms(self, num_bytes: int) -> float:
        """To put `num_bytes` on the wire."""
        return 0.0 if self.bandwidth_bps is None else num_bytes * 8e3 / self.bandwidth_bps

    def up_bytes(self, num_tokens: int) -> int:
        return self.frame_bytes_up + num_tokens * self.token_bytes_up

    def down_bytes(self, scheme: Scheme, *, rejected: bool) -> int:
        """Of a verdict; in coupled mode a rejection carries a token id only."""
        return self.verdict_bytes + (self.rejection_bytes if rejected and scheme.split else 0)


def dense_rejection_bytes(logits_width: int) -> int:
    """Of a rejection with the whole distribution (split rejection switched off)."""
    return logits_width * BYTES_PER_LOGIT


def check_acceptance(alpha: Acceptance) -> tuple[float, ...]:
    """`alpha` by place in the chain, at least one. Raises ConfigError outside 0 to 1."""
    places = (float(alpha),) if isinstance(alpha, (int, float)) else tuple(map(float, alpha))
    if not places or not all(0.0 <= place <= 1.0 for place in places):
        raise ConfigError(f"an acceptance rate lies between 0 and 1; got {alpha}")
    return places


_NUMBERS = ("draft_ms", "step_overhead_ms", "row_judge_ms", "recover_ms", "plain_ms")


def costs_from_json(document: Any) -> Costs:
    """Costs from a JSON object; unknown keys are left to others. Raises ConfigError.

    Keys as the fields of `Costs`, `verify_ms` an object from number of drafts to milliseconds;
    `draft_ms` and `verify_ms` must be there:

    >>> costs_from_json({"draft_ms": 7.5, "verify_ms": {"0": 40, "4": 63.5}}).step_ms(2)
    51.75
    """
    if not isinstance(document, dict):
        raise ConfigError("costs must be a JSON object")
    missing = {"draft_ms", "verify_ms"} - document.keys()
    if missing:
        raise ConfigError(f"costs lack {', '.join(sorted(missing))}")
    numbers = {name: document[name] for name in _NUMBERS if document.get(name) is not None}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} must be a number, not {value!r}")
    points = document["verify_ms"]
    if not isinstance(points, dict):
        raise ConfigError("verify_ms must be an object from number of drafts to milliseconds")
    try:
        verify_ms = VerifyCost.measured({int(k): float(ms) for k, ms in points.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"verify_ms must map whole numbers to numbers: {error}") from None
    return Costs(verify_ms=verify_ms, **numbers)
