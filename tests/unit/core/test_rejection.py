"""The split rule is exact: every path through both daemons' code, enumerated.

The three places where the code meets chance (`uniform`, `race`, and the target's logits) are
replaced by an oracle that walks every branch and knows its probability; all else is the real
`verify` and the real `RejectionSampler`. The probabilities are dyadic, so float32 holds them
exactly and the output law must equal the target's to 1e-9.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cloud_server.engine.judging import torch_noise, verification
from cloud_server.engine.judging.torch_sampling import TargetDistribution
from cloud_server.engine.judging.verification import StepKind, VerificationParams, verify
from picospec.protocol.draft_queue import DraftQueue
from picospec.protocol.messages import Draft, Rejection, SamplingParams, VerificationMode
from picospec.sampling import rejection
from picospec.sampling.distribution import Distribution
from picospec.sampling.noise import Purpose
from picospec.sampling.rejection import MAX_TAIL_ATTEMPTS, RejectionSampler, residual
from tests.support.builders import make_rejection

Law = dict[Hashable, float]
POSITION = 5


class Oracle:
    """Enumerates a program's random choices: replays it once for each path of branches."""

    def __init__(self) -> None:
        self._path: list[tuple[int, list[float]]] = []  # the branch taken, and its siblings
        self._depth = 0
        self._draws: set[tuple[Any, ...]] = set()

    def enumerate(self, program: Callable[[], Hashable]) -> Law:
        """The law of what `program` returns."""
        outcomes: Law = defaultdict(float)
        self._path = []
        while True:
            self._depth, self._draws = 0, set()
            outcome = program()
            outcomes[outcome] += math.prod(weights[branch] for branch, weights in self._path)
            while self._path and not self._advance():
                self._path.pop()
            if not self._path:
                return dict(outcomes)

    def _advance(self) -> bool:
        branch, weights = self._path[-1]
        later = [i for i in range(branch + 1, len(weights)) if weights[i] > 0.0]
        if later:
            self._path[-1] = (later[0], weights)
        return bool(later)

    def choose(self, weights: list[float]) -> int:
        if self._depth == len(self._path):
            self._path.append((next(i for i, w in enumerate(weights) if w > 0.0), weights))
        branch = self._path[self._depth][0]
        self._depth += 1
        return branch

    def use(self, *draw: Any) -> None:
        """No piece of noise may decide twice on one path."""
        assert draw not in self._draws, draw
        self._draws.add(draw)

    def race(self, probs: Any, token_ids: Any, *draw: Any) -> int:
        self.use(*draw)
        weights = np.asarray(probs, np.float64)
        return self.choose((weights / weights.sum()).tolist())

    def uniform(self, *draw: Any) -> Uniform:
        self.use(*draw)
        return Uniform(self, 1.0)


class Uniform:
    """u * scale for a u from (0, 1) that is compared once: both answers are explored."""

    def __init__(self, oracle: Oracle, scale: float) -> None:
        self._oracle = oracle
        self._scale = scale

    def __mul__(self, factor: float) -> Uniform:
        return Uniform(self._oracle, self._scale * factor)

    def __lt__(self, bound: float) -> bool:
        share = min(max(bound / self._scale, 0.0), 1.0) if self._scale else float(bound > 0)
        return self._oracle.choose([share, 1.0 - share]) == 0

    def __ge__(self, bound: float) -> bool:
        return not self < bound


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    oracle = Oracle()
    monkeypatch.setattr(verification, "uniform", oracle.uniform)
    monkeypatch.setattr(torch_noise, "race", oracle.race)
    monkeypatch.setattr(rejection, "uniform", oracle.uniform)
    monkeypatch.setattr(rejection, "race", oracle.race)
    return oracle


