"""How generations speculate: in which mode, how far ahead, and whether the drafter drafts at all.

A `Control` is the edge's; it gives each generation a `Course` to follow. `FixedControl` goes by the
settings. `AutoControl` goes by what all generations of the edge have measured (estimates.py):

1. Drafting has to be worth it. In each setting the speeds with and without drafts are measured and
   compared, and the drafter drafts only where that is faster. The other way is looked at again now
   and then, the more rarely the longer it has been slower.
2. A generation's mode is fixed when it opens: coupled where its text must be a function of its
   seed, or is greedy (the two modes then differ in what a miss costs only), else whichever mode was
   faster.
3. The drafter goes as far ahead as verdicts are behind, and no further than a draft has any hope or
   the cloud says that it can use. Frames are aimed at where the cloud is when they land.

Time is passed in, in seconds; nothing here waits or reads a clock.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from edge_agent.estimates import Arm, Estimates, Rate, Setting
from picospec.protocol.edge_machine import SpeculationPolicy
from picospec.protocol.messages import SamplingParams, Verdict, VerificationMode
from picospec.sampling.distribution import GREEDY_TEMPERATURE

DRAFT_LENGTH_MAX = 16  # the cloud's budget says how many a step takes
WINDOW_MAX = 64
WINDOW_MIN = 2
SLACK = 1.5  # of the window over what steady times need: times are not steady
LEAD_SHARE = 0.8  # of what the cloud decodes in a round trip: a draft must not come late
HOPE_MIN = 0.05  # drafts less likely to be reached are not made

GAIN_MIN = 0.02  # drafting must bring this much more
# Over a token for each step without drafts: then nobody looks at the cloud alone, which gains less
# than that where no drafter takes memory bandwidth from it.
CLEAR_GAIN = 0.3
ENOUGH_S = {True: 0.8, False: 0.4}  # of generation time to know an arm by; drafting is the noisier
ENOUGH_TOKENS = 12
FIRST_DRAFT_S = 3.0  # for the drafter's prefill: drafting is judged by its drafts, or by their lack
LOOK_TIMEOUT_S = 4.0  # for an arm that makes no tokens to judge it by
LOOK_COST = 0.01  # of the speed, that looks at the slower arm may take at first, ...
LOOK_INTERVAL_MIN_S, LOOK_INTERVAL_MAX_S = 8.0, 256.0  # ... less while nothing changes
# What one generation's drafts may cost in a row, in time without drafts, before they pause: so
# much, and round trips, since each new chain loses for one before it can gain.
LOSS_MAX_S, LOSS_MAX_ROUND_TRIPS = 0.11, 2.0
PAUSE_S, PAUSE_MAX_S = 2.0, 16.0  # doubles
CROWD = 3  # log2 of a batch in which other sessions' rows bring as much as drafts
CROWD_PAUSE_S = 2.0  # until drafts are tried there
LOAD_MEMORY_S = 30.0  # then a crowd may be gone
OTHER_MODE_EVERY = 12  # generations, while the other mode is not far behind
FAR_BEHIND = 0.85


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What the edge does next, in tokens."""

    draft_length: int  # a round, or most drafts that an engine step takes
    window: int  # most unverified tokens; 0: the drafter stops
    lead: int = 0  # as in SetLength


class Course(Protocol):
    """Of one generation. Nothing here raises or blocks."""

    mode: VerificationMode

    def plan(self, now: float) -> DraftPlan:
        """To be asked when the generation begins, and after each verdict."""

    def heard(
        self, verdict: Verdict, num_tokens: int, round_trip_s: float | None, now: float
    ) -> None:
        """A verdict, the tokens committed by it and since the one before, and what it took on the
        network both ways, if it judged a draft."""

    def end(self) -> None:
        """The generation is over."""


class Control(Protocol):
    def begin(self, sampling: SamplingParams, *, seeded: bool, now: float) -> Course:
        """The course of a new generation; `seeded`: its text must be a function of its seed."""

    def drafted(self, num_tokens: int, seconds: float) -> None:
        """The drafter has computed `seconds` for `num_tokens`, prefills left out."""


class FixedControl:
    """Goes by the settings; each generation has the same course."""

    def __init__(self, policy: SpeculationPolicy) -> None:
        self.mode = policy.mode
        self._plan = DraftPlan(policy.draft_length, policy.window)

    def begin(self, sampling: SamplingParams, *, seeded: bool, now: float) -> Course:
        del sampling, seeded, now
        return self

    def drafted(self, num_tokens: int, seconds: float) -> None: ...

    def plan(self, now: float) -> DraftPlan:
        del now
        return self._plan

    def heard(
        self, verdict: Verdict, num_tokens: int, round_trip_s: float | None, now: float
    ) -> None: ...

    def end(self) -> None: ...


