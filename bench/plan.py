"""How long a suite will take, told before it starts, and kept to while it runs.

The estimate is a rough closed form over design figures, not a prediction to be reported: what a
step of the target and a draft take on a core of the machines this was written on. The runner
compares it with what the groups really took and shortens those that are left (`affordable`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.scenarios import Condition, Group, Suite, System

STARTUP_S = 75.0  # two engines one after the other, compiled before
COST_CYCLE_S = 10.0
SLOWNESS_S = 12.0  # of each group: how fast the machine is now
PLAIN_MS = 42.0  # a token of the target, decoding alone
VERIFY_MS = 45.5  # a verification, and what each draft in it adds
VERIFY_MS_PER_DRAFT = 4.2
DRAFT_MS = {"int4": 7.5, "int8": 13.2}
ACCEPTANCE = {"int4": 0.66, "int8": 0.96}
FIRST_TOKEN_MS = 400.0  # a prompt's prefill, on both sides
DENSE_BYTES = 49152 * 4  # a whole distribution
SPARSE_BYTES = 700
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Estimate:
    group: str
    generations: int
    seconds: float


def estimate(suite: Suite) -> list[Estimate]:
    """One for each group, in order; start-up and costs are in `total_s`."""
    return [
        Estimate(
            group.name,
            group.num_prompts * (len(group.conditions) + 1),
            group.num_prompts * repetition_s(group),
        )
        for group in suite.groups
    ]


def total_s(suite: Suite) -> float:
    groups_s = sum(each.seconds for each in estimate(suite))
    fixed_s = STARTUP_S + (suite.cost_cycles + 1) * COST_CYCLE_S
    return fixed_s + len(suite.groups) * SLOWNESS_S + groups_s


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
        return PLAIN_MS
    draft_ms, alpha = DRAFT_MS[condition.draft], ACCEPTANCE[condition.draft]
    if condition.system is System.EDGE_ONLY:
        return draft_ms
    keys = condition.speculation
    length = int(keys.get("draft_length", 4))
    window = int(keys.get("window", 16))
    dense = not keys.get("split_rejection", True)
    verify_ms = VERIFY_MS + VERIFY_MS_PER_DRAFT * length
    per_miss_ms = 0.0
    if condition.kbit_s is not None:
        per_miss_ms = (DENSE_BYTES if dense else SPARSE_BYTES) * 8 / condition.kbit_s
    misses = 1 - alpha  # for each token, about
    if not keys.get("parallel_draft", True):
        num_tokens = (1 - alpha**length) / (1 - alpha)
        round_ms = length * draft_ms + condition.rtt_ms + verify_ms
        return round_ms / num_tokens + misses * per_miss_ms
    streaming_ms = max(draft_ms, (condition.rtt_ms + verify_ms) / window)
    miss_ms = condition.rtt_ms + draft_ms + verify_ms + per_miss_ms
    ms = streaming_ms + misses * miss_ms
    return min(ms, PLAIN_MS) if condition.system is System.NEVER_WAITING else ms


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
    """The plan, a line a group."""
    say(f"suite {suite.name}, at most {suite.budget_min:g} min:")
    for group, each in zip(suite.groups, estimate(suite), strict=True):
        say(
            f"  {group.name:<14} {len(group.conditions):3d} conditions x {group.num_prompts} "
            f"prompts x {group.max_tokens} tokens  about {each.seconds / 60:5.1f} min"
        )
    say(f"  start-up, costs and all: about {total_s(suite) / 60:.1f} min")