def output_law(
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    target: np.ndarray,
    drafter: np.ndarray,
    sparse_k: int,
    exact: bool = True,
) -> np.ndarray:
    """The law of one position's committed token, after a draft from `drafter`."""
    params = VerificationParams(VerificationMode.SPLIT, SamplingParams(), exact, sparse_k, 3)
    judged = TargetDistribution(None, torch.from_numpy(target))
    monkeypatch.setattr(verification, "process", lambda *_: judged)
    logits = torch.zeros(2, 3)
    draft_law = Distribution(None, drafter)

    def probe(attempt: int) -> int | None:
        step = verify(logits, params, POSITION, [], [], step=StepKind.PROBE, attempt=attempt)
        assert step.rejection is not None
        return RejectionSampler(0, POSITION, draft_law).offer(step.rejection, attempt)

    def first_round() -> int | None:
        draft = oracle.race(drafter, None, Purpose.DRAFT)
        step = verify(logits, params, POSITION, [draft], [float(drafter[draft])])
        if step.num_accepted:
            return draft
        assert step.rejection is not None
        token_id = RejectionSampler(0, POSITION, draft_law).offer(step.rejection, 0)
        return probe(1) if token_id is None else token_id

    # What follows a None does not depend on what came before: a geometric series.
    emitted, repeated = oracle.enumerate(first_round), oracle.enumerate(lambda: probe(1))
    assert math.isclose(sum(emitted.values()), 1.0, abs_tol=1e-12)
    rounds = emitted.get(None, 0.0)
    if rounds:
        rounds /= 1.0 - repeated.get(None, 0.0)
    return np.array([emitted.get(v, 0.0) + rounds * repeated.get(v, 0.0) for v in range(3)])


def dyadic_laws() -> list[np.ndarray]:
    """All laws on three tokens in eighths, but for order of little interest."""
    eighths = [w for w in itertools.product(range(9), repeat=3) if sum(w) == 8]
    chosen = [*eighths[::3], (8, 0, 0), (0, 0, 8), (4, 4, 0), (0, 1, 7), (2, 3, 3)]
    return [np.array(weights, np.float32) / np.float32(8.0) for weights in chosen]


@pytest.mark.parametrize("sparse_k", [0, 1, 2, 3])
def test_split_is_exact(oracle: Oracle, monkeypatch: pytest.MonkeyPatch, sparse_k: int) -> None:
    for target, drafter in itertools.product(dyadic_laws(), repeat=2):
        committed = output_law(oracle, monkeypatch, target, drafter, sparse_k)
        np.testing.assert_allclose(committed, target, rtol=0, atol=1e-9)


