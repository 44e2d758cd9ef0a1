"""How long a suite will take, told before it starts, and kept to while it runs.

The estimate is the performance model's, over the costs that `picospec predict` has as defaults. The
runner compares it with what the groups really took and shortens those that are left (`affordable`).
"""

from collections.abc import Callable
from dataclasses import replace

from bench.scenarios import Condition, Group, Suite, System
from bench.systems import network_of, scheme_of
from picospec.performance.costs import dense_rejection_bytes
from picospec.performance.prediction import predicted_goodput
from picospec_cli.predict import DEFAULT_COSTS, cases

STARTUP_S = 75.0  # two engines one after the other, compiled before
COST_CYCLE_S = 10.0
SLOWNESS_S = 12.0  # of each group: how fast the machine is now
FIRST_TOKEN_MS = 400.0  # a prompt's prefill, on both sides
LOGITS_WIDTH = 49152
WARM_UP_TOKENS = 8
COSTS = {case.name: case for case in cases(DEFAULT_COSTS)}


def estimated_s(group: Group) -> float:
    return group.num_prompts * repetition_s(group)


def total_s(suite: Suite) -> float:
    """Start-up and costs included."""
    fixed_s = STARTUP_S + (suite.cost_cycles + 1) * COST_CYCLE_S
    return fixed_s + len(suite.groups) * SLOWNESS_S + sum(map(estimated_s, suite.groups))


def repetition_s(group: Group) -> float:
    """Seconds that one prompt takes: every condition once, the baseline twice."""
    tokens = group.max_tokens
    baseline, *others = group.conditions
    generations = [baseline, *others, baseline]
    return sum(generation_s(condition, tokens) for condition in generations)


def generation_s(condition: Condition, num_tokens: int) -> float:
    """Seconds of one generation, the pause after it for late bytes included."""
    first_ms = FIRST_TOKEN_MS + condition.rtt_ms
    return (first_ms + num_tokens * _ms_per_token(condition)) / 1e3 + 0.15


def _ms_per_token(condition: Condition) -> float:
    if condition.draft is None:
        return COSTS["int4"].costs.verify_ms(0)
    case = COSTS[condition.draft]
    if condition.system is System.EDGE_ONLY:
        return case.costs.draft_ms
    scheme = scheme_of(condition)
    network = network_of(condition, condition.rtt_ms)
    if not condition.speculation.get("split_rejection", True):
        network = replace(network, rejection_bytes=dense_rejection_bytes(LOGITS_WIDTH))
    ms = 1e3 / predicted_goodput(case.costs, scheme, network, case.alpha)
    return min(ms, case.costs.verify_ms(0)) if condition.system is System.NEVER_WAITING else ms


def affordable(
    num_prompts: int, group_s: float, following_s: float, pace: float, left_s: float
) -> int:
    """How many of `num_prompts` this group may run so that all groups fit: at least one.

    `group_s` and `following_s` are estimates of this group and of those after it, `pace` what
    the groups so far took over their estimate, `left_s` the rest of the budget.

    >>> affordable(8, group_s=60, following_s=60, pace=1.0, left_s=200)
    8
    >>> affordable(8, group_s=60, following_s=60, pace=2.0, left_s=120)
    4
    """
    wanted_s = pace * (group_s + following_s)
    if wanted_s <= left_s:
        return num_prompts
    return max(1, int(num_prompts * max(0.0, left_s) / wanted_s))


def show(suite: Suite, say: Callable[[str], None] = print) -> None:
    """The plan, one line per group."""
    say(f"suite {suite.name}, at most {suite.budget_min:g} min:")
    for group in suite.groups:
        say(
            f"  {group.name:<14} {len(group.conditions):3d} conditions x {group.num_prompts} "
            f"prompts x {group.max_tokens} tokens  about {estimated_s(group) / 60:5.1f} min"
        )
    say(f"  start-up, costs and all: about {total_s(suite) / 60:.1f} min")
