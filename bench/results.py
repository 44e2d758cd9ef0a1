"""What was measured, and the file it is kept in."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bench.scenarios import Condition, System
from bench.spreads import Spread, spread
from picospec.performance.costs import VerifyCost


@dataclass(frozen=True, slots=True)
class Record:
    """One generation. What does not apply to a system is 0."""

    prompt_id: str
    order: int  # its place in the repetition
    token_ids: list[int]
    ttft_s: float  # from the request to the first token
    seconds: float  # from the first committed token to the last
    num_first: int = 1  # tokens that came with the first
    drafted: int = 0  # that were judged
    drafts_sent: int = 0  # those sent in vain included
    accepted: int = 0
    misses: int = 0  # drafts that were rejected; those after them were not looked at
    outcomes: str = ""  # by output position: "+" where a draft was right, "-" where it was not
    first_draft_s: float = 0.0  # from the request to the first frame with drafts
    restart_ms: float = 0.0  # from a rejection's arrival to the recovered token's departure
    verdicts: int = 0
    rejections: int = 0
    rollbacks: int = 0
    resumes: int = 0  # times the link was lost
    payload_up: int = 0  # bytes of messages
    payload_down: int = 0
    draft_bytes: int = 0  # of payload_up: the drafts
    rejection_bytes: int = 0  # of payload_down: verdicts with a rejection
    wire_up: int = 0  # bytes of TCP payload, framing included
    wire_down: int = 0
    queue_us: float = 0.0  # a verdict's mean wait in the cloud
    compute_us: float = 0.0  # a verdict's mean forward and sampling
    draft_ms: float = 0.0  # the drafter's time for a token, rolled back ones included
    slowness: float = 1.0  # what verification took, over `Costs.alone_ms`
    compared: bool = False  # greedy: with the baseline's text on this prompt
    first_difference: int | None = None  # where it leaves that text; None: nowhere
    error: str = ""  # why there is no result

    @property
    def tokens_per_s(self) -> float:
        """After the first commit, so that the prompt's prefill is left out."""
        return (len(self.token_ids) - self.num_first) / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> float:
        """Of the drafts that were looked at: the α of the performance model."""
        looked_at = self.accepted + self.misses
        return self.accepted / looked_at if looked_at else 0.0


@dataclass(slots=True)
class ConditionResult:
    condition: Condition
    records: list[Record] = field(default_factory=list)
    baseline: bool = False
    round_trip_ms: float = 0.0  # of a question and its answer on this link, as measured

    @property
    def complete(self) -> list[Record]:
        """Those that did not fail."""
        return [record for record in self.records if not record.error]

    def spread(self, value: Callable[[Record], float]) -> Spread:
        return spread([value(record) for record in self.complete])

    def speeds(self) -> dict[str, float]:
        """Tokens per second of each prompt; the mean where it was measured twice."""
        by_prompt: dict[str, list[float]] = {}
        for record in self.complete:
            by_prompt.setdefault(record.prompt_id, []).append(record.tokens_per_s)
        return {prompt: sum(speeds) / len(speeds) for prompt, speeds in by_prompt.items()}


@dataclass(slots=True)
class GroupResult:
    name: str
    max_tokens: int
    conditions: list[ConditionResult]
    wall_s: float = 0.0
    # What verification took when the group began, over `Costs.alone_ms`: alone, and by draft
    # while its model drafts, for both sides share the memory.
    slowness: dict[str, float] = field(default_factory=dict)

    @property
    def baseline(self) -> ConditionResult:
        return self.conditions[0]

    def speedup(self, result: ConditionResult) -> Spread:
        """Over the baseline on the same prompt, in the same repetition."""
        baseline = self.baseline.speeds()
        speeds = result.speeds()
        return spread([speeds[each] / baseline[each] for each in speeds if baseline.get(each)])


@dataclass(slots=True)
class Costs:
    """What the parts take when nothing is in their way; see costs.py. Times are medians."""

    verify_ms: dict[str, dict[int, float]] = field(default_factory=dict)  # mode: drafts: ms
    draft_ms: dict[str, float] = field(default_factory=dict)  # draft: ms per token
    baseline_ms: float = 0.0  # a token of stock vLLM
    # draft: kind of rejection: to draw the recovered token from it
    recover_ms: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def alone_ms(self) -> VerifyCost:
        """Verification in split mode, and a forward without drafts."""
        return VerifyCost.measured({**self.verify_ms["split"], 0: self.verify_ms["coupled"][0]})


@dataclass(slots=True)
class Result:
    """A suite's run."""

    suite: str
    date: str  # ISO 8601, UTC
    commit: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    groups: list[GroupResult]
    costs: Costs
    not_run: list[str] = field(default_factory=list)  # and why
    wall_s: float = 0.0

    def find(
        self, wanted: Callable[[Condition], bool]
    ) -> Iterator[tuple[GroupResult, ConditionResult]]:
        """Every condition that has at least one complete record."""
        for group in self.groups:
            for result in group.conditions:
                if result.complete and wanted(result.condition):
                    yield group, result

    @property
    def compared(self) -> list[tuple[ConditionResult, Record]]:
        """Generations whose text must be the baseline's; its own second one is among them."""
        return [
            (each, record)
            for group in self.groups
            for each in group.conditions
            for record in each.records
            if record.compared
        ]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_json(self), indent=1) + "\n")


def to_json(result: Result) -> dict[str, Any]:
    """Raw records, and beside them each condition's medians and quartiles."""
    data: dict[str, Any] = _AS_JSON.dump_python(result, mode="json")
    for group, written in zip(result.groups, data["groups"], strict=True):
        for each, entry in zip(group.conditions, written["conditions"], strict=True):
            entry["name"] = each.condition.name
            entry["tokens_per_s"] = asdict(each.spread(lambda record: record.tokens_per_s))
            entry["ttft_s"] = asdict(each.spread(lambda record: record.ttft_s))
            entry["speedup"] = asdict(group.speedup(each))
    return data


def model_costs(result: Result) -> dict[str, Any]:
    """What was measured of the parts, as `picospec predict --costs` reads it.

    A draft's acceptance is that of the whole system, over all groups.
    """
    costs = result.costs
    drafts = {}
    for draft, draft_ms in costs.draft_ms.items():
        records = [
            record
            for _, each in result.find(lambda each: each.system is System.PICOSPEC)
            if each.condition.draft == draft
            for record in each.complete
        ]
        accepted = sum(record.accepted for record in records)
        looked_at = accepted + sum(record.misses for record in records)
        drafts[draft] = {
            "draft_ms": draft_ms,
            "recover_ms": costs.recover_ms.get(draft, {}).get("sparse", 0.0),
            "alpha": accepted / looked_at if looked_at else 0.0,
        }
    return {
        "machine": result.machine,
        "date": result.date,
        "plain_ms": costs.baseline_ms,
        "verify_ms": dict(costs.alone_ms.points),
        "drafts": drafts,
    }


def load(path: Path) -> Result:
    """The inverse of `save`; derived values are computed anew."""
    return _AS_JSON.validate_json(path.read_bytes())


_AS_JSON = TypeAdapter(Result)