@dataclass(slots=True)
class Choice:
    """In one setting: whether the drafter drafts, and when the other way is looked at again."""

    drafts: bool = True
    looks_since_s: float | None = None  # at an arm that is not known well enough
    looked_s: float = 0.0  # generation time of the look so far
    looked_tokens: int = 0
    next_look_s: float = -math.inf
    num_confirmed: int = 0  # looks in a row at an arm that was still the slower one

    def update(self, on: Rate, off: Rate, off_max: float, now: float) -> None:
        """Decide, unless a look is under way. Without drafts there are at most `off_max` tokens
        per second."""
        if self.looks_since_s is not None:
            if not self._has_seen_enough(now):
                return
            self._end_look(on, off, now)
        if _is_known(on, drafts=True) and on.per_second > (1.0 + CLEAR_GAIN) * off_max:
            self.drafts = True
            return
        for rate, drafts in ((on, True), (off, False)):
            if not _is_known(rate, drafts=drafts) and (now >= self.next_look_s or not drafts):
                self._look(drafts=drafts, now=now)
                return
        if now >= self.next_look_s:
            other = not _pays(on.per_second, off.per_second)
            (on if other else off).fade()
            self._look(drafts=other, now=now)
        else:
            self.drafts = _pays(on.per_second, off.per_second)

    def _end_look(self, on: Rate, off: Rate, now: float) -> None:
        self.looks_since_s = None
        if not (_is_known(on, drafts=True) and _is_known(off, drafts=False)):
            return
        pays = _pays(on.per_second, off.per_second)
        confirmed = self.drafts is not pays  # the arm looked at is still the slower one
        self.num_confirmed = self.num_confirmed + 1 if confirmed else 0
        slower, faster = sorted((on.per_second, off.per_second))
        loss = 1.0 - slower / faster if faster else 0.0
        interval_s = max(LOOK_INTERVAL_MIN_S, self.looked_s * loss / LOOK_COST)
        self.next_look_s = now + min(
            interval_s * 2.0 ** min(self.num_confirmed, 8), LOOK_INTERVAL_MAX_S
        )

    @property
    def is_decided(self) -> bool:
        """Whether it is known what to do for some time."""
        return self.looks_since_s is None and math.isfinite(self.next_look_s)

    def sampled(self, tokens: int, seconds: float) -> None:
        self.looked_s += seconds
        self.looked_tokens += tokens

    def _look(self, *, drafts: bool, now: float) -> None:
        self.drafts = drafts
        self.looks_since_s, self.looked_s, self.looked_tokens = now, 0.0, 0

    def _has_seen_enough(self, now: float) -> bool:
        assert self.looks_since_s is not None
        enough = self.looked_s >= ENOUGH_S[self.drafts] and self.looked_tokens >= ENOUGH_TOKENS
        return enough or (self.looked_s > 0.0 and now - self.looks_since_s > LOOK_TIMEOUT_S)


def _is_known(rate: Rate, *, drafts: bool) -> bool:
    return rate.seconds >= ENOUGH_S[drafts] / 2


def _is_like(plan: DraftPlan, other: DraftPlan) -> bool:
    """Whether the difference is not worth a change."""
    if bool(plan.window) is not bool(other.window):
        return False
    return max(abs(plan.window - other.window), abs(plan.lead - other.lead)) <= 1


def _pays(on_per_second: float, off_per_second: float) -> bool:
    return on_per_second > (1.0 + GAIN_MIN) * off_per_second


@dataclass(frozen=True, slots=True)
class CloudLoad:
    """How busy the cloud is, as a verdict tells."""

    batch_size: int = 1
    draft_budget: int = DRAFT_LENGTH_MAX
    heard_s: float = -math.inf


