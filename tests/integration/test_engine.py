"""The real vLLM engine with a random model of 32 tokens: sessions, batches, memory, ends."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence

import numpy as np
import psutil
import pytest

from cloud_server.engine.client import VLLMEngine
from picospec.protocol.messages import (
    Draft,
    FinishReason,
    SamplingParams,
    Verdict,
    VerificationMode,
)
from picospec.sampling.distribution import Distribution
from tests.integration.conftest import TINY_KV_BLOCKS, TINY_MAX_MODEL_LEN
from tests.support.builders import COUPLED, GREEDY, SPLIT, make_open
from tests.support.direct_edge import DraftLaw, Outcome, generate
from tests.support.reference import Reference
from tests.support.tiny import EOS_TOKEN_ID, VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = [1, 2, 3, 4, 5]


def one_hot(token_id: int) -> Distribution:
    probs = np.zeros(VOCAB_SIZE, np.float32)
    probs[token_id] = 1.0
    return Distribution(None, probs)


def bad_drafts(context: Sequence[int]) -> Distribution:
    return one_hot(sum(context) * 7 % VOCAB_SIZE)


def no_drafts(context: Sequence[int]) -> None:
    return None


def random_drafts(context: Sequence[int]) -> Distribution:
    probs = np.random.default_rng(list(context)).random(VOCAB_SIZE).astype(np.float32) + 0.01
    return Distribution(None, probs / probs.sum())


def good_drafts(reference: Reference, sampling: SamplingParams) -> DraftLaw:
    """The target's own law, blurred."""

    def law(context: Sequence[int]) -> Distribution:
        own = reference.probs(context[: len(PROMPT)], context[len(PROMPT) :], sampling)
        return Distribution(None, (0.8 * own + 0.2 / VOCAB_SIZE).astype(np.float32))

    return law


SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=0.7, seed=11),
    SamplingParams(temperature=1.3, top_k=7, seed=12),
    SamplingParams(temperature=1.0, top_p=0.8, seed=13),
    SamplingParams(temperature=1.0, min_p=0.1, seed=14),
    SamplingParams(temperature=0.9, top_k=12, top_p=0.9, min_p=0.02, seed=15),
    SamplingParams(temperature=0.8, presence_penalty=1.0, frequency_penalty=0.7, seed=16),
    SamplingParams(temperature=0.8, repetition_penalty=1.6, seed=17),
    SamplingParams(temperature=1.0, logit_bias=((3, 4.0), (9, -100.0)), seed=18),
    SamplingParams(
        temperature=0.0,
        repetition_penalty=1.4,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias=((4, 2.0),),
    ),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"seed{s.seed}-T{s.temperature}")
async def test_coupled_text_is_the_references_whatever_is_drafted(
    tiny_engine: VLLMEngine, tiny_reference: Reference, sampling: SamplingParams
) -> None:
    """No drafts, bad drafts, random and good ones, alone and in one batch: one text."""
    expected = tiny_reference.generate(PROMPT, sampling, 24)
    laws = [no_drafts, bad_drafts, random_drafts, good_drafts(tiny_reference, sampling)]

    async def run(law: DraftLaw, length: int) -> Outcome:
        return await generate(
            tiny_engine,
            PROMPT,
            law,
            mode=COUPLED,
            max_tokens=24,
            sampling=sampling,
            draft_length=length,
        )

    alone = [await run(law, 4) for law in laws]
    batch = await asyncio.gather(*(run(law, n) for law in laws for n in (1, 3, 16)))
    for outcome in [*alone, *batch]:
        assert outcome.token_ids == expected
        assert outcome.finish_reason is FinishReason.LENGTH
    assert alone[3].accepted > alone[1].accepted


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[-1]], ids=["plain", "penalties"])
async def test_split_greedy_text_is_the_references(
    tiny_engine: VLLMEngine, tiny_reference: Reference, sampling: SamplingParams
) -> None:
    expected = tiny_reference.generate(PROMPT, sampling, 24)
    laws = [no_drafts, bad_drafts, random_drafts, good_drafts(tiny_reference, sampling)]
    outcomes = await asyncio.gather(
        *(
            generate(
                tiny_engine,
                PROMPT,
                law,
                mode=SPLIT,
                max_tokens=24,
                sampling=sampling,
                draft_length=n,
                sparse_k=4,
            )
            for law in laws
            for n in (1, 4, 16)
        )
    )
    for outcome in outcomes:
        assert outcome.token_ids == expected


async def test_split_is_reproducible_whatever_the_draft_length(tiny_engine: VLLMEngine) -> None:
    """Each random draw depends only on its position, not on how drafts are divided into rounds."""
    sampling = SamplingParams(temperature=1.0, seed=99)
    lengths = itertools.cycle([1, 5, 2, 16, 3])
    outcomes = await asyncio.gather(
        *(
            generate(
                tiny_engine,
                PROMPT,
                random_drafts,
                mode=SPLIT,
                max_tokens=40,
                sampling=sampling,
                draft_length=n,
                sparse_k=4,
            )
            for n in (1, 4, 16, lambda: next(lengths))
        )
    )
    assert len({tuple(outcome.token_ids) for outcome in outcomes}) == 1
    assert outcomes[0].accepted > 0


