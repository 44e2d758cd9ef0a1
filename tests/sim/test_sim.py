"""Both ends joined in memory: whatever the network does, the output is the target's own.

Coupled and greedy runs are compared token for token; sampled split runs by their law
(chi-square over the first three tokens; the exact expectation is enumerated).
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from picospec.protocol import validation
from picospec.protocol.edge_machine import SpeculationPolicy
from picospec.protocol.messages import AssistPolicy, SamplingParams, VerificationMode
from tests.sim.toy import Language, context_of, decode, random_prompt
from tests.sim.world import Faults, Scenario, Times, World

SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED
VOCAB = 8
NUM_SEEDS = 40  # for each mode, temperature and fault level

FAULTS = {
    "clean": Faults(take_over=0.5),
    "hostile": Faults(
        lose=0.02, lose_in_recovery=0.2, repeat=0.2, preempt=0.2, change=0.1, take_over=0.3
    ),
    "cut to pieces": Faults(lose=0.12, lose_in_recovery=0.5, repeat=0.1, take_over=0.7),
    "drafters die": Faults(crash=0.3, lose=0.02, take_over=0.3),
}


def scenario(seed: int, mode: VerificationMode, temperature: float, faults: Faults) -> Scenario:
    rng = random.Random(f"{seed} {mode} {temperature}")
    params = SamplingParams(temperature=temperature, top_k=rng.choice([0, 5]))
    fast_verify = rng.random() < 0.6
    assists = list(AssistPolicy) if fast_verify or mode is COUPLED else [AssistPolicy.NEVER]
    policy = SpeculationPolicy(
        mode=mode,
        draft_length=rng.choice([1, 2, 4, 8]),
        window=rng.choice([1, 2, 4, 7, 16]),
        parallel_draft=rng.random() < 0.7,
        fast_verify=fast_verify,
        sparse_k=rng.choice([1, 2, 3, 8]),
        split_rejection=rng.random() < 0.8,
        confidence_stop=rng.choice([0.0, 0.0, 0.4]),
        round_timeout_s=rng.choice([0.0, 2.0]),
        assist=rng.choice(assists),
    )
    return Scenario(
        language=Language(VOCAB, seed % 20, rng.choice([0.0, 0.5, 0.9, 1.0]), params),
        policy=policy,
        prompt=tuple(random_prompt(rng, VOCAB)),
        seed=seed,
        max_tokens=rng.choice([1, 16, 32]),
        stop=rng.choice([(), (0,)]),
        faults=faults,
        times=Times(rng.choice([1, 10, 50]), rng.choice([1, 5]), rng.choice([0.3, 3.0])),
    )


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize(("mode", "temperature"), [(SPLIT, 0.0), (COUPLED, 0.0), (COUPLED, 1.0)])
def test_greedy_and_coupled_output_is_the_targets_own(
    mode: VerificationMode, temperature: float, faults: str
) -> None:
    resumes = late = 0
    for seed in range(NUM_SEEDS):
        run = scenario(seed, mode, temperature, FAULTS[faults])
        world = World(run)
        expected = decode(run.language, run.prompt, seed, run.max_tokens, run.stop)
        assert world.run() == expected, f"seed {seed}: {run.policy}"
        resumes, late = resumes + world.resumes, late + world.late_frames
    if FAULTS[faults].lose_in_recovery:
        assert resumes > NUM_SEEDS / 4
        assert late > 0, "no late frame of a lost stream came: the test tests nothing"


@pytest.mark.parametrize("faults", FAULTS)
def test_sampled_split_runs_end(faults: str) -> None:
    for seed in range(NUM_SEEDS):
        run = scenario(seed, SPLIT, 1.0, FAULTS[faults])
        output = World(run).run()
        assert len(output) == run.max_tokens or output[-1] in run.stop


def test_one_seed_replays_a_run_exactly() -> None:
    for mode in VerificationMode:
        run = scenario(3, mode, 1.0, FAULTS["hostile"])
        first, second = World(run), World(run)
        assert first.run() == second.run()
        assert first.trace.digest() == second.trace.digest()
        other = World(replace(run, seed=4))
        other.run()
        assert other.trace.digest() != first.trace.digest()


def test_a_clean_split_run_depends_on_its_seed_alone() -> None:
    """As docs/protocol.md promises: timing decides nothing if the link holds and the cloud waits.

    Where the drafter proposes everywhere, the window does not matter either.
    """
    run = scenario(5, SPLIT, 1.0, Faults())
    run = replace(run, language=Language(VOCAB, 1, 0.9, SamplingParams()), max_tokens=24)
    run = replace(run, policy=replace(run.policy, assist=AssistPolicy.NEVER))
    outputs = {
        tuple(World(replace(run, times=Times(link, 5, draft))).run())
        for link in (1, 10, 100)
        for draft in (0.1, 4)
    }
    assert len(outputs) == 1


# -- the law of sampled split output -----------------------------------------------------------

LAW_VOCAB = 4
NUM_TOKENS = 3
NUM_RUNS = 7_000  # of each kind


def law_scenario(
    seed: int, faults: Faults, *, forget_judged: bool = False, reinterpret: bool = False
) -> Scenario:
    return Scenario(
        language=LAW_LANGUAGE,
        policy=SpeculationPolicy(
            mode=SPLIT,
            draft_length=2,
            window=(1, 4)[seed % 2],
            fast_verify=seed % 4 < 2 or faults.take_over > 0,
            parallel_draft=seed % 8 < 6,
            sparse_k=1,  # most recovered tokens come from the tail, often by a probe
            assist=AssistPolicy.AUTO if faults.take_over else AssistPolicy.NEVER,
        ),
        prompt=(1, 2),
        seed=seed,
        max_tokens=NUM_TOKENS,
        faults=faults,
        times=Times(link=2, draft=0.5),  # so that the cloud often has drafts to judge
        over_the_wire=False,
        forget_judged=forget_judged,
        successor=SUCCESSOR,
        reinterpret=reinterpret,
    )


LAW_LANGUAGE = Language(LAW_VOCAB, 6, 0.3, SamplingParams(temperature=1.3))
SUCCESSOR = Language(LAW_VOCAB, 11, 0.0, SamplingParams(temperature=0.5))  # of its Q


def p_value(outputs: Counter[tuple[int, ...]]) -> float:
    """Of the chi-square test of `outputs` against the target's law of NUM_TOKENS tokens."""
    total = sum(outputs.values())
    observed, expected = [], []
    for tokens in itertools.product(range(LAW_VOCAB), repeat=NUM_TOKENS):
        prob, text = 1.0, [1, 2]
        for token_id in tokens:
            prob *= LAW_LANGUAGE.target(context_of(text)).prob(token_id)
            text.append(token_id)
        observed.append(outputs[tokens])
        expected.append(prob * total)
    rare = [index for index, count in enumerate(expected) if count < 5]
    if rare:
        observed = [n for i, n in enumerate(observed) if i not in rare] + [
            sum(observed[i] for i in rare)
        ]
        expected = [n for i, n in enumerate(expected) if i not in rare] + [
            sum(expected[i] for i in rare)
        ]
    scale = total / sum(expected)  # float32 laws
    return float(stats.chisquare(observed, [n * scale for n in expected]).pvalue)


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        Faults(),
        Faults(lose=0.05),
        Faults(lose_in_recovery=0.6),
        Faults(take_over=0.4),
        Faults(take_over=0.3, lose=0.05, change=0.2),
        Faults(crash=0.4),
        Faults(crash=0.4, take_over=0.3, lose=0.05),
    ],
    ids=[
        "clean",
        "links lost",
        "links lost in recovery",
        "taken over",
        "taken over, links lost",
        "drafters die",
        "drafters die, taken over, links lost",
    ],
)
def test_sampled_split_output_follows_the_targets_law(faults: Faults) -> None:
    outputs: Counter[tuple[int, ...]] = Counter()
    resumes = orphans = rejected = 0
    for seed in range(NUM_RUNS):
        world = World(law_scenario(seed, faults))
        outputs[tuple(world.run())] += 1
        resumes, orphans = resumes + world.resumes, orphans + world.orphans
        rejected += world.num_rejected
    assert rejected > 0.25 * NUM_RUNS, "rejections are what the test has its power from"
    if faults.lose or faults.lose_in_recovery:
        assert resumes > NUM_RUNS / 5
    if faults.crash:
        assert orphans > NUM_RUNS / 5, "the drafts of drafters that died are what is tested"
    assert p_value(outputs) > 1e-4


