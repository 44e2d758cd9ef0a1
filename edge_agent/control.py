"""How many tokens to draft: draft length and window, fixed or steered by what is measured.

A controller belongs to one generation and is told what its edge sees: the drafter's speed, the
verdicts, the round trips. `plan` says what to do next. Time is passed in; nothing here waits or
reads a clock, and the same history gives the same plans.
"""

import dataclasses
import math
from typing import Any

from edge_agent.estimates import LiveEstimates
from picospec.performance.controller import DraftPlan
from picospec.performance.costs import Costs, Network, Scheme
from picospec.performance.prediction import predicted_goodput

DRAFT_LENGTH_MAX = 8
WINDOW_MAX = 64
GAIN_MIN = 0.03  # predicted; less is not worth a change
CHANGE_INTERVAL_S = 0.5  # between two looks, so no more than a change each
SLACK = 1.5  # of the tokens in flight over what steady times need: times are not steady
WIDE = 2.0  # over what is needed: a window so wide costs drafts in vain ...
SHRINK_INTERVAL_S = 5.0  # ... and nothing else, so this long after the last change is soon enough
PROBE_INTERVAL_S = 3.0  # between steps of another length, where all are alike
HOPE_MIN = 0.02  # drafts less likely to be reached need no room in the window


class FixedLength:
    """The do-nothing variant."""

    def __init__(self, plan: DraftPlan) -> None:
        self._plan = plan

    def _ignore(self, *args: Any, **kwargs: Any) -> None: ...

    drafted = judged = round_trip = _ignore

    def plan(self, now: float) -> DraftPlan:
        return self._plan


class AdaptiveLength:
    """Follows the best predicted goodput of `scheme`.

    It looks at all draft lengths twice a second (some milliseconds of computing at most) and
    changes only for a gain worth it, so that noise in the estimates does not make it oscillate.
    """

    def __init__(
        self,
        initial: DraftPlan,
        scheme: Scheme,
        estimates: LiveEstimates | None = None,
        *,
        draft_length_max: int = DRAFT_LENGTH_MAX,
        window_max: int = WINDOW_MAX,
    ) -> None:
        """`scheme` gives all but length and window. `estimates` is the edge's, shared by its
        generations, so that a new chat starts with what the others know."""
        self._plan = DraftPlan(
            min(initial.draft_length, draft_length_max), min(initial.window, window_max)
        )
        self._scheme = scheme
        self._estimates = estimates if estimates is not None else LiveEstimates()
        self._draft_length_max = draft_length_max
        self._window_max = window_max
        self._place = 0  # in the chain, of the next draft to be judged
        self._looked_s = self._changed_s = self._probed_s = -math.inf
        self._is_probing = False

    def drafted(self, num_tokens: int, seconds: float) -> None:
        self._estimates.drafted(num_tokens, seconds)

    def judged(
        self,
        num_judged: int,
        num_accepted: int,
        num_forwards: int,
        queue_s: float,
        compute_s: float,
    ) -> None:
        if num_judged <= 0:
            return
        scheme, estimates = self._scheme, self._estimates
        # A row is left by what was accepted whole, or by a recovered token forwarded ahead.
        by_row = scheme.split and scheme.kept_rows and (self._place > 0 or num_forwards > 1)
        estimates.judged(self._place, num_judged, num_accepted)
        if compute_s > 0.0:  # otherwise the row alone has judged
            estimates.stepped(num_judged - by_row, compute_s)
        # Early in a chain the window has room, so the drafter was not held up.
        if scheme.fast_verify and not self._place and num_judged < self._plan.draft_length:
            estimates.queued(queue_s)
        self._place = self._place + num_accepted if num_accepted == num_judged else 0

    def round_trip(self, seconds: float) -> None:
        self._estimates.round_trip(seconds)

    def plan(self, now: float) -> DraftPlan:
        self._estimates.age(now)
        if self._estimates.known and now - self._looked_s >= CHANGE_INTERVAL_S:
            if self._looked_s == -math.inf:
                self._changed_s = now  # little is known yet: too little to narrow the window
            self._looked_s = now
            plan = self._better_plan(now)
            if plan != self._plan:
                self._plan, self._changed_s = plan, now
            self._is_probing = (
                self._estimates.is_slope_doubtful and now - self._probed_s >= PROBE_INTERVAL_S
            )
            if self._is_probing:
                self._probed_s = now
        return self._probe() if self._is_probing else self._plan

    def _probe(self) -> DraftPlan:
        """Another length, until the next look: what a draft adds to a step is only seen where
        steps differ. A longer one if there is: on an engine that is not loaded it costs little."""
        length, window = self._plan.draft_length, self._plan.window
        longer = min(2 * length, self._draft_length_max)
        return DraftPlan(longer if longer > length else max(1, length // 2), window)

    def _better_plan(self, now: float) -> DraftPlan:
        """The best plan if it gains enough, else the present one, with a window not too wide."""
        costs, link = self._estimates.costs(), self._estimates.link()
        acceptance = self._estimates.acceptance()

        def goodput(plan: DraftPlan) -> float:
            scheme = dataclasses.replace(
                self._scheme, draft_length=plan.draft_length, window=plan.window
            )
            return predicted_goodput(costs, scheme, link, acceptance)

        def with_window(length: int) -> DraftPlan:
            window = window_needed(length, costs, link, acceptance[-1])
            return DraftPlan(length, min(window, self._window_max))

        plans = [with_window(length) for length in range(1, self._draft_length_max + 1)]
        best = max(plans, key=goodput)
        if goodput(best) > (1.0 + GAIN_MIN) * goodput(self._plan):
            return best
        enough = with_window(self._plan.draft_length)
        is_wide = self._plan.window >= WIDE * enough.window
        if is_wide and now - self._changed_s >= SHRINK_INTERVAL_S:
            return enough
        return self._plan


def window_needed(draft_length: int, costs: Costs, link: Network, alpha: float) -> int:
    """Tokens in flight that keep drafter and engine busy until a verdict is back.

    The slower of the two, 60 ms for four tokens, sets the pace: (10 + 60 + 50) / 15 = 8 tokens go
    out before the first verdict is back; half as many for slack, and a round more.

    >>> from picospec.performance.costs import VerifyCost
    >>> window_needed(4, Costs(10.0, VerifyCost(((4, 60.0),))), Network(rtt_ms=50.0), alpha=1.0)
    16
    """
    step_ms = costs.step_ms(draft_length)
    token_ms = max(costs.draft_ms, step_ms / draft_length)
    in_flight = (costs.draft_ms + step_ms + link.rtt_ms) / token_ms
    window = draft_length + math.ceil(SLACK * in_flight)
    if 0.0 < alpha < 1.0:
        window = min(window, math.ceil(math.log(HOPE_MIN) / math.log(alpha)))
    return max(window, 2 * draft_length)