async def test_mixed_modes_lengths_and_laws_in_one_batch(
    tiny_engine: VLLMEngine, tiny_reference: Reference
) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(31) for _ in range(rng.randint(1, 70))] for _ in range(24)]

    async def check(index: int, prompt: list[int]) -> None:
        sampling = GREEDY if index % 2 else SamplingParams(temperature=1.0, seed=index)
        mode = COUPLED if index % 2 == 0 or index % 4 == 1 else SPLIT
        outcome = await generate(
            tiny_engine,
            prompt,
            random_drafts,
            mode=mode,
            max_tokens=30,
            sampling=sampling,
            draft_length=1 + index % 7,
        )
        assert outcome.token_ids == tiny_reference.generate(prompt, sampling, 30)

    await asyncio.gather(*(check(index, prompt) for index, prompt in enumerate(prompts)))


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
async def test_stop_token_ends_the_text_inside_the_drafts(
    tiny_engine: VLLMEngine, tiny_reference: Reference, mode: VerificationMode
) -> None:
    full = tiny_reference.generate(PROMPT, GREEDY, 40)
    for stop in dict.fromkeys(full):
        expected = full[: full.index(stop) + 1]
        outcome = await generate(
            tiny_engine,
            PROMPT,
            good_drafts(tiny_reference, GREEDY),
            mode=mode,
            max_tokens=40,
            sampling=GREEDY,
            draft_length=8,
            stop_token_ids=(stop, EOS_TOKEN_ID) if EOS_TOKEN_ID not in expected else (stop,),
        )
        assert outcome.token_ids == expected
        assert outcome.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
@pytest.mark.parametrize("law", [no_drafts, bad_drafts, random_drafts])
async def test_text_up_to_the_models_length(
    tiny_engine: VLLMEngine, tiny_reference: Reference, mode: VerificationMode, law: DraftLaw
) -> None:
    prompt = [3] * (TINY_MAX_MODEL_LEN - 20)
    outcome = await generate(
        tiny_engine, prompt, law, mode=mode, max_tokens=20, sampling=GREEDY, draft_length=6
    )
    assert outcome.token_ids == tiny_reference.generate(prompt, GREEDY, 20)
    assert outcome.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
async def test_resumed_session_goes_on_where_the_text_stood(
    tiny_engine: VLLMEngine, tiny_reference: Reference, mode: VerificationMode
) -> None:
    sampling = GREEDY if mode is SPLIT else SamplingParams(temperature=1.0, seed=3)
    expected = tiny_reference.generate(PROMPT, sampling, 40)
    for kept in (0, 1, 17, 39):
        outcome = await generate(
            tiny_engine,
            PROMPT,
            random_drafts,
            mode=mode,
            max_tokens=40,
            sampling=sampling,
            output=expected[:kept],
        )
        assert outcome.token_ids == expected


async def test_a_draft_is_judged_on_arrival_by_the_row_before_it(
    tiny_engine: VLLMEngine, tiny_reference: Reference
) -> None:
    """Split: after an accepted draft the next one costs no forward, if it is rejected."""
    expected = tiny_reference.generate(PROMPT, GREEDY, 8)
    session = _Held(tiny_engine, "rows", mode=SPLIT)
    await session.open()
    assert session.token_ids == expected[:1]
    before = tiny_engine.stats().steps
    wrong = (expected[2] + 1) % (VOCAB_SIZE - 1)
    await session.draft(0, expected[1])
    verdict = await session.next()
    assert (verdict.num_accepted, verdict.num_draft_tokens) == (1, 1)
    await session.draft(0, wrong)
    rejected = await session.next()
    assert rejected.rejection is not None
    assert rejected.rejection.token_ids.tolist() == [expected[2]]
    assert (rejected.num_forwards, rejected.compute_us) == (0, 0)
    # The first token was forwarded, then the draft: one forward for each token.
    assert tiny_engine.stats().steps - before <= 2
    await session.draft(1, expected[2], expected[3], num_forced=1)
    verdict = await session.next()
    assert (verdict.position, verdict.num_accepted) == (len(PROMPT) + 3, 1)
    assert verdict.num_forwards >= 1
    await session.close()
    await _settled(tiny_engine)


async def test_a_verdict_without_a_forward_does_not_wait_for_other_sessions(
    tiny_engine: VLLMEngine, tiny_reference: Reference
) -> None:
    """Rejected by its row while others keep the engine busy: told before their next forward."""
    expected = tiny_reference.generate(PROMPT, GREEDY, 8)
    session = _Held(tiny_engine, "overtaking", mode=SPLIT)
    await session.open()
    await session.draft(0, expected[1])
    await session.next()
    busy = asyncio.create_task(
        generate(tiny_engine, PROMPT, bad_drafts, mode=COUPLED, max_tokens=200, sampling=GREEDY)
    )
    await session.draft(0, (expected[2] + 1) % (VOCAB_SIZE - 1))
    verdict = await session.next()
    assert verdict.rejection is not None
    assert verdict.num_forwards == 0
    await session.close()
    await busy
    await _settled(tiny_engine)


