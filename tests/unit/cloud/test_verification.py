"""The cloud's judgement: torch equals numpy, what a Rejection holds, and each mode's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from cloud_server.engine.judging import torch_noise
from cloud_server.engine.judging.torch_sampling import (
    REJECTION_TAIL_MASS_MAX,
    TargetDistribution,
    process,
    process_on_device,
)
from cloud_server.engine.judging.verification import StepKind, VerificationParams, verify
from picospec.errors import NumericalError
from picospec.protocol.messages import EMPTY_TOKENS, SamplingParams, VerificationMode
from picospec.sampling import distribution, noise
from picospec.sampling.distribution import draw
from picospec.sampling.noise import Purpose
from tests.unit.core.test_noise import EDGE_BITS
from tests.unit.core.test_sampling import PARAMS

SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED
NONE = EMPTY_TOKENS
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def params_of(
    mode: VerificationMode = SPLIT,
    sampling: SamplingParams | None = None,
    exact: bool = True,
    sparse_k: int = 64,
    width: int = 16,
) -> VerificationParams:
    return VerificationParams(mode, sampling or SamplingParams(), exact, sparse_k, width)


# ------------------------------------------------------------------ torch equals numpy


@pytest.mark.parametrize("device", DEVICES)
def test_torch_noise_is_numpy_noise_bit_for_bit(device: str) -> None:
    table = torch_noise.premixed_table(49_152, torch.device(device))
    for seed in range(12):
        key = noise.noise_key(seed, 1000 - seed, Purpose.COUPLED, seed % 3)
        bits = noise.token_hash(noise.premixed_table(49_152), key)
        torch_bits = torch_noise.token_hash(table, key)
        assert np.array_equal(torch_bits.cpu().numpy().view(np.uint32), bits)
        exponential = torch_noise.exponential(torch_bits).cpu().numpy()
        assert np.array_equal(exponential.view(np.uint32), noise.exponential(bits).view(np.uint32))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_exponential_equals_numpy_on_edge_cases(device: str) -> None:
    bits = torch.from_numpy(EDGE_BITS.view(np.int32)).to(device)
    exponential = torch_noise.exponential(bits).cpu().numpy()
    assert np.array_equal(exponential.view(np.uint32), noise.exponential(EDGE_BITS).view(np.uint32))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_race_has_numpys_winner(device: str) -> None:
    rng = np.random.default_rng(3)
    token_ids = np.sort(rng.choice(49_152, 300, replace=False)).astype(np.int32)
    for position in range(50):
        probs = rng.dirichlet(np.full(300, 0.1)).astype(np.float32)
        tensor, ids = torch.from_numpy(probs).to(device), torch.from_numpy(token_ids).to(device)
        winner = noise.race(probs, token_ids, 2, position, Purpose.TAIL, 1)
        key = noise.noise_key(2, position, Purpose.TAIL, 1)
        assert torch_noise.full_race(tensor, ids, key) == winner
        assert torch_noise.race(tensor, ids, 2, position, Purpose.TAIL, 1) == winner
        dense = noise.race(probs, None, 2, position, Purpose.TAIL, 1)
        assert torch_noise.full_race(tensor, None, key) == dense


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_torch_process_equals_numpys(params: SamplingParams, device: str) -> None:
    rng = np.random.default_rng(5)
    for width in (3, 16, 5000):
        logits = (2.0 * rng.normal(size=width)).astype(np.float32)
        logits[rng.integers(width)] = -math.inf
        logits = np.append(logits, [-1.0] * 10).astype(np.float32)
        prompt, output = rng.integers(0, width, 12), rng.integers(0, width, 9)
        expected = distribution.process(logits, params, prompt, output)
        row = torch.from_numpy(logits).to(device)
        for compute in (process, process_on_device):
            law = compute(row, params, prompt, output)
            assert (law.token_ids is None) == (expected.token_ids is None)
            if law.token_ids is not None:
                assert law.token_ids.tolist() == expected.token_ids.tolist()
            np.testing.assert_allclose(law.probs.cpu(), expected.probs, rtol=1e-5, atol=1e-9)
        assert np.array_equal(row.cpu().numpy(), logits)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("name", ["plain", "greedy", "top_k", "top_p", "presence"])
def test_logits_without_a_law_are_refused(bad: list[float], name: str) -> None:
    with pytest.raises(NumericalError, match="do not define a probability distribution"):
        process_on_device(torch.tensor(bad), PARAMS[name], NONE, NONE)
    with pytest.raises(NumericalError, match="do not define a probability distribution"):
        verify(torch.tensor([bad]), params_of(COUPLED, PARAMS[name], width=2), 0, [], [])


# ------------------------------------------------------------------ what a Rejection holds


def test_rejection_is_the_smallest_top_k() -> None:
    probs = torch.tensor([0.0, 0.3, 0.6, 0.0995, 0.0005])
    target = TargetDistribution(None, probs)
    full = target.rejection(64, True, 0, 0, 0)
    assert full.token_ids.tolist() == [2, 1, 3]
    assert full.token_ids.dtype == np.int32
    assert full.probs.tolist() == pytest.approx([0.6, 0.3, 0.0995])
    assert full.tail_mass == pytest.approx(0.0005)
    assert full.tail_mass <= REJECTION_TAIL_MASS_MAX
    assert (full.tail_token_id, full.tail_prob) == (4, pytest.approx(0.0005))
    small = target.rejection(1, True, 0, 0, 0)
    assert small.token_ids.tolist() == [2]
    assert small.tail_mass == pytest.approx(0.4)
    assert {target.rejection(1, True, s, 0, 0).tail_token_id for s in range(99)} <= {1, 3, 4}


def test_rejection_without_a_limit_is_all_of_the_law_in_order() -> None:
    target = TargetDistribution(None, torch.tensor([0.0, 0.3, 0.6995, 0.0005]))
    whole = target.rejection(0, True, 0, 0, 0)
    assert whole.token_ids.tolist() == [0, 1, 2, 3]
    assert whole.probs.tolist() == target.probs.tolist()
    assert whole.tail_mass == 0.0
    assert TargetDistribution(torch.tensor([7]), torch.ones(1)).rejection(
        64, True, 0, 0, 0
    ).token_ids.tolist() == [7]


def test_a_tail_below_rounding_is_none() -> None:
    target = TargetDistribution(None, torch.tensor([1.0, 1e-40, 1e-42]))
    assert target.rejection(64, True, 0, 0, 0).tail_mass == 0.0


def test_rejection_of_a_filtered_law_names_token_ids() -> None:
    target = TargetDistribution(torch.tensor([3, 70, 900]), torch.tensor([0.2, 0.5, 0.3]))
    offered = target.rejection(2, True, 1, 0, 0)
    assert offered.token_ids.tolist() == [70, 900]
    assert (offered.tail_token_id, offered.tail_prob) == (3, pytest.approx(0.2))
    assert target.rejection(3, True, 1, 0, 0).tail_mass == 0.0


def test_truncation_renormalises() -> None:
    target = TargetDistribution(None, torch.tensor([0.5, 0.3, 0.2]))
    truncated = target.rejection(2, False, 0, 0, 0)
    assert truncated.probs.tolist() == pytest.approx([0.625, 0.375])
    assert truncated.tail_mass == 0.0


def test_tail_samples_of_different_attempts_follow_the_tail() -> None:
    target = TargetDistribution(None, torch.tensor([0.5, 0.1, 0.15, 0.25]))
    tails = [target.rejection(1, True, 4, 8, a).tail_token_id for a in range(5000)]
    counts = np.bincount(tails, minlength=4)[1:]
    assert stats.chisquare(counts, np.array([0.2, 0.3, 0.5]) * 5000).pvalue > 1e-3


# ------------------------------------------------------------------ each mode's rules


def rows_of(*best: int, width: int = 16, peak: float = 50.0) -> torch.Tensor:
    """Logits whose rows all but surely yield the tokens `best`."""
    logits = torch.zeros(len(best), width)
    logits[range(len(best)), list(best)] = peak
    return logits


GREEDY = SamplingParams(temperature=0.0)
SURE = SamplingParams(seed=1)
SURE_PENALISED = SamplingParams(temperature=0.0, repetition_penalty=1.01)


@pytest.mark.parametrize("params", [GREEDY, SURE, SURE_PENALISED], ids=["0", "1", "penalised"])
@pytest.mark.parametrize(
    ("drafts", "num_accepted"),
    [([], 0), ([3], 1), ([4], 0), ([3, 5, 7], 3), ([3, 5, 8], 2), ([3, 6, 7], 1)],
)
def test_sure_drafts(params: SamplingParams, drafts: list[int], num_accepted: int) -> None:
    best = [3, 5, 7, 9]
    logits = rows_of(*best[: len(drafts) + 1])
    step = verify(logits, params_of(COUPLED, params), 10, drafts, [])
    assert (step.num_accepted, step.token_ids) == (num_accepted, (best[num_accepted],))
    assert step.rejection is None
    step = verify(logits, params_of(SPLIT, params), 10, drafts, [1.0] * len(drafts))
    assert (step.num_accepted, step.token_ids) == (num_accepted, ())
    if num_accepted == len(drafts):
        assert step.rejection is None
    else:
        assert step.rejection is not None
        assert step.rejection.token_ids.tolist() == [best[num_accepted]]
        assert step.rejection.probs.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("params", [GREEDY, SURE], ids=["0", "1"])
def test_steps_without_drafts(params: SamplingParams) -> None:
    logits = rows_of(3)
    for kind in StepKind:
        step = verify(logits, params_of(COUPLED, params), 10, [], [], step=kind)
        assert step.token_ids == (3,)
    first = verify(logits, params_of(SPLIT, params), 10, [], [], step=StepKind.FIRST)
    assert (first.token_ids, first.rejection) == ((3,), None)
    probe = verify(logits, params_of(SPLIT, params), 10, [], [], step=StepKind.PROBE, attempt=2)
    assert probe.token_ids == ()
    assert probe.rejection is not None
    assert probe.rejection.token_ids.tolist() == [3]
    nothing = verify(logits, params_of(SPLIT, params), 10, [], [])
    assert (nothing.num_accepted, nothing.token_ids, nothing.rejection) == (0, (), None)


def test_draws_use_their_own_noise() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(seed=6)
    target = distribution.process(logits[0].numpy(), params, NONE, NONE)
    split, coupled = params_of(SPLIT, params, width=500), params_of(COUPLED, params, width=500)
    first = verify(logits, split, 31, [], [], step=StepKind.FIRST)
    assert first.token_ids == (draw(target, 6, 31, Purpose.FIRST),)
    shared = verify(logits, coupled, 31, [], [])
    assert shared.token_ids == (draw(target, 6, 31, Purpose.COUPLED),)
    tails = set()
    for attempt in range(3):
        probe = verify(logits, split, 31, [], [], step=StepKind.PROBE, attempt=attempt)
        assert probe.rejection is not None
        tails.add(probe.rejection.tail_token_id)
    assert len(tails) > 1


def test_coupled_accepts_exactly_what_it_would_draw() -> None:
    """With the drafter equal to the target every draft is accepted; the text is the same."""
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    shared = params_of(COUPLED, SamplingParams(seed=9, top_p=0.95), width=200)
    alone = [
        verify(logits[i : i + 1], shared, 20 + i, [], []).token_ids[0] for i in range(len(logits))
    ]
    step = verify(logits, shared, 20, alone[:5], [])
    assert (step.num_accepted, step.token_ids) == (5, (alone[5],))
    wrong = [*alone[:3], (alone[3] + 1) % 200, alone[4]]
    step = verify(logits, shared, 20, wrong, [])
    assert (step.num_accepted, step.token_ids) == (3, (alone[3],))


def test_nothing_after_the_first_rejection_is_looked_at() -> None:
    logits = rows_of(3, 5, 7)
    logits[2] = math.nan
    assert verify(logits, params_of(SPLIT), 0, [3, 6], [1.0, 1.0]).num_accepted == 1
    assert verify(logits, params_of(COUPLED), 0, [3, 6], []).token_ids == (5,)


def test_padding_and_surplus_rows_are_ignored() -> None:
    logits = rows_of(3, 5, 7, width=20)
    logits[:, 16:] = 90.0
    for params in (GREEDY, SURE):
        assert verify(logits, params_of(COUPLED, params), 0, [3], []).token_ids == (5,)


def test_penalties_see_the_drafts_before_a_row() -> None:
    """Presence penalty 2 turns the second and third row away from the tokens drafted before."""
    logits = torch.zeros(3, 16)
    logits[:, 3], logits[:, 5], logits[:, 7] = 2.5, 1.5, 0.75
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    untouched = logits.clone()
    step = verify(logits, params_of(COUPLED, params), 4, [3, 5], [], NONE, NONE)
    assert (step.num_accepted, step.token_ids) == (2, (7,))
    step = verify(logits, params_of(COUPLED, params), 4, [3, 5], [], NONE, np.array([3]))
    assert (step.num_accepted, step.token_ids) == (0, (5,))
    step = verify(logits, params_of(SPLIT, params), 4, [3, 3], [1.0, 1.0], NONE, NONE)
    assert step.num_accepted == 1
    assert step.rejection is not None
    assert step.rejection.token_ids.tolist() == [5]
    assert torch.equal(logits, untouched)


def test_greedy_honours_the_bias() -> None:
    params = SamplingParams(temperature=0.0, logit_bias=((3, -100.0), (5, 1.0)))
    assert verify(rows_of(3, 3), params_of(COUPLED, params), 0, [5], []).num_accepted == 1


def test_a_draft_beyond_the_width_is_rejected() -> None:
    assert verify(rows_of(3, 5), params_of(SPLIT), 0, [400], [0.5]).num_accepted == 0


def test_half_precision_logits_are_judged_too() -> None:
    logits = rows_of(3, 5).to(torch.bfloat16)
    assert verify(logits, params_of(COUPLED), 0, [3], []).token_ids == (5,)
