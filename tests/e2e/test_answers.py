"""Answers through both daemons are the target's own, alone or in a crowd, whatever dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge_agent.tokenizer import Tokenizer
from tests.support.chat import user_says
from tests.support.daemons import Edge, until
from tests.support.machine import edge_core, pinned
from tests.support.stock import generate_greedily

NUM_TOKENS = 32
QUESTIONS = (
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "How does a bicycle stay upright?",
    "Name the planets, nearest to the sun first.",
    "What is a prime number? Give an example.",
    "Tell me a short story about a lighthouse.",
)


async def pieces(edge: Edge, question: str, **parameters: Any) -> AsyncIterator[str]:
    """A streamed answer; greedy unless `parameters` say otherwise, and of NUM_TOKENS tokens."""
    async with edge.client() as client:
        stream = await client.chat.completions.create(
            model=edge.model,
            messages=user_says(question),
            stream=True,
            extra_body={"ignore_eos": True},
            **{"temperature": 0, "max_tokens": NUM_TOKENS} | parameters,
        )
        async for chunk in stream:
            if content := chunk.choices[0].delta.content:
                yield content


async def answer(edge: Edge, question: str, **parameters: Any) -> str:
    return "".join([piece async for piece in pieces(edge, question, **parameters)])


async def disturbed_answer(
    edge: Edge, question: str, disturb: Callable[[], None], **parameters: Any
) -> str:
    """The answer, `disturb` being called when a few of its tokens are there."""
    text, num_pieces = "", 0
    async for piece in pieces(edge, question, **parameters):
        text += piece
        num_pieces += 1
        if num_pieces == 6:
            await asyncio.to_thread(disturb)
    return text


def undisturbable(edge: Edge) -> dict[str, Any]:
    """Sampling whose text does not hang on what is drafted or on the link's life."""
    sampled = {"temperature": 0.8, "seed": 1234}
    return sampled if edge.daemon.name == "edge-coupled" else {"temperature": 0}


@pytest.fixture(scope="session")
def stock_answers(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[list[str]]]:
    """What vLLM alone says, greedily. It computes while the cloud starts, on the other core."""
    tokenizer = Tokenizer.load(models / "target")
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": question}]).tolist()
        for question in QUESTIONS[:3]
    ]

    def generate(folder: Path) -> list[str]:
        with pinned(edge_core()):
            answers = generate_greedily(str(models / "target"), prompts, NUM_TOKENS, folder)
        return [tokenizer.decode(token_ids) for token_ids in answers]

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(generate, tmp_path_factory.mktemp("stock"))


async def test_greedy_answers_are_what_vllm_alone_generates(
    stock_answers: Future[list[str]], edges: dict[str, Edge]
) -> None:
    answers = {
        mode: [await answer(edge, question) for question in QUESTIONS[:3]]
        for mode, edge in edges.items()
    }
    expected = await asyncio.wrap_future(stock_answers)
    assert answers == dict.fromkeys(edges, expected)


async def test_chats_that_share_a_drafter_do_not_disturb_each_other(edge: Edge) -> None:
    chats = [
        (question, {"max_tokens": 24, "temperature": 0.8 * (number % 2), "seed": number})
        for number, question in enumerate(QUESTIONS)
    ]
    alone = [await answer(edge, question, **parameters) for question, parameters in chats]
    together = await asyncio.gather(
        *(answer(edge, question, **parameters) for question, parameters in chats)
    )
    assert together == alone
    assert len(set(alone)) == len(QUESTIONS)


async def test_an_answer_survives_its_drafters_death(edge: Edge) -> None:
    sampling = undisturbable(edge)
    expected = await answer(edge, QUESTIONS[0], **sampling)
    restarts = edge.health()[1]["drafter"]["restarts"]
    worker = edge.daemon.child("edge_agent.drafting.worker_main")
    assert await disturbed_answer(edge, QUESTIONS[0], worker.kill, **sampling) == expected
    until(edge.is_healthy)
    drafter = edge.health()[1]["drafter"]
    assert drafter["alive"]
    assert drafter["restarts"] == restarts + 1
    assert edge.daemon.child("edge_agent.drafting.worker_main") != worker
    assert edge.metrics()("picospec_edge_drafter_restarts_total") == restarts + 1


async def test_an_answer_survives_a_cut_of_its_link(edge: Edge) -> None:
    sampling = undisturbable(edge)
    expected = await answer(edge, QUESTIONS[1], **sampling)
    resumes = edge.metrics()("picospec_edge_resumes_total")

    def cut_and_mend() -> None:
        edge.relay.cut()
        edge.relay.mend()

    assert await disturbed_answer(edge, QUESTIONS[1], cut_and_mend, **sampling) == expected
    assert edge.metrics()("picospec_edge_resumes_total") == resumes + 1