class AutoControl:
    """Goes by what is measured."""

    def __init__(
        self,
        estimates: Estimates,
        modes: tuple[VerificationMode, ...],
        drafter_works: Callable[[], bool] = lambda: True,
    ) -> None:
        self.estimates = estimates
        self.drafter_works = drafter_works
        self._modes = modes
        self._choices: dict[Setting, Choice] = {}
        self._num_begun = 0
        self.num_running = 0  # generations, which share the drafter
        self.load = CloudLoad()  # the newest

    def begin(self, sampling: SamplingParams, *, seeded: bool, now: float) -> "AutoCourse":
        sampled = sampling.temperature >= GREEDY_TEMPERATURE
        self._num_begun += 1
        self.num_running += 1
        mode = VerificationMode.COUPLED
        if mode not in self._modes:
            mode = self._modes[0]
        elif sampled and not seeded and VerificationMode.SPLIT in self._modes:
            mode = self._faster_mode()
        load = self.load if now - self.load.heard_s < LOAD_MEMORY_S else CloudLoad()
        # The edge's own generations share the cloud's batch, at least.
        load = replace(load, batch_size=max(self.num_running, load.batch_size))
        return AutoCourse(self, mode, sampled=sampled, load=load)

    def drafted(self, num_tokens: int, seconds: float) -> None:
        if num_tokens > 0:
            self.estimates.drafting.add(1e3 * seconds / num_tokens, num_tokens)

    def setting(self, *, batch_size: int, sampled: bool) -> Setting:
        round_trip_ms = self.estimates.round_trip.mean()
        return Setting.of(batch_size=batch_size, round_trip_ms=round_trip_ms, sampled=sampled)

    def choice(self, setting: Setting, now: float) -> Choice:
        """What is done in `setting`. Drafts are not tried at once in a crowd, nor where a smaller
        batch has shown that they do not pay: they hardly will in a larger one."""
        if setting not in self._choices:
            choice = self._choices[setting] = Choice()
            smaller = self._choices.get(replace(setting, batch=setting.batch - 1))
            if smaller is not None and smaller.is_decided and not smaller.drafts:
                choice.drafts, choice.next_look_s = False, now + LOOK_INTERVAL_MIN_S
            elif setting.batch >= CROWD:
                choice.drafts, choice.next_look_s = False, now + CROWD_PAUSE_S
        return self._choices[setting]

    def window(self, draft_budget: int) -> int:
        """How far ahead: drafts until the verdict on the first of them is back, with slack."""
        estimates = self.estimates
        step_ms, rtt_ms = estimates.step_ms, estimates.round_trip.mean()
        draft_ms = max(0.1, estimates.drafting.mean(step_ms / 2)) * max(1, self.num_running)
        window = math.ceil(SLACK * (rtt_ms + 2 * step_ms) / draft_ms) + WINDOW_MIN
        if draft_budget:
            window = min(window, math.ceil((draft_budget + 1) * (2 + estimates.steps_away)))
        if (alpha := estimates.alpha) < 1.0:
            window = min(window, math.ceil(math.log(HOPE_MIN) / math.log(alpha)))
        return min(max(window, WINDOW_MIN), WINDOW_MAX)

    @property
    def lead(self) -> int:
        """Tokens that the cloud decodes by itself in a round trip, at least."""
        return int(LEAD_SHARE * self.estimates.steps_away)

    @property
    def has_hope(self) -> bool:
        """Whether a chain can get ahead of a cloud that goes on alone, and did so for a round trip
        before the chain began."""
        estimates = self.estimates
        gain = 1.0 - estimates.hoped_draft_ms * max(1, self.num_running) / estimates.step_ms
        if gain <= 0.0:
            return False
        hope: float = estimates.hoped_alpha ** (estimates.steps_away / gain)
        return hope >= HOPE_MIN

    def _faster_mode(self) -> VerificationMode:
        """By the rates at the present round trip, alone in the cloud's batch or nearly so."""
        best = Setting.of(
            batch_size=1, round_trip_ms=self.estimates.round_trip.mean(), sampled=True
        )
        split, coupled = (self.estimates.rate(best, arm) for arm in (Arm.SPLIT, Arm.COUPLED))
        for arm, mode in ((coupled, VerificationMode.COUPLED), (split, VerificationMode.SPLIT)):
            if not arm.seconds:
                return mode
        is_split = split.per_second > coupled.per_second
        slower, faster = sorted((split.per_second, coupled.per_second))
        every = OTHER_MODE_EVERY if slower > FAR_BEHIND * faster else 8 * OTHER_MODE_EVERY
        if self._num_begun % every == 0:
            is_split = not is_split
        return VerificationMode.SPLIT if is_split else VerificationMode.COUPLED