def test_truncation_is_not_exact(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    target = np.array([0.5, 0.375, 0.125], np.float32)
    drafter = np.array([0.75, 0.25, 0.0], np.float32)
    committed = output_law(oracle, monkeypatch, target, drafter, 1, exact=False)
    assert abs(committed - target).max() > 0.1
    committed = output_law(oracle, monkeypatch, target, drafter, 3, exact=False)
    np.testing.assert_allclose(committed, target, rtol=0, atol=1e-9)


def test_a_second_flip_would_not_be_exact(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coin that does not persist is biased, and the harness sees it."""
    target = np.array([0.375, 0.375, 0.25], np.float32)
    drafter = np.array([0.25, 0.625, 0.125], np.float32)
    offer = RejectionSampler.offer

    def flip_again(self: RejectionSampler, offered: Rejection, attempt: int) -> int | None:
        kept = float(residual(offered.probs, drafter[offered.token_ids]).sum())
        u = rejection.uniform(  # type: ignore[attr-defined]  # the oracle's
            0, POSITION, Purpose.COIN, 100 + attempt
        )
        if attempt and u * (kept + offered.tail_mass) < kept:
            return int(offered.token_ids[0])
        return offer(self, offered, attempt)

    committed = output_law(oracle, monkeypatch, target, drafter, 1)
    np.testing.assert_allclose(committed, target, rtol=0, atol=1e-9)
    monkeypatch.setattr(RejectionSampler, "offer", flip_again)
    committed = output_law(oracle, monkeypatch, target, drafter, 1)
    assert abs(committed - target).max() > 0.01


@pytest.mark.parametrize("sparse_k", [0, 1, 2, 3])
def test_without_a_judged_draft_the_token_follows_the_target(oracle: Oracle, sparse_k: int) -> None:
    for target in dyadic_laws():
        judged = TargetDistribution(None, torch.from_numpy(target))

        def token(judged: TargetDistribution = judged) -> int | None:
            offered = judged.rejection(sparse_k, True, 0, POSITION, 0)
            return RejectionSampler(0, POSITION, None).offer(offered, 0)

        committed = oracle.enumerate(token)
        law = [committed.get(v, 0.0) for v in range(3)]
        np.testing.assert_allclose(law, target, rtol=0, atol=1e-9)


def coded(*contexts: tuple[int, ...]) -> torch.Tensor:
    """Logits rows that stand for P after these tokens: `pair_law` reads them."""
    return torch.tensor(
        [[float(int("1" + "".join(map(str, each)))), 0.0, 0.0] for each in contexts]
    )


# P and Q of the first token and, by it, of the second.
PAIR_TARGET = np.array([[4, 3, 1], [1, 6, 1], [8, 0, 0], [2, 3, 3]], np.float32) / 8
PAIR_DRAFTER = np.array([[3, 1, 4], [4, 3, 1], [3, 5, 0], [2, 2, 4]], np.float32) / 8


def pair_law(
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    takes_over: Callable[[list[int], list[int]], bool],
) -> dict[Hashable, float]:
    """The law of two tokens. The edge drafts both; they arrive in one frame or in two, at any
    moment. `takes_over` decides, by what is committed and by the chain, whether the cloud draws
    the next token itself where no draft of it has come."""

    def law_of(rows: np.ndarray, context: Sequence[int]) -> np.ndarray:
        law: np.ndarray = rows[0] if not context else rows[1 + context[0]]
        return law

    def process(row: torch.Tensor, *_: Any) -> TargetDistribution:
        context = [int(digit) for digit in str(int(row[0]))[1:]]
        return TargetDistribution(None, torch.from_numpy(law_of(PAIR_TARGET, context)))

    monkeypatch.setattr(verification, "process", process)
    params = VerificationParams(VerificationMode.SPLIT, SamplingParams(), True, 3, 3)

    def play() -> Hashable:
        chain: list[int] = []
        probs: list[float] = []
        for _ in range(2):
            law = law_of(PAIR_DRAFTER, chain)
            chain.append(oracle.race(law, None, Purpose.DRAFT, len(chain)))
            probs.append(float(law[chain[-1]]))
        committed: list[int] = [9] * POSITION
        queue = DraftQueue(VerificationMode.SPLIT, committed)
        num_sent = 0
        must_come = False  # the cloud waits for a draft
        while len(committed) < POSITION + 2:
            output = committed[POSITION:]
            while num_sent < 2 and (must_come or oracle.choose([0.5, 0.5])):
                must_come = False
                end = 2 if num_sent else 1 + oracle.choose([0.5, 0.5])
                frame = Draft(
                    0,
                    POSITION + num_sent,
                    token_ids=tuple(chain[num_sent:end]),
                    draft_probs=tuple(probs[num_sent:end]),
                )
                queue.add(frame, 0.0)
                num_sent = end
            work = queue.take(2)
            if work is None:
                must_come = num_sent < 2 and not takes_over(output, chain)
                if not must_come:
                    step = verify(
                        coded(tuple(output)), params, len(committed), [], [], step=StepKind.FIRST
                    )
                    committed += step.token_ids
                    queue.judged()
                continue
            drafts = list(work.token_ids)
            rows = coded(*(tuple(output + drafts[:count]) for count in range(len(drafts) + 1)))
            step = verify(rows, params, len(committed), drafts, work.draft_probs)
            position = len(committed) + step.num_accepted
            committed += drafts[: step.num_accepted]
            queue.judged(rejected=step.rejection is not None)
            if step.rejection is not None:
                drafted_from = Distribution(None, law_of(PAIR_DRAFTER, committed[POSITION:]))
                token_id = RejectionSampler(0, position, drafted_from).offer(step.rejection, 0)
                assert token_id is not None
                queue.add(Draft(1, position, token_ids=(token_id,), num_forced=1), 0.0)
                committed.append(token_id)
                num_sent = 2
        return tuple(committed[POSITION : POSITION + 2])

    return oracle.enumerate(play)


def law_error(law: dict[Hashable, float]) -> float:
    """How far two tokens are from the target's law, at most."""
    assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-9)
    return max(
        abs(law.get((a, b), 0.0) - float(PAIR_TARGET[0, a] * PAIR_TARGET[1 + a, b]))
        for a, b in itertools.product(range(3), repeat=2)
    )


def test_a_cloud_that_takes_over_at_any_moment_is_exact(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on alone or waits as it likes, by the past; late frames serve with their tail."""
    always = pair_law(oracle, monkeypatch, lambda committed, chain: True)
    assert law_error(always) < 1e-9
    by_the_past = pair_law(oracle, monkeypatch, lambda committed, chain: committed != [1])
    assert law_error(by_the_past) < 1e-9


def test_a_takeover_that_looks_at_a_draft_is_not_exact(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = pair_law(oracle, monkeypatch, lambda committed, chain: chain[len(committed)] == 2)
    assert law_error(law) > 0.01


def offer_of(
    ids: list[int], probs: list[float], tail: tuple[float, int, float] = (0.0, 0, 0.0)
) -> Rejection:
    tail_mass, tail_token_id, tail_prob = tail
    return make_rejection(
        token_ids=ids,
        probs=probs,
        tail_mass=tail_mass,
        tail_token_id=tail_token_id,
        tail_prob=tail_prob,
    )


def test_it_is_a_function_of_its_arguments() -> None:
    law = Distribution(None, np.array([0.5, 0.25, 0.25], np.float32))
    offered = offer_of([1], [0.3], (0.7, 2, 0.4))
    for seed in range(200):
        first = RejectionSampler(seed, POSITION, law).offer(offered, 0)
        assert RejectionSampler(seed, POSITION, law).offer(offered, 0) == first
        assert first in (1, 2, None)


def test_equal_to_rounding_the_token_follows_the_target() -> None:
    law = Distribution(None, np.array([0.25, 0.75], np.float32))
    offered = offer_of([1, 0], [0.75, 0.25], (-1e-17, 0, 0.0))
    tokens = [RejectionSampler(seed, POSITION, law).offer(offered, 0) for seed in range(4000)]
    assert 2900 < tokens.count(1) < 3100
    assert set(tokens) == {0, 1}


def test_however_little_is_kept_can_be_drawn() -> None:
    law = Distribution(None, np.array([1.0, 0.0, 0.0], np.float32))
    offered = offer_of([0, 1, 2], [1.0, 3e-42, 1e-42])
    tokens = [RejectionSampler(seed, POSITION, law).offer(offered, 0) for seed in range(200)]
    assert set(tokens) == {1, 2}


def test_a_tail_smaller_than_nothing_is_none() -> None:
    law = Distribution(None, np.array([0.5, 0.5, 0.0], np.float32))
    offered = offer_of([0, 2], [0.6, 0.4], (-1e-9, 1, 0.0))
    tokens = {RejectionSampler(seed, POSITION, law).offer(offered, 0) for seed in range(300)}
    assert tokens == {0, 2}


@pytest.mark.parametrize("tail_prob", [0.0, math.nan, -1.0])
@pytest.mark.parametrize("attempt", [0, 1, MAX_TAIL_ATTEMPTS])
def test_a_tail_sample_without_probability_is_never_taken(tail_prob: float, attempt: int) -> None:
    for drafted in ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0]):
        law = Distribution(None, np.array(drafted, np.float32))
        offered = offer_of([0], [0.5], (0.5, 2, tail_prob))
        for seed in range(50):
            assert RejectionSampler(seed, POSITION, law).offer(offered, attempt) == 0


def test_the_drafter_may_be_narrower_than_the_target() -> None:
    law = Distribution(None, np.array([0.5, 0.5], np.float32))
    offered = offer_of([70_000, 0], [0.5, 0.25], (0.25, 90_000, 0.25))
    tokens = {RejectionSampler(seed, POSITION, law).offer(offered, 0) for seed in range(300)}
    assert tokens == {70_000, 90_000}


def test_tail_samples_are_refused_only_so_often() -> None:
    law = Distribution(None, np.array([0.5, 0.5], np.float32))
    offered = offer_of([0], [0.5], (0.5, 1, 0.5))
    sampler = RejectionSampler(1, POSITION, law)
    assert sampler.offer(offered, MAX_TAIL_ATTEMPTS - 1) is None
    assert sampler.offer(offered, MAX_TAIL_ATTEMPTS) == 1
