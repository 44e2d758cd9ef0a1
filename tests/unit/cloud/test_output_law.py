"""The law of generated tokens, drafter to recovered token, by chi-square; and that it can fail.

The seeds are fixed, so every outcome is reproducible. Power: at these sample sizes a rejection
sampler that flips its coin again after "tail" is told from the right one with p < 1e-6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from cloud_server.engine.judging.verification import StepKind, VerificationParams, verify
from picospec.protocol.messages import EMPTY_TOKENS, Rejection, SamplingParams, VerificationMode
from picospec.sampling import noise
from picospec.sampling.distribution import draw, process
from picospec.sampling.noise import Purpose
from picospec.sampling.rejection import RejectionSampler, residual

SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED
NONE = EMPTY_TOKENS
WIDTH, SPARSE_K, NUM_SAMPLES = 16, 4, 20_000
_rng = np.random.default_rng(11)
# A Markov chain for each side: row t holds the logits after token t; the last, the start.
TARGET = (0.8 * _rng.normal(size=(WIDTH + 1, WIDTH))).astype(np.float32)
DRAFTER = (TARGET + 0.7 * _rng.normal(size=TARGET.shape)).astype(np.float32)
START = WIDTH

Offer = Callable[[RejectionSampler, Rejection, int], int | None]


def params_of(
    mode: VerificationMode, params: SamplingParams | None = None, exact: bool = True
) -> VerificationParams:
    return VerificationParams(mode, params or SamplingParams(), exact, SPARSE_K, WIDTH)


class Chain:
    """Generates tokens as both daemons would: as many drafts as are wanted, then what is left."""

    def __init__(
        self, params: VerificationParams, length: int = 2, offer: Offer = RejectionSampler.offer
    ) -> None:
        self._params = params
        self._length = length
        self._offer = offer
        self._drafter = [process(row, params.sampling, NONE, NONE) for row in DRAFTER]
        self._rows = torch.from_numpy(TARGET)

    def generate(self, seed: int) -> tuple[int, ...]:
        """The first `length` tokens of the generation with this seed."""
        sampling = dataclasses.replace(self._params.sampling, seed=seed)
        params = dataclasses.replace(self._params, sampling=sampling)
        context = [START]
        while (num_drafts := self._length + 1 - len(context)) > 0:
            context += self._round(params, context, num_drafts)
        return tuple(context[1 : self._length + 1])

    def counts(self, num_samples: int) -> NDArray[np.int64]:
        """How often each token, or pair, came out: [WIDTH] or [WIDTH, WIDTH]."""
        counts = np.zeros((WIDTH,) * self._length, np.int64)
        for seed in range(num_samples):
            counts[self.generate(seed)] += 1
        return counts

    def _round(self, params: VerificationParams, context: list[int], num_drafts: int) -> list[int]:
        """What one verification commits after `context`: drafts, then a token of either side."""
        seed, base = params.sampling.seed, len(context) - 1
        purpose = Purpose.DRAFT if params.mode is SPLIT else Purpose.COUPLED
        chain, probs = context[-1:], []
        for position in range(base, base + num_drafts):
            drafter = self._drafter[chain[-1]]
            chain.append(draw(drafter, seed, position, purpose))
            probs.append(drafter.prob(chain[-1]))
        step = verify(self._rows[chain], params, base, chain[1:], probs)
        tokens = [*chain[1 : step.num_accepted + 1], *step.token_ids]
        attempt, offered = 0, step.rejection
        while offered is not None:
            before, position = chain[step.num_accepted], base + step.num_accepted
            sampler = RejectionSampler(seed, position, self._drafter[before])
            recovered = self._offer(sampler, offered, attempt)
            if recovered is not None:
                return [*tokens, recovered]
            attempt += 1
            rows = self._rows[before : before + 1]
            offered = verify(
                rows, params, position, [], [], step=StepKind.PROBE, attempt=attempt
            ).rejection
        return tokens


def pair_law(params: SamplingParams) -> NDArray[np.float64]:
    """[WIDTH, WIDTH]: the target's own law of two tokens."""
    laws = [process(row, params, NONE, NONE).probs_of(range(WIDTH)) for row in TARGET]
    rows = np.stack(laws).astype(np.float64)
    rows /= rows.sum(axis=1, keepdims=True)
    return rows[START][:, None] * rows[:WIDTH]


def chisquare_pvalue(counts: NDArray[np.int64], law: NDArray[np.float64]) -> float:
    """Cells of which fewer than five are expected are counted together."""
    counts, expected = counts.ravel(), law.ravel() * counts.sum()
    if counts[expected == 0.0].any():
        return 0.0
    rare = expected < 5.0
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0.0
    return float(stats.chisquare(observed[kept], expected[kept]).pvalue)


FILTERED = SamplingParams(temperature=1.2, top_k=9, top_p=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
def test_pairs_follow_the_targets_law(mode: VerificationMode) -> None:
    counts = Chain(params_of(mode)).counts(NUM_SAMPLES)
    law = pair_law(SamplingParams())
    assert chisquare_pvalue(counts.sum(1), law.sum(1)) > 1e-3
    assert chisquare_pvalue(counts, law) > 1e-3


@pytest.mark.slow
def test_tokens_follow_the_targets_filtered_law() -> None:
    chain = Chain(params_of(SPLIT, FILTERED), length=1)
    assert chisquare_pvalue(chain.counts(NUM_SAMPLES), pair_law(FILTERED).sum(1)) > 1e-3


def flip_again(sampler: RejectionSampler, offered: Rejection, attempt: int) -> int | None:
    """A Rejection Sampler whose coin does not persist: each offer begins with a flip."""
    law = sampler.draft_law
    assert law is not None
    kept = residual(offered.probs, law.probs_of(offered.token_ids))
    mass = float(kept.sum())
    u = noise.uniform(sampler.seed, sampler.position, Purpose.COIN, 1000 + attempt)
    if attempt and u * (mass + offered.tail_mass) < mass:
        v = np.random.default_rng([sampler.seed, sampler.position, attempt]).choice(
            offered.token_ids, p=kept / mass
        )
        return int(v)
    return sampler.offer(offered, attempt)


def test_the_same_test_rejects_truncation() -> None:
    chain = Chain(params_of(SPLIT, exact=False))
    assert chisquare_pvalue(chain.counts(NUM_SAMPLES // 10), pair_law(SamplingParams())) < 1e-6


@pytest.mark.slow
def test_the_same_test_rejects_a_second_flip() -> None:
    chain = Chain(params_of(SPLIT), length=1, offer=flip_again)
    counts = chain.counts(NUM_SAMPLES)
    assert chisquare_pvalue(counts, pair_law(SamplingParams()).sum(1)) < 1e-6