async def test_held_sessions_cost_no_cpu(tiny_engine: VLLMEngine) -> None:
    sessions = [_Held(tiny_engine, f"held-{index}") for index in range(16)]
    for session in sessions:
        await session.open()
    assert tiny_engine.stats().held_sessions >= 15
    children = psutil.Process().children(recursive=True)
    before = sum(sum(child.cpu_times()[:2]) for child in children)
    await asyncio.sleep(1.0)
    spent_s = sum(sum(child.cpu_times()[:2]) for child in children) - before
    for session in sessions:
        await session.close()
    assert spent_s < 0.5, "the engine spins while every session waits for its edge"


async def test_held_sessions_make_room_and_come_back(
    tiny_engine: VLLMEngine, tiny_reference: Reference
) -> None:
    """More held sessions than the KV cache and the batch have room for; none is lost."""
    prompts = [[index % 31, index // 31, *range(1, 31), *range(1, 31)] for index in range(80)]
    blocks_each = -(-len(prompts[0]) // 32)
    assert len(prompts) * blocks_each > TINY_KV_BLOCKS
    evicted = tiny_engine.stats().evicted_sessions
    sessions = [
        _Held(tiny_engine, f"crowd-{index}", prompt) for index, prompt in enumerate(prompts)
    ]
    for session in sessions:
        await session.open()
    assert tiny_engine.stats().evicted_sessions > evicted
    for session in reversed(sessions):
        await session.ask()
    for session, prompt in zip(sessions, prompts, strict=True):
        assert session.token_ids == tiny_reference.generate(prompt, GREEDY, 2)
        await session.close()
    await _settled(tiny_engine)


async def test_aborted_sessions_free_their_memory(tiny_engine: VLLMEngine) -> None:
    await _settled(tiny_engine)
    rng = random.Random(1)
    tasks = [
        asyncio.create_task(_Held(tiny_engine, f"gone-{index}").leave_after(rng.random() / 5))
        for index in range(60)
    ]
    await asyncio.gather(*tasks)
    await _settled(tiny_engine)


async def test_late_and_unknown_deliveries_are_ignored(tiny_engine: VLLMEngine) -> None:
    await tiny_engine.deliver("never-opened", Draft(0, 5, token_ids=(1,)), time.monotonic())
    session = _Held(tiny_engine, "late")
    await session.open()
    await session.close()
    await tiny_engine.deliver("late", Draft(0, 6, token_ids=(1,)), time.monotonic())
    await tiny_engine.abort("late")
    outcome = await generate(
        tiny_engine, PROMPT, no_drafts, mode=COUPLED, max_tokens=3, sampling=GREEDY
    )
    assert len(outcome.token_ids) == 3


async def _settled(engine: VLLMEngine) -> None:
    """Wait until the engine is as empty as at its start."""
    for _ in range(100):
        stats = engine.stats()
        if stats.kv_cache_usage == 0 and not (stats.held_sessions + stats.running_sessions):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the engine keeps {engine.stats()}")


class _Held:
    """A greedy session that is opened and then does what it is told."""

    def __init__(
        self,
        engine: VLLMEngine,
        key: str,
        prompt: Sequence[int] = PROMPT,
        mode: VerificationMode = COUPLED,
    ) -> None:
        self._mode = mode
        self._engine = engine
        self._key = key
        self._prompt = prompt
        self._verdicts: asyncio.Queue[object] = asyncio.Queue()
        self.token_ids: list[int] = []

    async def open(self) -> None:
        request = make_open(
            session_id=self._key,
            prompt_token_ids=np.asarray(self._prompt, np.int32),
            output_token_ids=np.empty(0, np.int32),
            mode=self._mode,
            max_tokens=100,
        )
        await self._engine.open(self._key, request, self._verdicts.put_nowait)
        await self.next()

    async def ask(self) -> None:
        position = len(self._prompt) + len(self.token_ids)
        await self._engine.deliver(self._key, Draft(0, position, probe=1), time.monotonic())
        await self.next()

    async def draft(self, epoch: int, *token_ids: int, num_forced: int = 0) -> None:
        """Drafts for the first uncommitted position on, or from a recovered token on."""
        position = len(self._prompt) + len(self.token_ids)
        probs = (1.0,) * (len(token_ids) - num_forced)
        self.token_ids += token_ids
        draft = Draft(
            epoch, position, token_ids=token_ids, draft_probs=probs, num_forced=num_forced
        )
        await self._engine.deliver(self._key, draft, time.monotonic())

    async def next(self) -> Verdict:
        while not isinstance(event := await asyncio.wait_for(self._verdicts.get(), 30), Verdict):
            assert not isinstance(event, Exception), event
        end = event.position - len(self._prompt) + event.num_accepted
        self.token_ids[end:] = event.token_ids
        return event

    async def leave_after(self, seconds: float) -> None:
        opening = asyncio.create_task(self.open())
        await asyncio.sleep(seconds)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await self.close()

    async def close(self) -> None:
        await self._engine.abort(self._key)
