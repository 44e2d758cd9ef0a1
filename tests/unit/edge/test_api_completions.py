"""The official OpenAI client, unmodified, against the edge's API on a real socket."""

from __future__ import annotations

from typing import cast

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionContentPartTextParam, ChatCompletionMessageParam

from edge_agent.generation import Generation, GenerationRequest, GenerationStats
from edge_agent.metrics import DrafterState
from picospec.errors import CloudUnavailable
from picospec.protocol.messages import FinishReason
from tests.support.chat import cached_tokens_of, speculation_of, usage_of, user_says
from tests.support.edge_api import CARD, EOS, TOKENIZER, EdgeApi, serve

MESSAGES = user_says("hello")
PROMPT = TOKENIZER.encode_chat([{"role": "user", "content": "hello"}])


def client_of(edge: EdgeApi) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{edge.base_url}/v1", api_key="any", max_retries=0)


async def test_chat_whole() -> None:
    async with serve("hello wörld 🙂") as edge, client_of(edge) as client:
        completion = await client.chat.completions.create(
            model=CARD.model_id, messages=MESSAGES, seed=7, temperature=0.5, max_tokens=50
        )
    [choice] = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello wörld 🙂")
    assert choice.finish_reason == "stop"
    assert completion.object == "chat.completion"
    assert completion.model == CARD.model_id
    assert completion.id.startswith("chatcmpl-")
    assert completion.system_fingerprint is not None
    assert completion.system_fingerprint.startswith("picospec-split-")
    [request] = edge.generator.requests
    assert (request.sampling.seed, request.sampling.temperature) == (7, 0.5)
    assert request.max_tokens == 50
    assert request.prompt_token_ids.tolist() == PROMPT.tolist()
    usage = usage_of(completion)
    assert usage.prompt_tokens == len(PROMPT)
    # The end-of-sequence token counts and is not shown.
    assert usage.completion_tokens == len(edge.generator.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert cached_tokens_of(completion) == 0
    assert set(speculation_of(completion)) == {
        "mode", "drafted_tokens", "accepted_tokens", "verdicts", "forwards", "rollbacks",
        "resumes", "bytes_up", "bytes_down",
    }  # fmt: skip
    assert edge.generator.closed == 1


async def test_chat_stream() -> None:
    async with serve("hello world") as edge, client_of(edge) as client:
        stream = await client.chat.completions.create(
            model=CARD.model_id,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    first, *middle, finish, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    pieces = [TOKENIZER.decode([token_id]) for token_id in edge.generator.token_ids[:-1]]
    assert [chunk.choices[0].delta.content for chunk in middle] == pieces
    assert finish.choices[0].finish_reason == "stop"
    assert finish.choices[0].delta.content is None
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *middle))
    assert all(chunk.usage is None for chunk in (first, *middle, finish))
    assert last.choices == []
    assert usage_of(last).completion_tokens == len(edge.generator.token_ids)
    assert speculation_of(last)["mode"] == "split"
    assert len({chunk.id for chunk in chunks}) == 1


async def test_stream_helper_accumulates() -> None:
    async with (
        serve("hello wörld") as edge,
        client_of(edge) as client,
        client.chat.completions.stream(model=CARD.model_id, messages=MESSAGES) as stream,
    ):
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == "hello wörld"


async def test_an_answer_can_be_passed_back() -> None:
    async with serve() as edge, client_of(edge) as client:
        first = await client.chat.completions.create(model=CARD.model_id, messages=MESSAGES)
        # The client takes its own message objects as parameters; its types do not say so.
        said = cast(ChatCompletionMessageParam, first.choices[0].message)
        await client.chat.completions.create(
            model=CARD.model_id, messages=[*MESSAGES, said, *MESSAGES]
        )
    sent = edge.generator.requests[1].prompt_token_ids.tolist()
    assert TOKENIZER.decode(sent).count("hello world") == 1


