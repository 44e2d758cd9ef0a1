"""Greedy text through drafter, link and cloud is, token for token, what vLLM alone generates.

Real parts throughout: the cloud server with the real target, gRPC over TCP, the drafter's own
process with the real drafts. The reference is stock vLLM. In every mode and with every drafter all
prompts run six at once, the windows spread over them, and with every window one runs alone.
With PICOSPEC_FULL_MATRIX=1 every combination of mode, drafter and window sees all prompts both
ways, which takes half an hour on two cores.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.control import AutoControl, Control
from edge_agent.drafting.messages import DrafterSpec
from edge_agent.drafting.process import DraftingProcess
from edge_agent.estimates import Estimates
from edge_agent.generation import GenerationRequest
from edge_agent.link import CloudLink
from edge_agent.observer import NullObserver
from edge_agent.pipeline import SpeculationPolicy, SpeculativeGenerator
from edge_agent.tokenizer import Tokenizer
from picospec.protocol.messages import (
    AssistPolicy,
    ModelCard,
    SamplingParams,
    Verdict,
    VerificationMode,
)
from tests.support.builders import COUPLED, GREEDY
from tests.support.machine import edge_core, model_folder
from tests.support.stock import generate_greedily

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(3600),
]

NUM_TOKENS = 64
CONCURRENCY = 6
FULL = os.environ.get("PICOSPEC_FULL_MATRIX") == "1"
DRAFTERS = ("draft-int4", "draft-int8", "ngram")
WINDOWS = (1, 4, 16)
QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "A farmer has 17 sheep and buys 5 more each week. How many has he after 6 weeks?",
    "Write a Python function that reverses a string.",
    "Name three rivers in Europe.",
    "Explain photosynthesis to a child.",
    "What is 12 times 7?",
    "Write a short poem about rain.",
    "List five fruits, one on each line.",
    "Who wrote Hamlet?",
    "Translate 'good morning' to Spanish.",
    "How do I boil an egg?",
    "What does HTTP stand for?",
    "Summarise the story of Cinderella in two sentences.",
    "Give me a recipe for pancakes.",
    "def fibonacci(n): complete this function.",
    "What is the difference between a list and a tuple?",
    "Tell me a fact about the moon.",
    "Repeat the word 'apple' ten times.",
    "Count from one to twenty.",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(model_folder("target"))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [
        tokenizer.encode_chat([{"role": "user", "content": question}]).tolist()
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    folder: Path = tmp_path_factory.mktemp("stock")
    target = str(model_folder("target"))
    texts = generate_greedily(target, prompts, NUM_TOKENS, folder)
    if FULL:
        assert texts == generate_greedily(target, prompts, NUM_TOKENS, folder, one_by_one=True)
    return texts


@asynccontextmanager
async def drafting(drafter: str) -> AsyncIterator[DraftingProcess]:
    backend = "ngram" if drafter == "ngram" else "onnx"
    folder = model_folder("draft-int4" if drafter == "ngram" else drafter)
    process = DraftingProcess(
        DrafterSpec(backend, str(folder), threads=1, cpu=edge_core()), CONCURRENCY
    )
    await process.start()
    try:
        yield process
    finally:
        await process.stop()


async def generate(
    generator: SpeculativeGenerator,
    prompt: list[int],
    name: str,
    sampling: SamplingParams = GREEDY,
) -> tuple[list[int], float]:
    """The text, and the share of judged drafts that were accepted."""
    generation = generator.generate(
        GenerationRequest(
            request_id=name,
            prompt_token_ids=np.asarray(prompt, np.int32),
            sampling=sampling,
            max_tokens=NUM_TOKENS,
            stop_token_ids=(),
            seeded=True,
        )
    )
    token_ids: list[int] = []
    async for chunk in generation:
        token_ids += chunk.token_ids
    stats = generation.stats
    return token_ids, stats.accepted_tokens / max(1, stats.drafted_tokens)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("mode", VerificationMode)
async def test_greedy_text_is_vllms(
    mode: VerificationMode,
    drafter: str,
    cloud_address: str,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    link = CloudLink(cloud_address)
    card: ModelCard = await link.get_model()
    rates: list[float] = []

    async with drafting(drafter) as process:

        async def check(index: int, window: int) -> None:
            policy = SpeculationPolicy(mode=mode, draft_length=min(4, window), window=window)
            generator = SpeculativeGenerator(link, process, lambda: card, policy)
            token_ids, rate = await generate(generator, prompts[index], f"w{window}-{index}")
            assert token_ids == expected[index], (window, QUESTIONS[index])
            rates.append(rate)

        async def worker(runs: Iterator[tuple[int, int]]) -> None:
            for index, window in runs:
                await check(index, window)

        everything = list(itertools.product(range(len(prompts)), WINDOWS))
        alone = everything if FULL else [(3 * i, window) for i, window in enumerate(WINDOWS)]
        crowd = (
            everything
            if FULL
            else list(enumerate(itertools.islice(itertools.cycle(WINDOWS), len(prompts))))
        )
        await worker(iter(alone))
        runs = iter(crowd)
        await asyncio.gather(*(worker(runs) for _ in range(CONCURRENCY)))
        assert process.open_contexts == 0
    await link.close()
    floor = {"draft-int4": 0.3, "draft-int8": 0.7, "ngram": 0.02}[drafter]
    assert np.mean(rates) > floor, "the drafts do not help: something is misaligned"


SWITCHES: dict[str, dict[str, Any]] = {
    "sequential": {"parallel_draft": False},
    "whole rounds": {"fast_verify": False},
    "vanilla": {"parallel_draft": False, "fast_verify": False},
    "impatient": {"fast_verify": False, "draft_length": 8, "round_timeout_s": 0.02},
    "unsure": {"confidence_stop": 0.5},
    "long rounds": {"draft_length": 8, "window": 64},
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_no_switch_changes_the_text(
    temperature: float, cloud_address: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Greedy it is vLLM's; sampled it hangs on the seed, not on how drafts are cut and judged."""
    link = CloudLink(cloud_address)
    card = await link.get_model()
    sampling = SamplingParams(temperature=temperature, seed=11)
    async with drafting("draft-int4") as process:

        async def text(name: str, policy: SpeculationPolicy) -> list[int]:
            generator = SpeculativeGenerator(link, process, lambda: card, policy)
            token_ids, _ = await generate(generator, prompts[0], name, sampling)
            return token_ids

        usual = await text("usual", SpeculationPolicy())
        if not temperature:
            assert usual == expected[0]
        for name, options in SWITCHES.items():
            assert await text("switched", SpeculationPolicy(**options)) == usual, name
    await link.close()


