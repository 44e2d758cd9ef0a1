"""What the event simulation expects of a measured condition, fed by the costs of the same run.

Measured costs (costs.py), the scheme, the link as it was set, the condition's own acceptance rate
and sizes of messages go in; nothing is fitted to the throughput that is predicted.
"""

from __future__ import annotations

from bench.results import ConditionResult, Costs, Record, Result
from bench.scenarios import System
from bench.systems import configured
from bench.tables import Predict
from picospec import performance as model
from picospec.messages import VerificationMode
from picospec.performance_simulation import simulate

SIMULATED_TOKENS = 4000
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
        rtt_ms=condition.rtt_ms,
        bandwidth_bps=None if condition.kbit_s is None else condition.kbit_s * 1e3,
        **_sizes(measured),
    )
    verify_ms = dict(costs.verify_ms[speculation.mode.value])
    verify_ms[0] = costs.verify_ms["coupled"][0]
    parts = model.Costs(costs.draft_ms[condition.draft], model.VerifyCost.measured(verify_ms))
    alpha = acceptance(measured.complete)
    return simulate(parts, scheme, link, alpha, SIMULATED_TOKENS, seed=1).tokens_per_s


def acceptance(records: list[Record]) -> float:
    """A judged draft's chance, given that those before it were accepted: every chain of accepted
    drafts ends with one rejection."""
    accepted = sum(record.accepted for record in records)
    rejected = sum(record.rejections for record in records)
    return accepted / (accepted + rejected) if accepted + rejected else 0.0


def _sizes(measured: ConditionResult) -> dict[str, int]:
    """Bytes of a rejection beyond a plain verdict's, as they were."""
    records = measured.complete
    rejections = sum(record.rejections for record in records)
    if not rejections:
        return {}
    return {"rejection_bytes": sum(record.rejection_bytes for record in records) // rejections}
