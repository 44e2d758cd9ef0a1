"""Every wrong request gets OpenAI's error body, the right status and the parameter's name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_agent.api.errors import failure_of
from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    DeadlineExceeded,
    DrafterFailed,
    LocalProtocolError,
    ModelMismatch,
    PicoSpecError,
    RequestError,
)
from tests.support.edge_api import CARD, EOS, eventually, serve

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
NAN, INF = "<<NaN>>", "<<Infinity>>"  # written as JSON's literals, which json.dumps would quote


def body_of(path: str, change: dict[str, Any]) -> bytes:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hello"}
    body = {"model": CARD.model_id} | prompt | change
    body = {key: value for key, value in body.items() if value != "<<absent>>"}
    text = json.dumps(body).replace(f'"{NAN}"', "NaN").replace(f'"{INF}"', "Infinity")
    return text.encode()


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
CALL = {"type": "function", "function": {"name": "f"}}

# (change of a good body, status, param, code)
EITHER: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"model": "<<absent>>"}, 400, "model", "missing_required_parameter"),
    ({"model": None}, 400, "model", "missing_required_parameter"),
    ({"model": ""}, 400, "model", "empty_string"),
    ({"model": 7}, 400, "model", "invalid_type"),
    ({"temperature": -0.1}, 400, "temperature", "below_min_value"),
    ({"temperature": 2.1}, 400, "temperature", "above_max_value"),
    ({"temperature": NAN}, 400, "temperature", "invalid_value"),
    ({"temperature": INF}, 400, "temperature", "invalid_value"),
    ({"temperature": 1e300}, 400, "temperature", "above_max_value"),
    ({"temperature": "0.7"}, 400, "temperature", "invalid_type"),
    ({"temperature": True}, 400, "temperature", "invalid_type"),
    ({"temperature": [1]}, 400, "temperature", "invalid_type"),
    ({"top_p": 0}, 400, "top_p", "below_min_value"),
    ({"top_p": 1e-60}, 400, "top_p", "below_min_value"),  # zero as the cloud's float32
    ({"top_p": 1.01}, 400, "top_p", "above_max_value"),
    ({"top_p": NAN}, 400, "top_p", "invalid_value"),
    ({"top_k": -1}, 400, "top_k", "below_min_value"),
    ({"top_k": 2**40}, 400, "top_k", "above_max_value"),
    ({"top_k": 1.5}, 400, "top_k", "invalid_type"),
    ({"min_p": -0.5}, 400, "min_p", "below_min_value"),
    ({"min_p": 2}, 400, "min_p", "above_max_value"),
    ({"presence_penalty": -3}, 400, "presence_penalty", "below_min_value"),
    ({"frequency_penalty": INF}, 400, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "below_min_value"),
    ({"repetition_penalty": 11}, 400, "repetition_penalty", "above_max_value"),
    ({"seed": 2**64}, 400, "seed", "above_max_value"),
    ({"seed": 1.0}, 400, "seed", "invalid_type"),
    ({"n": 0}, 400, "n", "below_min_value"),
    ({"n": 2}, 400, "n", "above_max_value"),
    ({"n": 10**30}, 400, "n", "above_max_value"),
    ({"n": True}, 400, "n", "invalid_type"),
    ({"max_tokens": 0}, 400, "max_tokens", "below_min_value"),
    ({"max_tokens": -5}, 400, "max_tokens", "below_min_value"),
    ({"max_tokens": 10**12}, 400, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": "5"}, 400, "max_tokens", "invalid_type"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "array_above_max_length"),
    ({"stop": ""}, 400, "stop[0]", "empty_string"),
    ({"stop": ["a", 1]}, 400, "stop[1]", "invalid_type"),
    ({"stop": 5}, 400, "stop", "invalid_type"),
    ({"stop": ["a" * 2000]}, 400, "stop[0]", "string_above_max_length"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids[0]", "below_min_value"),
    ({"stop_token_ids": [CARD.logits_width]}, 400, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": [3, 4, 5, 6]}, 400, "stop_token_ids", "array_above_max_length"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias.5", "above_max_value"),
    ({"logit_bias": {"5": NAN}}, 400, "logit_bias.5", "invalid_value"),
    ({"logit_bias": {"five": 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {str(CARD.logits_width): 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": dict.fromkeys("3456", 1)}, 400, "logit_bias", "object_above_max_properties"),
    ({"logit_bias": [1]}, 400, "logit_bias", "invalid_type"),
    ({"stream": "yes"}, 400, "stream", "invalid_type"),
    ({"stream": 1}, 400, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        400,
        "stream_options.include_usage",
        "invalid_type",
    ),
    ({"logprobs": True}, 400, "logprobs", "unsupported_parameter"),
    ({"logprobs": 0}, 400, "logprobs", "unsupported_parameter"),
    ({"tools": [CALL]}, 400, "tools", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
    ({"store": True}, 400, "store", "unsupported_parameter"),
    ({"echo": True}, 400, "echo", "unsupported_parameter"),
    ({"suffix": "x"}, 400, "suffix", "unsupported_parameter"),
    ({"best_of": 2}, 400, "best_of", "unsupported_parameter"),
    ({"temprature": 0.5}, 400, "temprature", "unknown_parameter"),
]
CHAT_ONLY: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"messages": []}, 400, "messages", "empty_array"),
    ({"messages": "<<absent>>"}, 400, "messages", "missing_required_parameter"),
    ({"messages": "hello"}, 400, "messages", "invalid_type"),
    ({"messages": ["hello"]}, 400, "messages[0]", "invalid_type"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
    ({"messages": user(None)}, 400, "messages[0].content", "missing_required_parameter"),
    ({"messages": user(5)}, 400, "messages[0].content", "invalid_type"),
    ({"messages": user([])}, 400, "messages[0].content", "empty_array"),
    ({"messages": user([IMAGE])}, 400, "messages[0].content[0].type", "invalid_value"),
    (
        {"messages": user([{"type": "text"}])},
        400,
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    ({"messages": user("x " * 500)}, 400, "messages", "context_length_exceeded"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "below_min_value"),
    ({"max_completion_tokens": 500}, 400, "max_completion_tokens", "context_length_exceeded"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, 400, "max_tokens", "invalid_value"),
    ({"prompt": "x"}, 400, "prompt", "unknown_parameter"),
]
TEXT_ONLY: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"prompt": ""}, 400, "prompt", "empty_prompt"),
    ({"prompt": []}, 400, "prompt", "empty_prompt"),
    ({"prompt": [[]]}, 400, "prompt", "empty_prompt"),
    ({"prompt": "<<absent>>"}, 400, "prompt", "missing_required_parameter"),
    ({"prompt": ["a", "b"]}, 400, "prompt", "unsupported_value"),
    ({"prompt": [[1], [2]]}, 400, "prompt", "unsupported_value"),
    ({"prompt": 5}, 400, "prompt", "invalid_type"),
    ({"prompt": [1, True]}, 400, "prompt", "invalid_type"),
    ({"prompt": [1, 2.0]}, 400, "prompt", "invalid_type"),
    ({"prompt": [1, -1]}, 400, "prompt", "invalid_value"),
    ({"prompt": [1, CARD.logits_width]}, 400, "prompt", "invalid_value"),
    ({"prompt": [1, 2**70]}, 400, "prompt", "invalid_value"),
    ({"prompt": [5] * CARD.max_model_len}, 400, "prompt", "context_length_exceeded"),
    ({"max_completion_tokens": 5}, 400, "max_completion_tokens", "unknown_parameter"),
]
CASES = [
    *((path, *case) for path in (CHAT, TEXT) for case in EITHER),
    *((CHAT, *case) for case in CHAT_ONLY),
    *((TEXT, *case) for case in TEXT_ONLY),
]


async def test_wrong_parameters_are_named() -> None:
    async with serve() as edge:
        for path, change, status, param, code in CASES:
            for stream in (False, True):
                # A stream is not opened before everything is checked.
                change = (
                    change
                    if "stream" in change or "stream_options" in change
                    else change | {"stream": stream}
                )
                response = await edge.http.post(
                    path,
                    content=body_of(path, change),
                    headers={"content-type": "application/json"},
                )
                error = response.json()["error"]
                case = (path, change, error)
                assert response.status_code == status, case
                assert (error["param"], error["code"]) == (param, code), case
                assert error["type"] == "invalid_request_error", case
                assert error["message"], case
                assert set(error) == {"message", "type", "param", "code"}
                assert response.headers["x-request-id"]
        assert edge.generator.requests == []  # nothing was started
        assert edge.gate.active == 0


async def test_harmless_and_neutral_parameters_are_accepted() -> None:
    change = {
        "user": "someone", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "logprobs": None, "tools": None, "response_format": {"type": "text"}, "n": 1, "stop": None,
        "temperature": None, "seed": -3, "top_k": 0, "stream": False, "stream_options": None,
        "logit_bias": {"5": -100}, "parallel_tool_calls": True, "max_tokens": 5,
    }  # fmt: skip
    async with serve() as edge:
        for path in (CHAT, TEXT):
            response = await edge.http.post(
                path,
                content=body_of(path, change),
                headers={"content-type": "application/json; charset=utf-8"},
            )
            assert response.status_code == 200, response.text
        request = edge.generator.requests[0]
        assert request.sampling.temperature == 1.0
        assert request.sampling.seed == 2**64 - 3
        assert request.sampling.logit_bias == ((5, -100.0),)
        assert request.stop_token_ids == (EOS,)
        assert request.max_tokens == 5


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{'model': 1}", b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800"}', b"nope"],
)
async def test_bad_json(body: bytes) -> None:
    async with serve(max_body_bytes=1 << 20) as edge:
        response = await edge.http.post(
            CHAT, content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_json"


async def test_bodies_that_are_no_object_too_large_or_no_json() -> None:
    async with serve(max_body_bytes=2048) as edge:

        async def post(content: Any, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
            response = await edge.http.post(CHAT, content=content, headers={"content-type": kind})
            return response.status_code, response.json()["error"]

        async def trickle() -> Any:  # chunked: no Content-Length gives it away
            for _ in range(8):
                yield b" " * 1024

        assert (await post(b"[]"))[1]["code"] == "invalid_type"
        assert (await post(b" " * 4096))[0] == 413
        assert (await post(trickle()))[0] == 413
        assert (await post(body_of(CHAT, {}), "text/plain"))[0] == 415


async def test_unknown_paths_and_methods_answer_in_the_same_form() -> None:
    async with serve() as edge:
        missing = await edge.http.get("/v1/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
        wrong = await edge.http.get(CHAT)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"
        model = await edge.http.get("/v1/models/other")
        assert (model.status_code, model.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_api_key_is_asked_for() -> None:
    async with serve(api_key="sesame") as edge:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            for response in (
                await edge.http.post(CHAT, json={}, headers=headers),
                await edge.http.get("/v1/models", headers=headers),
            ):
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        good = {"Authorization": "Bearer sesame"}
        assert (await edge.http.get("/v1/models", headers=good)).status_code == 200
        assert (await edge.http.get("/health")).status_code == 200


FAILURES: list[tuple[PicoSpecError, int, str, str | None]] = [
    (CloudUnavailable("cannot reach the cloud", 2.5), 503, "service_unavailable", "3"),
    (ModelMismatch("they differ in tokenizer.json"), 503, "service_unavailable", "5"),
    (CapacityError("full"), 503, "service_unavailable", "1"),
    (DrafterFailed("gone"), 503, "service_unavailable", "5"),
    (DeadlineExceeded("late"), 504, "timeout", None),
    (RequestError("bad", "top_k"), 400, "invalid_request_error", None),
    (LocalProtocolError("bug"), 500, "server_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_failures_before_the_first_token_have_a_status(path: str, stream: bool) -> None:
    async with serve() as edge:
        for error, status, kind, retry_after in FAILURES:
            edge.generator.error = error
            response = await edge.http.post(
                path,
                content=body_of(path, {"stream": stream}),
                headers={"content-type": "application/json"},
            )
            assert response.status_code == status
            assert response.json()["error"]["type"] == kind
            assert response.json()["error"]["message"] == str(error)
            assert response.headers.get("retry-after") == retry_after
        assert edge.generator.closed == len(edge.generator.requests) == len(FAILURES)


async def test_failures_after_the_first_token_are_an_event() -> None:
    async with serve() as edge:
        edge.generator.error = CloudUnavailable("the link broke")
        edge.generator.error_after = 2
        response = await edge.http.post(
            CHAT,
            content=body_of(CHAT, {"stream": True}),
            headers={"content-type": "application/json"},
        )
        events = [line[6:] for line in response.text.split("\n\n") if line]
        assert response.status_code == 200
        assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"
        assert json.loads(events[-1])["error"] == {
            "message": "the link broke",
            "type": "service_unavailable",
            "param": None,
            "code": "cloud_unavailable",
        }
        assert "[DONE]" not in response.text
        assert edge.generator.closed == 1
        await eventually(lambda: edge.requests_total("chat_completions", "unavailable") == 1)


async def test_the_host_says_why_nothing_is_served() -> None:
    async with serve() as edge:
        edge.host.error = ModelMismatch("they differ in tokenizer.json")
        for response in (
            await edge.http.post(CHAT, json=json.loads(body_of(CHAT, {}))),
            await edge.http.get("/v1/models"),
        ):
            assert response.status_code == 503
            assert "tokenizer.json" in response.json()["error"]["message"]
        health = await edge.http.get("/health")
        assert health.status_code == 503
        assert "tokenizer.json" in health.json()["problem"]
        # What is wrong in any case is said first.
        wrong = await edge.http.post(
            CHAT, content=b"{", headers={"content-type": "application/json"}
        )
        assert wrong.status_code == 400


def test_what_has_no_name_shows_nothing() -> None:
    failure = failure_of(KeyError("secret"))
    assert failure.status == 500
    assert "secret" not in json.dumps(failure.body())