@asynccontextmanager
async def stuttering(process: DraftingProcess) -> AsyncIterator[None]:
    """The drafter stops and goes on at random moments, so the cloud takes over at any."""
    moments = random.Random(5)

    async def stutter() -> None:
        while True:
            await asyncio.sleep(moments.uniform(0.01, 0.2))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(moments.uniform(0.01, 0.2))
            finally:
                os.kill(process.pid, signal.SIGCONT)

    task = asyncio.create_task(stutter())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


class Takeovers(NullObserver):
    """Counts what the cloud has decoded alone, and what of the drafts it has accepted."""

    def __init__(self) -> None:
        self.taken_over = self.accepted = 0

    def verdict(self, verdict: Verdict) -> None:
        self.accepted += verdict.num_accepted
        if not verdict.num_draft_tokens:
            self.taken_over += len(verdict.token_ids)


@pytest.mark.parametrize("assist", [AssistPolicy.AUTO, AssistPolicy.ALWAYS])
@pytest.mark.parametrize("mode", list(VerificationMode))
async def test_a_cloud_that_takes_over_changes_no_greedy_text(
    mode: VerificationMode,
    assist: AssistPolicy,
    cloud_address: str,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    """In a crowd, where few drafts are in time, and alone, where many are."""
    link = CloudLink(cloud_address)
    card = await link.get_model()
    policy, seen = SpeculationPolicy(mode, assist=assist), Takeovers()
    async with drafting("draft-int4") as process, stuttering(process):
        generator = SpeculativeGenerator(link, process, lambda: card, policy, seen)
        answers = await asyncio.gather(
            *(generate(generator, prompt, f"taken-over-{n}") for n, prompt in enumerate(prompts))
        )
        answers += [
            await generate(generator, prompt, f"alone-{n}") for n, prompt in enumerate(prompts[:4])
        ]
    assert [token_ids for token_ids, _ in answers] == [*expected, *expected[:4]]
    assert seen.taken_over > NUM_TOKENS
    if assist is AssistPolicy.AUTO:  # else the cloud may be ahead of every draft
        assert seen.accepted > 0
    await link.close()


async def test_coupled_text_is_a_function_of_the_seed(
    cloud_address: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Whoever takes over and whenever, whatever is drafted, with a drafter and without."""
    link = CloudLink(cloud_address)
    card = await link.get_model()
    warm = SamplingParams(temperature=0.8, seed=3)
    texts: dict[str, list[int]] = {}
    seen = Takeovers()

    async def add(
        name: str, process: DraftingProcess, assist: AssistPolicy, control: Control | None = None
    ) -> None:
        policy = SpeculationPolicy(COUPLED, assist=assist)
        generator = SpeculativeGenerator(link, process, lambda: card, policy, seen, control)
        texts[name], _ = await generate(generator, prompts[1], name, warm)

    async with drafting("draft-int4") as process:
        control = AutoControl(Estimates(), tuple(VerificationMode))
        auto = SpeculativeGenerator(
            link, process, lambda: card, SpeculationPolicy(COUPLED, assist=AssistPolicy.AUTO),
            control=control,
        )  # fmt: skip
        greedy, _ = await generate(auto, prompts[0], "auto")
        assert greedy == expected[0]
        for assist in AssistPolicy:
            await add(assist.value, process, assist)
        await add("controlled", process, AssistPolicy.AUTO, control)
        async with stuttering(process):
            for number in range(3):
                await add(f"stuttering-{number}", process, AssistPolicy.AUTO)
            await add("stuttering-always", process, AssistPolicy.ALWAYS)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        await add("stopped", process, AssistPolicy.AUTO)
        os.kill(process.pid, signal.SIGCONT)
    async with drafting("ngram") as process:
        await add("another-drafter", process, AssistPolicy.AUTO)
    await add("no-drafter", process, AssistPolicy.AUTO)
    assert [name for name, text in texts.items() if text != texts["never"]] == []
    assert min(seen.taken_over, seen.accepted) > NUM_TOKENS / 2
    await link.close()


async def test_the_whole_distribution_may_travel(
    cloud_address: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Without split rejection: greedy the text is vLLM's, sampled a seed reproduces it."""
    link = CloudLink(cloud_address)
    card = await link.get_model()
    assert card.limits.max_sparse_k >= card.logits_width
    policy = SpeculationPolicy(split_rejection=False)
    async with drafting("draft-int4") as process:
        generator = SpeculativeGenerator(link, process, lambda: card, policy)
        greedy, _ = await generate(generator, prompts[1], "dense")
        assert greedy == expected[1]
        warm = SamplingParams(temperature=0.8, seed=3)
        first, _ = await generate(generator, prompts[1], "dense-1", warm)
        again, _ = await generate(generator, prompts[1], "dense-2", warm)
        assert again == first
    await link.close()
