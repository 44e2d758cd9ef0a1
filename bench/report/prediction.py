"""What the event simulation expects of a measured condition, fed by costs of the same run.

What goes in is measured: the link's round trip, the cost of verification (costs.py), and of each
generation when either side was through with the prompt, its drafting time per token, how much
slower than that cost its verification was, and which drafts were right, position by position. What
is predicted is how all that adds up. Nothing is fitted to the speed.

Two more predictions know less, to tell what the knowledge is worth: one takes verification as it
was when the group began, alone and beside the drafter; the other has chance decide over drafts, at
the generation's rate of acceptance, although right and wrong ones come in runs.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace

from bench.report.tables import Predict
from bench.results import ConditionResult, Costs, GroupResult, Record, Result
from bench.scenarios import ADAPTIVE, System
from bench.systems import configured, network_of, scheme_of
from picospec.performance import costs as model
from picospec.performance.simulation import replay_s, simulate

RUNS = 40  # of chance, for each measured generation
# Decoding without drafts is no matter of this model (performance.cloud_only).
PREDICTED = frozenset(
    {
        System.PICOSPEC,
        System.VANILLA,
        System.NO_PARALLEL_DRAFTING,
        System.NO_FAST_VERIFICATION,
        System.NO_SPLIT_REJECTION,
    }
)
# Seconds of one generation, from its first token to its last.
Play = Callable[[model.Costs, model.Scheme, model.Network, Record], float]


def predictors(result: Result) -> dict[str, Predict]:
    """Tokens per second of a condition, None for systems that are not modelled, by what goes in."""
    groups = {id(each): group for group in result.groups for each in group.conditions}

    def predictor(play: Play, *, own_costs: bool) -> Predict:
        return lambda each: predict(each, groups[id(each)], result.costs, play, own_costs)

    return {
        "replay": predictor(replayed, own_costs=True),
        "costs before": predictor(replayed, own_costs=False),
        "rate": predictor(by_chance, own_costs=False),
    }


def predict(
    measured: ConditionResult, group: GroupResult, costs: Costs, play: Play, own_costs: bool
) -> float | None:
    """`own_costs`: verification as it was in each generation, not as when the group began."""
    condition = measured.condition
    if condition.system not in PREDICTED or condition.draft is None:
        return None
    if condition.overrides == ADAPTIVE:
        return None  # its draft length is not known beforehand
    speculation = configured(condition).speculation
    scheme = scheme_of(condition)
    network = replace(network_of(condition, measured.round_trip_ms), **_sizes(measured))
    slowness = group.slowness or {"alone": 1.0}
    recoveries_ms = costs.recover_ms.get(condition.draft, {})
    before = model.Costs(
        draft_ms=costs.draft_ms[condition.draft],
        verify_ms=costs.alone_ms.times(slowness["alone"]),
        contention=max(1.0, slowness.get(condition.draft, 1.0) / slowness["alone"]),
        recover_ms=recoveries_ms.get("sparse" if speculation.split_rejection else "whole", 0.0),
    )

    def costs_of(record: Record) -> model.Costs:
        # On a long link all may be drafted before the first token is back, and nothing is timed.
        own = replace(before, draft_ms=record.draft_ms or before.draft_ms)
        if not own_costs:
            return own
        return replace(own, verify_ms=costs.alone_ms.times(record.slowness), contention=1.0)

    return statistics.median(
        (len(record.token_ids) - 1) / play(costs_of(record), scheme, network, record)
        for record in measured.complete
    )


def replayed(
    costs: model.Costs, scheme: model.Scheme, link: model.Network, record: Record
) -> float:
    """Every draft comes out as it did."""
    first_frame_ms = scheme.frame_length * record.draft_ms
    text = model.Text(
        tuple(outcome == "+" for outcome in record.outcomes),
        cloud_prefill_ms=max(0.0, 1e3 * record.ttft_s - link.rtt_ms),
        edge_prefill_ms=max(0.0, 1e3 * record.first_draft_s - first_frame_ms),
    )
    return replay_s(costs, scheme, link, text)


def by_chance(
    costs: model.Costs, scheme: model.Scheme, link: model.Network, record: Record
) -> float:
    """Each draft is as likely to be right as the generation's were on average."""
    num_tokens = len(record.token_ids) - 1
    runs = (
        simulate(costs, scheme, link, record.acceptance, num_tokens, seed) for seed in range(RUNS)
    )
    return statistics.fmean(num_tokens / run.tokens_per_s for run in runs)


def _sizes(measured: ConditionResult) -> dict[str, int]:
    """Bytes of a rejection beyond a plain verdict's, as they were."""
    records = measured.complete
    rejections = sum(record.rejections for record in records)
    if not rejections:
        return {}
    return {"rejection_bytes": sum(record.rejection_bytes for record in records) // rejections}
