"""The official `openai` client, unmodified, against both daemons with the real models."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from edge_agent.tokenizer import Tokenizer
from picospec_cli.model_folder import model_home
from tests.support.chat import speculation_of, usage_of, user_says
from tests.support.daemons import Edge

QUESTION = user_says("Name three colours and say where each is seen in nature.")
NUM_TOKENS = 24


async def chat(edge: Edge, **parameters: Any) -> Any:
    """A whole chat completion; greedy and short unless `parameters` say otherwise."""
    defaults: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": NUM_TOKENS}
    async with edge.client() as client:
        return await client.chat.completions.create(model=edge.model, **defaults | parameters)


def text_of(completion: Any) -> str:
    text: str = completion.choices[0].message.content
    return text


async def test_a_chat_streams_token_by_token_what_it_answers_as_a_whole(edge: Edge) -> None:
    whole = await chat(edge)
    async with edge.client() as client:
        stream = await client.chat.completions.create(
            model=edge.model, messages=QUESTION, temperature=0, max_tokens=NUM_TOKENS,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
    *parts, last = chunks
    deltas = [part.choices[0].delta.content for part in parts if part.choices[0].delta.content]
    assert "".join(deltas) == text_of(whole)
    assert len(deltas) > NUM_TOKENS / 2  # some tokens are halves of a character
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + [
        "length"
    ]
    assert [part.usage for part in parts] == [None] * len(parts)
    assert last.choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    for answer in (whole, last):
        usage, speculation = usage_of(answer), speculation_of(answer)
        assert usage.completion_tokens == NUM_TOKENS
        assert usage.total_tokens == usage.prompt_tokens + NUM_TOKENS
        assert speculation["mode"] in edge.daemon.name or "auto" in edge.daemon.name
        assert 0 < speculation["accepted_tokens"] <= speculation["drafted_tokens"]
        assert 0 < speculation["verdicts"] < NUM_TOKENS + 8
        assert speculation["bytes_up"] > 0 < speculation["bytes_down"]


async def test_completions_take_text_and_token_ids(edge: Edge) -> None:
    prompt = "The capital of France is"
    token_ids = Tokenizer.load(model_home() / "target").encode(prompt).tolist()
    async with edge.client() as client:
        create = client.completions.create
        whole = await create(model=edge.model, prompt=prompt, temperature=0, max_tokens=12)
        of_ids = await create(model=edge.model, prompt=token_ids, temperature=0, max_tokens=12)
        stream = await create(
            model=edge.model, prompt=prompt, temperature=0, max_tokens=12, stream=True
        )
        streamed = "".join([chunk.choices[0].text async for chunk in stream])
    assert "Paris" in whole.choices[0].text
    assert whole.choices[0].text == of_ids.choices[0].text == streamed
    assert usage_of(whole).prompt_tokens == len(token_ids)


async def test_a_stop_string_ends_the_answer_before_it(edge: Edge) -> None:
    full = text_of(await chat(edge))
    stop = full.split()[8]
    stopped = await chat(edge, stop=["never said", stop])
    assert text_of(stopped) == full.split(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < NUM_TOKENS


async def test_a_seed_reproduces_the_answer(edge: Edge) -> None:
    async def sampled(seed: int) -> str:
        return text_of(await chat(edge, temperature=1.0, top_p=0.95, seed=seed))

    first = await sampled(7)
    assert await sampled(7) == first
    assert await sampled(8) != first


async def test_the_token_limit_holds_by_either_name(edge: Edge) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        limits = {"max_tokens": None, name: 5}
        completion = await chat(edge, **limits)
        assert completion.usage.completion_tokens == 5
        assert completion.choices[0].finish_reason == "length"


async def test_an_answer_ends_by_itself(edge: Edge) -> None:
    question = "What is 2 + 2? Answer with one number."
    completion = await chat(edge, messages=user_says(question), max_tokens=64)
    assert completion.choices[0].finish_reason == "stop"
    assert "4" in text_of(completion)


async def test_the_model_is_listed(edge: Edge) -> None:
    async with edge.client() as client:
        [model] = (await client.models.list()).data
        assert model.id == edge.model
        assert await client.models.retrieve(edge.model) == model
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("another")


REFUSED = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 2}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "word " * 4000}]}, "messages"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"extra_body": {"temprature": 1}}, "temprature"),
]


@pytest.mark.parametrize(("parameters", "param"), REFUSED, ids=[param for _, param in REFUSED])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_what_cannot_be_answered_is_refused_by_name(
    edges: dict[str, Edge], parameters: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await chat(edges["split"], stream=stream, **parameters)
    assert refused.value.param == param
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["message"]


async def test_an_unknown_model_and_a_wrong_key_have_their_own_errors(
    edges: dict[str, Edge],
) -> None:
    edge = edges["split"]
    async with edge.client() as client:
        with pytest.raises(openai.NotFoundError, match="gpt-4o") as unknown:
            await client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    async with edge.client(api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model=edge.model, messages=QUESTION)