@dataclass(slots=True)
class AutoCourse:
    """One generation's course under an `AutoControl`."""

    control: AutoControl
    mode: VerificationMode
    sampled: bool
    load: CloudLoad
    _drafts: bool | None = None
    _changed_s: float = -math.inf  # when it began or ceased to draft
    _drafts_since_s: float = -math.inf
    _has_drafted: bool = False  # since then: a verdict was on drafts
    _heard_s: float | None = None  # the last verdict
    _loss_s: float = 0.0  # what its own drafts have cost of late; below 0 where they gain
    _paused_until_s: float = -math.inf
    _pause_s: float = PAUSE_S
    _last: DraftPlan = field(default_factory=lambda: DraftPlan(DRAFT_LENGTH_MAX, 0))

    def plan(self, now: float) -> DraftPlan:
        control, estimates = self.control, self.control.estimates
        setting = control.setting(batch_size=self.load.batch_size, sampled=self.sampled)
        choice = control.choice(setting, now)
        on, off = (estimates.rate(setting, arm) for arm in (Arm(self.mode.value), Arm.OFF))
        off_max = estimates.bound(setting)
        choice.update(on, off, off_max, now)
        drafts = choice.drafts and self.load.draft_budget > 0
        drafts = drafts and control.has_hope and control.drafter_works()
        if drafts and choice.looks_since_s is None:
            drafts = not self._is_paused(now)
        if drafts is not self._drafts:
            if self._drafts is not None:
                self._changed_s = now
            self._drafts, self._drafts_since_s, self._has_drafted = drafts, now, False
        plan = DraftPlan(DRAFT_LENGTH_MAX, 0)
        if drafts:
            window = control.window(self.load.draft_budget)
            plan = DraftPlan(DRAFT_LENGTH_MAX, window, control.lead)
        if not _is_like(plan, self._last):
            self._last = plan
        return self._last

    def _is_paused(self, now: float) -> bool:
        """Whether the drafts for this text, which may be a hard one, do not pay. Far from the cloud
        they lose little by little and gain much at once, so what counts is their sum."""
        round_trip_s = 1e-3 * self.control.estimates.round_trip.mean()
        most_s = LOSS_MAX_S + LOSS_MAX_ROUND_TRIPS * round_trip_s
        if self._loss_s > most_s:
            self._loss_s = 0.0
            self._paused_until_s = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        elif self._loss_s < -most_s:
            self._loss_s, self._pause_s = -most_s, PAUSE_S
        return now < self._paused_until_s

    def heard(
        self, verdict: Verdict, num_tokens: int, round_trip_s: float | None, now: float
    ) -> None:
        estimates = self.control.estimates
        estimates.age(now)
        if round_trip_s is not None:
            estimates.round_trip.add(1e3 * round_trip_s)
        estimates.acceptance.add(1.0, verdict.num_accepted)
        if verdict.num_accepted < verdict.num_draft_tokens:
            estimates.acceptance.add(0.0)
        if verdict.batch_size:
            load = CloudLoad(verdict.batch_size, verdict.draft_budget, now)
            self.load = self.control.load = load
        if verdict.compute_us and self._heard_s is not None:  # the first has the prompt's prefill
            estimates.step.add(verdict.compute_us / 1e3)
            if verdict.batch_size == 1 and not verdict.num_draft_tokens:
                estimates.stepped_alone(verdict.compute_us / 1e3)
        self._has_drafted |= verdict.num_draft_tokens > 0
        before, self._heard_s = self._heard_s, now
        if before is None:
            return  # the prompt's prefill
        self._measure(num_tokens, now - before, now)

    def end(self) -> None:
        self.control.num_running -= 1

    def _measure(self, num_tokens: int, seconds: float, now: float) -> None:
        """Add to the rate of what the generation does, once a change has come through."""
        estimates = self.control.estimates
        settled_s = 1e-3 * (estimates.round_trip.mean() + 2 * estimates.step.mean())
        if now - seconds < self._changed_s + settled_s:
            return
        if self._drafts and not self._has_drafted and now < self._drafts_since_s + FIRST_DRAFT_S:
            return
        arm = Arm(self.mode.value) if self._drafts else Arm.OFF
        setting = self.control.setting(batch_size=self.load.batch_size, sampled=self.sampled)
        estimates.rate(setting, arm).add(num_tokens, seconds)
        if self._drafts and (off := estimates.rate(setting, Arm.OFF)).seconds:
            self._loss_s += seconds - num_tokens / off.per_second
        choice = self.control.choice(setting, now)
        if choice.drafts is self._drafts:
            choice.sampled(num_tokens, seconds)