async def test_text_whole_and_stream() -> None:
    async with serve("hello world") as edge, client_of(edge) as client:
        for prompt in ("the quick", TOKENIZER.encode("the quick").tolist(), ["the quick"]):
            completion = await client.completions.create(model=CARD.model_id, prompt=prompt)
            assert completion.choices[0].text == "hello world"
            assert completion.id.startswith("cmpl-")
        stream = await client.completions.create(
            model=CARD.model_id, prompt="the quick", stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    prompts = [request.prompt_token_ids.tolist() for request in edge.generator.requests]
    assert prompts == [TOKENIZER.encode("the quick").tolist()] * 4
    assert edge.generator.requests[0].max_tokens == 16  # OpenAI's default


async def test_parts_are_joined_and_developers_are_the_system() -> None:
    parts: list[ChatCompletionContentPartTextParam] = [
        {"type": "text", "text": "hello"},
        {"type": "text", "text": "world"},
    ]
    async with serve() as edge, client_of(edge) as client:
        await client.chat.completions.create(
            model=CARD.model_id, messages=[{"role": "developer", "content": parts}]
        )
    expected = TOKENIZER.encode_chat([{"role": "system", "content": "hello\nworld"}])
    assert edge.generator.requests[0].prompt_token_ids.tolist() == expected.tolist()


async def test_length_is_a_finish_reason() -> None:
    async with serve("hello world") as edge, client_of(edge) as client:
        completion = await client.chat.completions.create(
            model=CARD.model_id, messages=MESSAGES, max_completion_tokens=2
        )
    assert completion.choices[0].finish_reason == "length"
    assert usage_of(completion).completion_tokens == 2


async def test_the_limit_defaults_to_the_room_there_is() -> None:
    async with serve() as edge, client_of(edge) as client:
        await client.chat.completions.create(model=CARD.model_id, messages=MESSAGES)
    [request] = edge.generator.requests
    assert request.max_tokens == CARD.max_model_len - len(request.prompt_token_ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [("lo w", "hel"), (["zzz", "wör"], "hello "), ("nothing", "hello wörld"), ("ld", "hello wör")],
)
async def test_stop_strings_end_across_tokens(stream: bool, stop: str, text: str) -> None:
    async with serve("hello wörld") as edge, client_of(edge) as client:
        create = client.chat.completions.create
        if stream:
            parts = await create(model=CARD.model_id, messages=MESSAGES, stop=stop, stream=True)
            chunks = [chunk async for chunk in parts]
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            answer = await create(model=CARD.model_id, messages=MESSAGES, stop=stop)
            assert answer.choices[0].message.content == text
            assert answer.choices[0].finish_reason == "stop"
    assert edge.generator.closed == 1


async def test_tokens_after_a_stop_string_are_not_counted() -> None:
    async with serve("abcdef") as edge, client_of(edge) as client:
        answer = await client.completions.create(model=CARD.model_id, prompt="x", stop="cd")
    assert answer.choices[0].text == "ab"
    assert usage_of(answer).completion_tokens == len(TOKENIZER.encode("abcd"))


async def test_stop_token_ids_and_ignored_eos() -> None:
    token_ids = TOKENIZER.encode("hello world").tolist()
    async with serve([*token_ids, EOS, *token_ids]) as edge, client_of(edge) as client:
        edge.generator.finish_reason = FinishReason.STOP
        await client.chat.completions.create(
            model=CARD.model_id, messages=MESSAGES, extra_body={"stop_token_ids": [9]}
        )
        whole = await client.chat.completions.create(
            model=CARD.model_id, messages=MESSAGES, extra_body={"ignore_eos": True}
        )
    assert [request.stop_token_ids for request in edge.generator.requests] == [(EOS, 9), ()]
    assert whole.choices[0].message.content == "hello worldhello world"


async def test_usage_says_what_speculation_did(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = GenerationStats(
        mode="coupled", prompt_tokens=5, cached_prompt_tokens=4, drafted_tokens=9,
        accepted_tokens=6, verdicts=3, forwards=4, rollbacks=2, resumes=1, bytes_up=100,
        bytes_down=50,
    )  # fmt: skip
    async with serve() as edge, client_of(edge) as client:
        generate = edge.generator.generate

        def with_stats(request: GenerationRequest) -> Generation:
            generation = generate(request)
            generation.stats = stats
            return generation

        monkeypatch.setattr(edge.generator, "generate", with_stats)
        completion = await client.chat.completions.create(model=CARD.model_id, messages=MESSAGES)
    assert cached_tokens_of(completion) == 4
    assert speculation_of(completion) == {
        "mode": "coupled", "drafted_tokens": 9, "accepted_tokens": 6, "verdicts": 3,
        "forwards": 4, "rollbacks": 2, "resumes": 1, "bytes_up": 100, "bytes_down": 50,
    }  # fmt: skip


async def test_without_its_drafter_it_is_degraded_and_answers() -> None:
    async with serve() as edge, client_of(edge) as client:
        edge.host.drafter = DrafterState(problem="The drafter answers nothing.", troubled_s=2.5)
        health = await edge.http.get("/health")
        assert health.status_code == 200
        body = health.json()
        assert (body["status"], body["problem"]) == ("degraded", "The drafter answers nothing.")
        await client.chat.completions.create(model=CARD.model_id, messages=MESSAGES)
        text = (await edge.http.get("/metrics")).text
    assert "picospec_edge_requests_total" in text


async def test_models_health_and_metrics() -> None:
    async with serve() as edge, client_of(edge) as client:
        [model] = (await client.models.list()).data
        assert model.id == CARD.model_id
        assert (await client.models.retrieve(CARD.model_id)).id == CARD.model_id
        await client.chat.completions.create(model=CARD.model_id, messages=MESSAGES)
        health = await edge.http.get("/health")
        assert health.status_code == 200
        assert health.json() == {
            "status": "ok",
            "problem": None,
            "cloud": {"reachable": True, "model": CARD.model_id},
            "drafter": {
                "alive": True,
                "restarts": 0,
                "open_contexts": 0,
                "problem": "",
                "troubled_s": 0.0,
            },
            "active_generations": 0,
        }
        text = (await edge.http.get("/metrics")).text
    assert "picospec_edge_time_to_first_token_seconds_count 1.0" in text
    assert 'picospec_edge_requests_total{endpoint="chat_completions",outcome="stop"} 1.0' in text
    assert "picospec_edge_drafter_alive 1.0" in text


async def test_the_request_id_is_the_clients_if_it_is_one() -> None:
    async with serve() as edge, client_of(edge) as client:
        answer = await client.chat.completions.with_raw_response.create(
            model=CARD.model_id, messages=MESSAGES, extra_headers={"X-Request-Id": "my-id.7"}
        )
        assert answer.parse().id == "chatcmpl-my-id.7"
        assert answer.request_id == "my-id.7"
        for bad in ("x" * 65, "a b", "é"):
            headers = httpx.Headers({"X-Request-Id": bad}, encoding="utf-8")
            response = await edge.http.get("/health", headers=headers)
            assert response.headers["x-request-id"] != bad
    assert edge.generator.requests[0].request_id == "my-id.7"


async def test_errors_are_the_clients_exceptions() -> None:
    async with serve() as edge, client_of(edge) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(
                model=CARD.model_id, messages=MESSAGES, stream=True, top_p=0
            )
        assert wrong.value.param == "top_p"


async def test_an_error_event_raises_in_the_client() -> None:
    async with serve() as edge, client_of(edge) as client:
        edge.generator.error, edge.generator.error_after = CloudUnavailable("the link broke"), 3
        stream = await client.chat.completions.create(
            model=CARD.model_id, messages=MESSAGES, stream=True
        )
        with pytest.raises(openai.APIError, match="the link broke"):
            async for _ in stream:
                pass


async def test_a_stream_is_written_token_by_token() -> None:
    """No event waits for the next token."""
    async with serve("hello world", delay_s=0.05) as edge:
        arrivals: list[bytes] = []
        async with httpx.AsyncClient(base_url=edge.base_url) as http:
            body = {"model": CARD.model_id, "prompt": "x", "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                async for part in response.aiter_raw():
                    arrivals.append(part)
    assert arrivals[-1].endswith(b"data: [DONE]\n\n")
    assert len(arrivals) >= len(edge.generator.token_ids) - 1
