"""What was measured of each cell, and what it amounts to."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.floor.grid import FLOOR_MIN, WANTED, Contender, Load
from bench.floor.loads import Run, Sample
from bench.floor.sources import Spent
from bench.spreads import first_difference

ROUNDINGS_MAX = 4.0  # that add up over a model's layers


@dataclass(slots=True)
class Difference:
    """Where a greedy text leaves that of stock vLLM; `gap` and `rounding` once measured (gaps.py).

    A forward of several rows rounds otherwise than one of a single row, so in bf16 either of two
    tokens may be the best one.
    """

    prompt: str
    at: int
    token_id: int
    reference: int
    gap: float | None = None  # between the two tokens' logits
    rounding: float = 0.0  # the spacing of bf16 at the higher one

    @property
    def is_rounding(self) -> bool:
        return self.gap is not None and self.gap <= ROUNDINGS_MAX * self.rounding

    def __str__(self) -> str:
        told = (
            "" if self.gap is None else f", logits {self.gap:.3f} apart (bf16: {self.rounding:g})"
        )
        return f"prompt {self.prompt}: differs from stock vLLM at token {self.at}{told}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One repetition of a cell."""

    stock: Sample  # the mean of the baseline's runs before and after
    stock_cpu_ms: float  # of the cloud's core, per token
    ours: Sample | None = None  # None: it failed
    num_tokens: int = 0
    spent: Spent | None = None
    error: str = ""
    differences: tuple[Difference, ...] = ()  # greedy texts that leave stock vLLM's

    @property
    def ratio(self) -> float:
        return self.ours.tokens_per_s / self.stock.tokens_per_s if self.ours is not None else 0.0


@dataclass(slots=True)
class Cell:
    """One contender's figures under one load, or one part of it. Values are medians."""

    load: Load
    contender: Contender
    part: str = ""
    wanted: float = WANTED
    trials: list[Trial] = field(default_factory=list)

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.load.name, self.part, self.contender.name]))

    @property
    def ratio(self) -> float:
        """Tokens per second over those of stock vLLM."""
        return statistics.median(trial.ratio for trial in self.trials)

    @property
    def problems(self) -> list[str]:
        """For which the run fails."""
        found = [f"{self.name}: {trial.error}" for trial in self.trials if trial.error]
        found += [
            f"{self.name}: {each}"
            for trial in self.trials
            for each in trial.differences
            if not each.is_rounding
        ]
        if self.contender.is_default and self.ratio < FLOOR_MIN:
            found.append(f"{self.name}: {self.ratio:.2f} of stock vLLM's tokens per second")
        return found

    def ours(self, value: Callable[[Sample], float]) -> float:
        return _median([value(each.ours) for each in self.trials if each.ours is not None])

    def stock(self, value: Callable[[Sample], float]) -> float:
        return _median([value(each.stock) for each in self.trials])

    def per_token(self, value: Callable[[Spent], float]) -> float:
        return _median(
            [value(each.spent) / each.num_tokens for each in self.trials if each.spent is not None]
        )


def best_fixed(cell: Cell, cells: Sequence[Cell]) -> float:
    """The better ratio of the fixed settings under the same load; 0 if they were not run."""
    return max(
        (
            other.ratio
            for other in cells
            if other.load == cell.load
            and other.contender.drafter == cell.contender.drafter
            and not other.contender.is_default
        ),
        default=0.0,
    )


def trials(load: Load, stock: Sequence[Run], ours: Run | Exception) -> dict[str, Trial]:
    """By part. Greedy texts are compared as far as both go: some are ended early."""
    parts = stock[0].samples
    stock_cpu_ms = statistics.fmean(1e3 * run.spent.cloud_cpu_s / run.num_tokens for run in stock)
    found = {}
    for part in parts:
        baseline = mean([run.samples[part] for run in stock])
        if isinstance(ours, Exception):
            error = f"{type(ours).__name__}: {ours}"
            found[part] = Trial(baseline, stock_cpu_ms, error=error)
            continue
        differences = () if load.temperature else _differences(ours.texts, stock[0].texts)
        found[part] = Trial(
            baseline,
            stock_cpu_ms,
            ours.samples[part],
            ours.num_tokens,
            ours.spent,
            differences=differences,
        )
    return found


def mean(samples: Sequence[Sample]) -> Sample:
    names = Sample.__dataclass_fields__
    return Sample(
        **{name: statistics.fmean(getattr(each, name) for each in samples) for name in names}
    )


def _differences(
    texts: dict[str, list[int]], references: dict[str, list[int]]
) -> tuple[Difference, ...]:
    found = []
    for prompt, text in texts.items():
        reference = references[prompt]
        both = min(len(text), len(reference))
        at = first_difference(text[:both], reference[:both])
        if at is not None:
            found.append(Difference(prompt, at, text[at], reference[at]))
    return tuple(found)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
