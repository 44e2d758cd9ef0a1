"""Chats for the `openai` client, and what this API's answers add to its types."""

from __future__ import annotations

from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

Answer = ChatCompletion | ChatCompletionChunk | Completion


def user_says(content: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": content}]


def usage_of(answer: Answer) -> CompletionUsage:
    assert answer.usage is not None
    return answer.usage


def speculation_of(answer: Answer) -> dict[str, Any]:
    """What drafting came to; OpenAI's usage has no such field."""
    extra = usage_of(answer).model_extra
    assert extra is not None
    speculation: dict[str, Any] = extra["speculation"]
    return speculation


def cached_tokens_of(answer: Answer) -> int | None:
    details = usage_of(answer).prompt_tokens_details
    assert details is not None
    return details.cached_tokens
