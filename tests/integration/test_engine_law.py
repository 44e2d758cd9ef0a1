"""Sampled output of the real engine follows the target's law.

n = 20,000 generations a case, chi-square of the first token, the first pair and the second pair.
Power: the tests' own negative control, the paper's truncation, is rejected with p below 1e-9; a
bias that moves 1.5 % of the probability mass between two tokens of a tenth each is found with
probability above 0.99 (noncentrality n * delta^2 / p = 20000 * 0.015^2 * 20 = 90 on 31 degrees).
With fixed seeds the outcome is reproducible; the threshold leaves 1e-4 a test to chance.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cloud_server.engine.client import VLLMEngine
from picospec.protocol.messages import SamplingParams, VerificationMode
from picospec.sampling.distribution import Distribution
from tests.support.builders import COUPLED, SPLIT
from tests.support.direct_edge import generate
from tests.support.reference import Reference
from tests.support.tiny import VOCAB_SIZE

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(600),
]

PROMPT = [1, 2, 3, 4, 5]
NUM_SAMPLES = 20_000
CONCURRENCY = 64
P_MIN = 1e-4

# Fixed drafter laws by the last token: mostly wrong, with mass where the target has little.
_DRAFT_LAWS = [
    Distribution(
        None, np.random.default_rng(1000 + last).dirichlet(np.full(VOCAB_SIZE, 0.4)).astype("f4")
    )
    for last in range(VOCAB_SIZE)
]


def drafts(context: Sequence[int]) -> Distribution:
    return _DRAFT_LAWS[context[-1]]


async def sample(
    engine: VLLMEngine,
    mode: VerificationMode,
    sampling: SamplingParams,
    num_samples: int = NUM_SAMPLES,
    **options: object,
) -> NDArray[np.int64]:
    """[num_samples, 3]: the first three tokens of generations with seeds 0, 1, 2 ..."""
    seeds = iter(range(num_samples))
    rows: list[list[int]] = []

    async def worker() -> None:
        for seed in seeds:
            outcome = await generate(
                engine,
                PROMPT,
                drafts,
                mode=mode,
                max_tokens=3,
                sampling=SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    seed=seed,
                ),
                draft_length=2,
                **options,  # type: ignore[arg-type]
            )
            rows.append(outcome.token_ids)
            counts["taken over"] += outcome.taken_over
            counts["accepted"] += outcome.accepted

    counts: Counter[str] = Counter()
    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    if options.get("lateness") is not None:
        assert min(counts["taken over"], counts["accepted"]) > num_samples / 100, counts
    return np.asarray(rows)


def p_values(
    rows: NDArray[np.int64], reference: Reference, sampling: SamplingParams
) -> dict[str, float]:
    """Chi-square p-values of token 1, of tokens 1 and 2, and of tokens 2 and 3."""
    first = reference.probs(PROMPT, [], sampling)
    second = np.stack([reference.probs(PROMPT, [a], sampling) for a in range(VOCAB_SIZE)])
    third = np.stack(
        [
            [reference.probs(PROMPT, [a, b], sampling) for b in range(VOCAB_SIZE)]
            for a in range(VOCAB_SIZE)
        ]
    )
    pairs = first[:, None] * second
    return {
        "first": _chi_square(rows[:, 0], first),
        "pair": _chi_square(rows[:, 0] * VOCAB_SIZE + rows[:, 1], pairs.ravel()),
        "second pair": _chi_square(
            rows[:, 1] * VOCAB_SIZE + rows[:, 2], np.einsum("ab,abc->bc", pairs, third).ravel()
        ),
    }


def _chi_square(observed: NDArray[np.int64], probs: NDArray[np.float64]) -> float:
    """Cells expecting fewer than 5 are pooled; a token without probability must not occur."""
    counts = Counter(observed.tolist())
    assert all(probs[cell] > 0 for cell in counts), "a token outside the target's support"
    expected = probs * len(observed)
    seen = np.array([counts.get(cell, 0) for cell in range(len(probs))], float)
    large = expected >= 5
    expected = np.append(expected[large], expected[~large].sum())
    seen = np.append(seen[large], seen[~large].sum())
    keep = expected > 0
    return float(stats.chisquare(seen[keep], expected[keep] * seen.sum() / expected.sum()).pvalue)


_times = random.Random(7)


def at_random(drafts: Sequence[int]) -> float | None:
    """Rounds that are sent at once, late, or never, whatever is in them."""
    del drafts
    return _times.choice((0.0, 0.0, 0.002, 0.01, None))


def withheld_if_odd(drafts: Sequence[int]) -> float | None:
    """A takeover that looks at the draft: odd ones are never sent."""
    return None if drafts[0] % 2 else 0.0


CASES: dict[str, tuple[VerificationMode, SamplingParams, dict[str, Any]]] = {
    "split": (SPLIT, SamplingParams(temperature=1.0), {"sparse_k": 4}),
    "split-filtered": (
        SPLIT,
        SamplingParams(temperature=1.2, top_k=20, top_p=0.95),
        {"sparse_k": 4},
    ),
    "coupled": (COUPLED, SamplingParams(temperature=1.0), {}),
    "split, taken over": (
        SPLIT,
        SamplingParams(temperature=1.0),
        {"sparse_k": 4, "lateness": at_random},
    ),
    "coupled, taken over": (COUPLED, SamplingParams(temperature=1.0), {"lateness": at_random}),
}


@pytest.mark.parametrize("case", CASES)
async def test_sampled_output_follows_the_target(
    tiny_engine: VLLMEngine, tiny_reference: Reference, case: str
) -> None:
    mode, sampling, options = CASES[case]
    rows = await sample(tiny_engine, mode, sampling, **options)
    found = p_values(rows, tiny_reference, sampling)
    assert min(found.values()) > P_MIN, found


# Deliberate faults.
CONTROLS: dict[str, dict[str, Any]] = {
    "the truncated law": {"exact": False},
    # The cloud may take over at any time, but not because of a draft.
    "a takeover that looks at the draft": {"lateness": withheld_if_odd},
}


@pytest.mark.parametrize("control", CONTROLS)
async def test_the_same_test_rejects(
    tiny_engine: VLLMEngine, tiny_reference: Reference, control: str
) -> None:
    """Negative controls: the output must fail where the others pass."""
    sampling = SamplingParams(temperature=1.0)
    rows = await sample(tiny_engine, SPLIT, sampling, 6_000, sparse_k=4, **CONTROLS[control])
    found = p_values(rows, tiny_reference, sampling)
    assert found["first"] > P_MIN, "the first token is the cloud's own"
    assert found["pair"] < 1e-9, found
