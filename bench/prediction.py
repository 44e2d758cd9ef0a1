"""What the event simulation expects of a measured condition, fed by the costs of the same run.

What goes in is measured: the cost of verification (costs.py), the link's round trip, and each
generation's own length, acceptance rate and drafting time a token. Nothing is fitted to the speed.
"""

from __future__ import annotations

import statistics

from bench.results import ConditionResult, Costs, Record, Result
from bench.scenarios import System
from bench.systems import configured
from bench.tables import Predict
from picospec import performance as model
from picospec.messages import VerificationMode
from picospec.performance_simulation import simulate

RUNS = 40  # simulated generations of each measured one
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


def predictor(result: Result) -> Predict:
    """Tokens a second of a condition; None for systems that are not modelled."""
    return lambda each: predict(each, result.costs)


def predict(measured: ConditionResult, costs: Costs) -> float | None:
    condition = measured.condition
    if condition.system not in PREDICTED or condition.draft is None:
        return None
    speculation = configured(condition).speculation
    if speculation.control != "fixed":
        return None  # its draft length is not known beforehand
    split = speculation.mode is VerificationMode.SPLIT
    scheme = model.Scheme(
        draft_length=speculation.draft_length,
        window=speculation.window,
        parallel_draft=speculation.parallel_draft,
        fast_verify=speculation.fast_verify,
        mode=speculation.mode,
        kept_rows=split and speculation.fast_verify,
    )
    link = model.Link(
        rtt_ms=measured.round_trip_ms,
        bandwidth_bps=None if condition.kbit_s is None else condition.kbit_s * 1e3,
        **_sizes(measured),
    )
    verify_ms = model.VerifyCost.measured(_verify_ms(costs, condition.draft, scheme))
    return statistics.median(
        _speed(
            model.Costs(record.draft_ms, verify_ms),
            scheme,
            link,
            acceptance(record),
            len(record.token_ids),
        )
        for record in measured.complete
    )


def _speed(
    costs: model.Costs, scheme: model.Scheme, link: model.Link, alpha: float, num_tokens: int
) -> float:
    """Tokens a second of generations as long as the measured one, the first token left out."""
    time_s = 0.0
    for seed in range(RUNS):
        prediction = simulate(costs, scheme, link, alpha, num_tokens - 1, seed)
        time_s += (num_tokens - 1) / prediction.tokens_per_s
    return RUNS * (num_tokens - 1) / time_s


def _verify_ms(costs: Costs, draft: str, scheme: model.Scheme) -> dict[int, float]:
    """Where both sides compute at once, what it takes then; in sequence, what it takes alone."""
    if scheme.parallel_draft:
        return costs.busy_verify_ms[draft]
    return {**costs.verify_ms["split"], 0: costs.verify_ms["coupled"][0]}


def acceptance(record: Record) -> float:
    """A judged draft's chance, given that those before it were accepted: every chain of accepted
    drafts ends with one rejection."""
    judged = record.accepted + record.rejections
    return record.accepted / judged if judged else 0.0


def _sizes(measured: ConditionResult) -> dict[str, int]:
    """Bytes of a rejection beyond a plain verdict's, as they were."""
    records = measured.complete
    rejections = sum(record.rejections for record in records)
    if not rejections:
        return {}
    return {"rejection_bytes": sum(record.rejection_bytes for record in records) // rejections}
