"""Processed distributions against a plain float64 reference, and the split rule's pieces."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from picospec.errors import NumericalError
from picospec.protocol.messages import EMPTY_TOKENS, SamplingParams
from picospec.sampling.distribution import Distribution, draw, process
from picospec.sampling.noise import Purpose
from picospec.sampling.rejection import accept, accept_tail, residual

NONE = EMPTY_TOKENS


def dense(law: Distribution, width: int) -> NDArray[np.float32]:
    return law.probs_of(np.arange(width))


def reference(
    logits: NDArray[np.floating],
    params: SamplingParams,
    prompt: NDArray[np.integer] = NONE,
    output: NDArray[np.integer] = NONE,
) -> NDArray[np.float64]:
    """The documented law, step by step in the simplest way: dense, sorted, float64."""
    x: NDArray[np.float64] = logits.astype(np.float64)
    for token_id, bias in params.logit_bias:
        x[token_id] += bias
    for token_id in set(prompt.tolist()) | set(output.tolist()):
        x[token_id] *= (
            1 / params.repetition_penalty if x[token_id] > 0 else params.repetition_penalty
        )
    for token_id in set(output.tolist()):
        x[token_id] -= params.presence_penalty
        x[token_id] -= params.frequency_penalty * np.count_nonzero(output == token_id)
    if params.temperature == 0:
        one_hot: NDArray[np.float64] = np.eye(len(x))[np.argmax(x)]
        return one_hot
    x = np.exp((x - x.max()) / params.temperature)
    x[x < params.min_p * x.max()] = 0.0
    if params.top_k:
        x[x < np.sort(x)[-min(params.top_k, len(x))]] = 0.0
    x /= x.sum()
    order = np.argsort(-x, kind="stable")
    before = np.cumsum(x[order]) - x[order]
    if params.top_p < 1.0:
        x[order[before >= params.top_p]] = 0.0
    x /= x.sum()
    return x


PARAMS = {
    "plain": SamplingParams(),
    "greedy": SamplingParams(temperature=0.0),
    "cold": SamplingParams(temperature=0.3),
    "hot": SamplingParams(temperature=1.7),
    "min_p": SamplingParams(min_p=0.04),
    "top_k": SamplingParams(top_k=7),
    "top_k 1": SamplingParams(top_k=1),
    "top_k beyond": SamplingParams(top_k=10**6),
    "top_p": SamplingParams(top_p=0.83),
    "top_p tiny": SamplingParams(top_p=1e-6),
    "top_p near 1": SamplingParams(top_p=0.9999),
    "all filters": SamplingParams(temperature=1.3, min_p=0.01, top_k=20, top_p=0.9),
    "presence": SamplingParams(presence_penalty=1.3),
    "frequency": SamplingParams(frequency_penalty=-0.7),
    "repetition": SamplingParams(repetition_penalty=1.4),
    "repetition below 1": SamplingParams(repetition_penalty=0.6),
    "bias": SamplingParams(logit_bias=((3, 4.0), (5, -100.0))),
    "greedy penalised": SamplingParams(
        temperature=0.0, presence_penalty=2.0, logit_bias=((1, 9.0),)
    ),
    "everything": SamplingParams(
        temperature=0.8,
        top_p=0.95,
        top_k=40,
        min_p=0.002,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias=((2, 1.5), (9, -3.0)),
    ),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("width", [16, 1000])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_process_follows_the_documented_law(
    params: SamplingParams, width: int, spread: float
) -> None:
    rng = np.random.default_rng(width)
    for _ in range(5):
        logits = (spread * rng.normal(size=width)).astype(np.float32)
        untouched = logits.copy()
        prompt, output = rng.integers(0, width, 12), rng.integers(0, width, 9)
        law = process(logits, params, prompt, output)
        expected = reference(logits, params, prompt, output)
        np.testing.assert_allclose(dense(law, width), expected, rtol=2e-4, atol=1e-7)
        assert abs(law.probs.sum(dtype=np.float64) - 1.0) < 1e-5
        assert law.probs.dtype == np.float32
        assert np.array_equal(logits, untouched)
        if law.token_ids is not None:
            assert law.token_ids.dtype == np.int32
            assert (np.diff(law.token_ids) > 0).all()


def test_only_survivors_are_listed() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32))
    law = process(logits, SamplingParams(top_k=2), NONE, NONE)
    assert law.token_ids is not None
    assert law.token_ids.tolist() == [1, 2]
    np.testing.assert_allclose(law.probs, [4 / 7, 3 / 7], rtol=1e-6)
    assert process(logits, SamplingParams(), NONE, NONE).token_ids is None


def test_ties_at_a_border() -> None:
    logits = np.array([1.0, 2.0, 1.0, 2.0, 1.0], np.float32)

    def survivors(params: SamplingParams) -> list[int]:
        law = process(logits, params, NONE, NONE)
        assert law.token_ids is not None
        return [int(token_id) for token_id in law.token_ids]

    assert survivors(SamplingParams(top_k=1)) == [1, 3]
    assert survivors(SamplingParams(top_k=3)) == [0, 1, 2, 3, 4]
    assert survivors(SamplingParams(min_p=1.0)) == [1, 3]
    assert survivors(SamplingParams(top_p=0.3)) == [1]
    assert survivors(SamplingParams(top_p=0.7)) == [0, 1, 3]
    assert survivors(SamplingParams(temperature=0.0)) == [1]
    assert survivors(SamplingParams(top_p=1e-9, temperature=1e3)) == [1]


def test_top_p_keeps_at_least_one_of_equal_tokens() -> None:
    law = process(np.zeros(49_152, np.float32), SamplingParams(top_p=1e-9), NONE, NONE)
    assert law.token_ids is not None
    assert law.token_ids.tolist() == [0]
    law = process(np.zeros(1000, np.float32), SamplingParams(top_p=0.5), NONE, NONE)
    assert law.token_ids is not None
    assert law.token_ids.tolist() == list(range(500))


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    law = process(logits, SamplingParams(top_k=2, top_p=0.55), NONE, NONE)
    assert law.token_ids is not None
    assert law.token_ids.tolist() == [0]


def test_penalties_count_drafts_and_leave_the_prompt_to_repetition() -> None:
    logits = np.array([1.0, -1.0, 2.0, 0.5], np.float32)
    prompt, output = np.array([0, 0, 1]), np.array([2, 2])
    law = process(logits, SamplingParams(frequency_penalty=0.5), prompt, output)
    np.testing.assert_allclose(law.prob(2) / law.prob(0), 1.0, rtol=1e-5)
    law = process(logits, SamplingParams(repetition_penalty=2.0), prompt, output)
    np.testing.assert_allclose(np.log(law.prob(0) / law.prob(1)), 0.5 + 2.0, rtol=1e-5)
    np.testing.assert_allclose(np.log(law.prob(2) / law.prob(3)), 1.0 - 0.5, rtol=1e-5)


def test_ids_beyond_the_width_are_ignored() -> None:
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    params = SamplingParams(logit_bias=((7, 5.0),), repetition_penalty=1.5, presence_penalty=1.0)
    law = process(logits, params, np.array([99]), np.array([3, 100]))
    np.testing.assert_allclose(law.probs, np.exp(logits) / np.exp(logits).sum(), rtol=1e-6)


def test_minus_infinity_excludes_a_token() -> None:
    logits = np.array([-math.inf, 0.0, -math.inf, 1.0], np.float32)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.5, top_k=3),
        SamplingParams(top_p=0.99, min_p=0.01),
        SamplingParams(repetition_penalty=1.5, frequency_penalty=1.0),
    ):
        law = process(logits, params, np.array([0, 1]), np.array([2, 2]))
        assert law.prob(0) == law.prob(2) == 0.0
        assert math.isclose(law.prob(1) + law.prob(3), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("name", ["plain", "greedy", "top_k", "top_p", "presence"])
def test_logits_without_a_law_are_refused(bad: list[float], name: str) -> None:
    with pytest.raises(NumericalError, match="do not define a probability distribution"):
        process(np.array(bad, np.float32), PARAMS[name], NONE, NONE)


def test_extreme_but_legal_values_give_a_law() -> None:
    logits = np.array([3e38, -3e38, 1.0, 2.9e38], np.float32)
    with np.errstate(over="ignore"):
        law = process(logits, SamplingParams(temperature=1e-4, top_p=0.5), NONE, NONE)
    assert law.prob(0) == 1.0
    law = process(np.array([5.0, 4.0]), SamplingParams(temperature=2e-5), NONE, NONE)
    assert law.prob(0) == 1.0
    half = np.array([1.0, 2.0], np.float16)
    assert process(half, SamplingParams(), NONE, NONE).probs.dtype == np.float32


def test_prob_of_ids_that_are_not_in_it() -> None:
    sparse = Distribution(np.array([3, 8], np.int32), np.array([0.25, 0.75], np.float32))
    assert [sparse.prob(i) for i in (-1, 0, 3, 8, 9, 2**31)] == [0, 0, 0.25, 0.75, 0, 0]
    full = Distribution(None, np.array([0.25, 0.75], np.float32))
    assert full.probs_of([-1, 0, 1, 2]).tolist() == [0, 0.25, 0.75, 0]


def test_draw_follows_the_distribution() -> None:
    logits = np.log(np.array([0.05, 0.4, 0.3, 0.2, 0.05], np.float32))
    for params in (SamplingParams(), SamplingParams(top_k=3)):
        law = process(logits, params, NONE, NONE)
        drawn = [draw(law, 1, position, Purpose.DRAFT) for position in range(20_000)]
        expected = dense(law, 5).astype(np.float64)
        support = expected > 0
        counts = np.bincount(drawn, minlength=5)
        assert counts[~support].sum() == 0
        share = expected[support] / expected.sum()
        assert stats.chisquare(counts[support], share * len(drawn)).pvalue > 1e-3


def test_accept_is_the_ratio_test() -> None:
    assert accept(0.49, 0.25, 0.5)
    assert not accept(0.51, 0.25, 0.5)
    assert accept(0.999, 0.5, 0.5)
    assert accept(0.999, 0.9, 0.1)
    assert not accept(1e-9, 0.0, 0.5)


def test_accept_tail_is_the_residual_share() -> None:
    assert accept_tail(0.74, 0.4, 0.1)
    assert not accept_tail(0.76, 0.4, 0.1)
    assert accept_tail(0.999, 0.4, 0.0)
    assert not accept_tail(1e-9, 0.1, 0.1)
    assert not accept_tail(1e-9, 0.1, 0.4)
    assert not accept_tail(0.5, 0.0, 0.0)


def test_residual_is_what_the_draft_law_lacks() -> None:
    lacking = residual(np.array([0.5, 0.25, 0.25], np.float32), np.array([0.25, 0.5, 0.25]))
    assert lacking.tolist() == [0.25, 0.0, 0.0]
