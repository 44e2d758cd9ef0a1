"""The whole edge daemon, on uvloop as in production, against the cloud's server over loopback.

The cloud's engine is scripted (a deterministic greedy target) and the drafter is prompt lookup,
so every answer is known to the token; everything between is the real thing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import uvloop

from cloud_server.engine.scripted import ScriptedEngine
from edge_agent import config as edge_config
from edge_agent.server import EdgeServer
from tests.support.builders import make_card_for
from tests.support.chat import speculation_of, usage_of, user_says
from tests.support.cloud import Cloud, running_cloud
from tests.support.edge_api import TOKENIZER, eventually
from tests.support.tiny_tokenizer import TEMPLATE, tokenizer_json

WORDS: list[int] = TOKENIZER.encode(
    " the quick brown fox jumps over the lazy dog and says"
).tolist()
CARD = make_card_for(TOKENIZER, model_id="scripted/words")
MESSAGES = user_says("say it")


def prompt_of(content: str) -> list[int]:
    token_ids: list[int] = TOKENIZER.encode_chat([{"role": "user", "content": content}]).tolist()
    return token_ids


def recite(token_ids: Sequence[int]) -> int:
    """Endless repetition, which prompt lookup learns, with a slip now and then."""
    return WORDS[0] if len(token_ids) % 17 == 0 else WORDS[len(token_ids) % len(WORDS)]


def expected(prompt: Sequence[int], num_tokens: int) -> str:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(recite(tokens))
    return TOKENIZER.decode(tokens[len(prompt) :])


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        uvloop.run(test(**fixtures))

    return run


@dataclass
class Edge:
    server: EdgeServer
    client: openai.AsyncOpenAI


@asynccontextmanager
async def edge(folder: Path, cloud_port: int, *flags: str) -> AsyncIterator[Edge]:
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = edge_config.read(
        [
            "--server.port", "0", "--drafter.backend", "ngram", "--drafter.tokenizer", str(folder),
            "--cloud.address", f"127.0.0.1:{cloud_port}", "--cloud.poll_interval_s", "0.1",
            "--cloud.connect_timeout_s", "2", "--cloud.resume_timeout_s", "1",
            "--speculation.estimates_file", str(folder / "estimates.json"), *flags,
        ],
        {},
    )  # fmt: skip
    server = EdgeServer(config)
    life = asyncio.ensure_future(server.run())
    base_url = f"http://127.0.0.1:{server.port}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
        try:
            yield Edge(server, client)
        finally:
            server.stop()
            server.stop()
            await asyncio.wait_for(life, 10)


async def ready(client: openai.AsyncOpenAI) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await client.models.list()
                return
            except openai.APIError:
                await asyncio.sleep(0.05)


@asynccontextmanager
async def pair(
    folder: Path, *flags: str, step_s: float = 0.001
) -> AsyncIterator[tuple[Edge, Cloud]]:
    async with (
        running_cloud(ScriptedEngine(recite, card=CARD, step_s=step_s)) as cloud,
        edge(folder, cloud.server.port, *flags) as running,
    ):
        await ready(running.client)
        yield running, cloud


SPLIT = ("--speculation.mode", "split", "--speculation.assist", "never")
MODES = [
    (),
    SPLIT,
    (*SPLIT, "--speculation.fast_verify", "false"),
    (*SPLIT, "--speculation.parallel_draft", "false", "--speculation.exact", "false"),
    ("--speculation.mode", "coupled", "--speculation.assist", "never"),
    ("--speculation.mode", "coupled", "--speculation.assist", "always"),
]


@pytest.mark.parametrize("flags", MODES, ids=" ".join)
@on_uvloop
async def test_answers_are_the_targets(tmp_path: Path, flags: tuple[str, ...]) -> None:
    async with pair(tmp_path, *flags) as (running, cloud):

        async def ask(content: str) -> None:
            prompt = prompt_of(content)
            completion = await running.client.chat.completions.create(
                model=CARD.model_id, messages=user_says(content), temperature=0, max_tokens=60
            )
            assert completion.choices[0].message.content == expected(prompt, 60)
            assert completion.choices[0].finish_reason == "length"
            usage = usage_of(completion)
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 60)
            counts = speculation_of(completion)
            assert 0 <= counts["accepted_tokens"] <= counts["drafted_tokens"]
            assert counts["bytes_up"] > 0 < counts["bytes_down"]
            if "never" in flags:  # else the cloud may be ahead of every draft
                assert counts["accepted_tokens"] > 10

        await ask("say it")
        await asyncio.gather(*(ask(f"say it {number}") for number in range(6)))
        await cloud.until_idle()


@on_uvloop
async def test_a_stream_with_a_stop_string_ends_the_session(tmp_path: Path) -> None:
    async with pair(tmp_path) as (running, cloud):
        prompt = prompt_of("say it")
        stream = await running.client.chat.completions.create(
            model=CARD.model_id,
            messages=MESSAGES,
            temperature=0,
            stream=True,
            stop=["over the"],
            extra_headers={"X-Request-Id": "follow-me"},
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == expected(prompt, 300).split("over the")[0]
        await cloud.until_idle()
        [(_, opened)] = cloud.engine.opened
        assert opened.session_id == "follow-me"


@on_uvloop
async def test_a_client_that_goes_away_frees_the_session(tmp_path: Path) -> None:
    async with pair(tmp_path, step_s=0.05) as (running, cloud):
        stream = await running.client.chat.completions.create(
            model=CARD.model_id, messages=MESSAGES, stream=True, temperature=0
        )
        await anext(aiter(stream))
        await stream.close()
        whole = asyncio.ensure_future(
            running.client.chat.completions.create(
                model=CARD.model_id, messages=MESSAGES, temperature=0
            )
        )
        await eventually(lambda: len(cloud.engine.opened) == 2)
        whole.cancel()
        await cloud.until_idle()
        assert len(cloud.engine.aborted) == 2


@on_uvloop
async def test_a_cloud_that_dies_is_an_error_event_and_then_503(tmp_path: Path) -> None:
    async with edge_and_mortal_cloud(tmp_path) as (running, kill):
        stream = await running.client.chat.completions.create(
            model=CARD.model_id, messages=MESSAGES, stream=True, temperature=0
        )
        chunks = aiter(stream)
        await anext(chunks)
        await kill()
        with pytest.raises(openai.APIError, match=r"not available|No connection|ended the stream"):
            async for _ in chunks:
                pass
        with pytest.raises(openai.InternalServerError) as refused:
            await running.client.chat.completions.create(model=CARD.model_id, messages=MESSAGES)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"]


@asynccontextmanager
async def edge_and_mortal_cloud(
    folder: Path,
) -> AsyncIterator[tuple[Edge, Callable[[], Awaitable[None]]]]:
    cloud_life = running_cloud(ScriptedEngine(recite, card=CARD, step_s=0.05))
    cloud = await cloud_life.__aenter__()
    dead = False

    async def kill() -> None:
        nonlocal dead
        dead = True
        await cloud_life.__aexit__(None, None, None)

    async with edge(folder, cloud.server.port) as running:
        await ready(running.client)
        yield running, kill
    if not dead:
        await kill()
