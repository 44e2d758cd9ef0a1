"""A chat with an edge agent as any HTTP client has it, without OpenAI's library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

QUESTION = "Why is the sky blue?"
PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class EdgeClient:
    """Talks to one edge agent."""

    url: str
    api_key: str

    def is_healthy(self) -> bool:
        """Whether /health says that a request would be answered; False while nobody listens."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, max_tokens: int = 8) -> str:
        """A greedy answer to QUESTION, whole. Raises httpx.HTTPStatusError."""
        response = httpx.post(
            f"{self.url}/v1/chat/completions",
            json=self._body(max_tokens, stream=False),
            headers=self._headers,
            timeout=PATIENCE_S,
        )
        response.raise_for_status()
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    def stream(self, max_tokens: int) -> Iterator[dict[str, Any]]:
        """The chunks of the same; ends with [DONE], or AssertionError."""
        with httpx.stream(
            "POST",
            f"{self.url}/v1/chat/completions",
            json=self._body(max_tokens, stream=True),
            headers=self._headers,
            timeout=PATIENCE_S,
        ) as response:
            response.raise_for_status()
            lines = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
            for data in lines:
                if data == "[DONE]":
                    return
                yield json.loads(data)
        raise AssertionError("the stream ended without [DONE]")

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    def _body(self, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        return {
            "model": "target",
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        }
