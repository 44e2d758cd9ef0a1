"""A client of the edge agent's OpenAI API."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from picospec_cli.console import CommandFailed

Message = dict[str, str]
HEALTH_TIMEOUT_S = 3.0
DEFAULT_URL = "http://127.0.0.1:8080"


def configured_api_key() -> str:
    """The key an edge agent on this machine would ask for."""
    return os.environ.get("PICOSPEC_EDGE_SERVER_API_KEY", "")


@dataclass(slots=True)
class Answer:
    """What one streamed answer consisted of; filled while it is read."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    time_to_first_token_s: float = 0.0
    duration_s: float = 0.0  # first token to last

    def summary(self) -> str:
        """One line of figures, each with its unit, from the edge's usage extension."""
        tokens = int(self.usage.get("completion_tokens", 0))
        figures = [f"{tokens} output tokens", f"first after {self.time_to_first_token_s:.2f} s"]
        if tokens > 1 and self.duration_s > 0:
            figures.append(f"{(tokens - 1) / self.duration_s:.1f} tokens/s")
        speculation = self.usage.get("speculation") or {}
        if speculation and tokens:
            drafted, accepted = speculation["drafted_tokens"], speculation["accepted_tokens"]
            verdicts = speculation["verdicts"]
            figures += [
                f"acceptance rate {accepted / drafted:.2f} ({accepted}/{drafted})"
                if drafted
                else "no drafts judged",
                f"mean accepted length {accepted / max(1, verdicts):.2f}",
                f"{speculation['forwards'] / tokens:.2f} cloud forwards/token",
                f"{speculation['bytes_up'] / tokens:.0f} bytes up and "
                f"{speculation['bytes_down'] / tokens:.0f} down per token",
                f"{speculation['mode']} mode",
            ]
        return ", ".join(figures)


class ChatClient:
    """Asks one edge agent. Every method raises CommandFailed with a sentence that says why not."""

    def __init__(self, url: str = DEFAULT_URL, api_key: str = "", timeout_s: float = 120.0) -> None:
        address = httpx.URL(url if "//" in url else f"http://{url}")
        if address.scheme not in ("http", "https") or not address.host:
            raise CommandFailed(f"{url} is not the address of an edge agent, {DEFAULT_URL} say")
        self.url = str(address).rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False
        )

    def health(self) -> dict[str, Any]:
        """The body of /health, whatever its status; {} while nobody listens."""
        with suppress(httpx.HTTPError):
            return _body_of(
                self._http.get("/health", timeout=min(self._timeout_s, HEALTH_TIMEOUT_S))
            )
        return {}

    def model(self) -> str:
        """The id of the model served."""
        try:
            response = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise CommandFailed(f"no edge agent answers at {self.url}: {error}") from error
        if not response.is_success:
            raise CommandFailed(_error_of(response.status_code, _body_of(response)))
        return str(response.json()["data"][0]["id"])

    def stream(
        self, messages: Sequence[Message], answer: Answer, **parameters: Any
    ) -> Iterator[str]:
        """The answer's pieces of text as they come; `answer` is filled on the way.

        Closing the iterator cancels the generation.
        """
        request = {"messages": list(messages), "stream": True, **parameters}
        request["stream_options"] = {"include_usage": True}
        started_s = time.monotonic()
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=request) as response:
                if not response.is_success:
                    response.read()
                    raise CommandFailed(_error_of(response.status_code, _body_of(response)))
                for event in _events(response.iter_lines()):
                    piece = _take(event, answer)
                    now_s = time.monotonic()
                    if piece:
                        if not answer.text:
                            answer.time_to_first_token_s = now_s - started_s
                        answer.text += piece
                        answer.duration_s = now_s - started_s - answer.time_to_first_token_s
                        yield piece
        except (httpx.HTTPError, ValueError) as error:
            raise CommandFailed(f"the answer from {self.url} broke off: {error}") from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The server-sent events' JSON, up to `[DONE]`."""
    for line in lines:
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)
    raise httpx.RemoteProtocolError("the stream ended before it was done")


def _take(event: dict[str, Any], answer: Answer) -> str:
    """Put one chunk's facts into `answer`; returns its text."""
    if "error" in event:
        raise CommandFailed(_error_of(200, event))
    answer.usage = event.get("usage") or answer.usage
    for choice in event.get("choices", ()):
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        return choice.get("delta", {}).get("content") or ""
    return ""


def _body_of(response: httpx.Response) -> dict[str, Any]:
    with suppress(ValueError):
        body = response.json()
        return body if isinstance(body, dict) else {}
    return {}


def _error_of(status: int, body: dict[str, Any]) -> str:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return f"the edge agent says: {message or f'status {status}'}"