@pytest.mark.parametrize("take_over", [0.0, 0.3])
def test_the_law_test_rejects_a_wrong_residual(take_over: float) -> None:
    """Negative control: an edge that forgets what it drafted draws from P instead of P - Q."""
    faults = Faults(take_over=take_over)
    outputs = Counter(
        tuple(World(law_scenario(seed, faults, forget_judged=True)).run()) for seed in range(3000)
    )
    assert p_value(outputs) < 1e-6


def test_the_law_test_rejects_takeovers_that_look_at_a_draft() -> None:
    """Negative control: the cloud draws itself where the draft is odd."""
    outputs = Counter(
        tuple(World(law_scenario(seed, Faults(take_over=0.4, peek=True))).run())
        for seed in range(2000)
    )
    assert p_value(outputs) < 1e-6


def test_the_law_test_rejects_a_q_that_a_draft_was_not_drawn_from() -> None:
    """Negative control: a successor's Q in the place of the one that its drafter died with."""
    outputs = Counter(
        tuple(World(law_scenario(seed, Faults(crash=0.4), reinterpret=True)).run())
        for seed in range(3000)
    )
    assert p_value(outputs) < 1e-6


class EndingDrafts(Language):
    """The drafter has nothing to propose behind a 0."""

    def draft_logits(self, context: tuple[int, ...]) -> np.ndarray | None:
        return None if context[-1] == 0 else super().draft_logits(context)


@pytest.mark.slow
@pytest.mark.parametrize("fast_verify", [True, False])
def test_takeovers_would_tell_whole_rounds_apart(
    fast_verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the cloud refuses them together (validation.check_open): a round that ends early comes
    sooner, so a 0 is judged where another token is overtaken."""
    monkeypatch.setattr(validation, "check_open", lambda request, card: None)
    language = EndingDrafts(LAW_VOCAB, 6, 0.3, SamplingParams(temperature=1.3))
    expected = variance = observed = 0.0
    for seed in range(4000):
        run = law_scenario(seed, Faults(take_over=0.1))
        policy = replace(
            run.policy, fast_verify=fast_verify, parallel_draft=True, draft_length=6, window=12
        )
        times = Times(link=1, step=5, draft=15, prefill=1)
        run = replace(run, language=language, policy=policy, times=times, max_tokens=8)
        text = [*run.prompt, *World(run).run()]
        for position in range(3, len(text)):
            prob = language.target(context_of(text[:position])).prob(0)
            expected, variance = expected + prob, variance + prob * (1.0 - prob)
            observed += text[position] == 0
    deviation = (observed - expected) / math.sqrt(variance)
    assert (abs(deviation) < 3.9) == fast_verify, deviation
