"""What is sent back: OpenAI's completion objects, whole or in chunks."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from edge_agent.generation import GenerationStats
from picospec.protocol.messages import FinishReason

Json = dict[str, Any]

_SPECULATION = (
    *("mode", "drafted_tokens", "accepted_tokens", "verdicts", "forwards"),
    *("rollbacks", "resumes", "bytes_up", "bytes_down"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What every object of one answer repeats."""

    PREFIX: ClassVar[str]  # of ids
    CHUNK: ClassVar[str]  # the object's name

    request_id: str
    model: str
    created: int  # Unix time, seconds
    system_fingerprint: str

    def whole(self, text: str, finish_reason: FinishReason, usage: Json) -> Json:
        raise NotImplementedError

    def opening(self) -> Iterator[Json]:
        """The chunks before any text."""
        yield from ()

    def delta(self, text: str) -> Json:
        raise NotImplementedError

    def finish(self, finish_reason: FinishReason) -> Json:
        raise NotImplementedError

    def closing_usage(self, usage: Json) -> Json:
        """The chunk after the last, for who asked for it."""
        return self._object(self.CHUNK, []) | {"usage": usage}

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.PREFIX}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }


class ChatAnswer(Answer):
    """chat.completion and chat.completion.chunk"""

    __slots__ = ()
    PREFIX = "chatcmpl"
    CHUNK = "chat.completion.chunk"

    def whole(self, text: str, finish_reason: FinishReason, usage: Json) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason.value,
        }
        return self._object("chat.completion", [choice]) | {"usage": usage}

    def opening(self) -> Iterator[Json]:
        yield self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: str) -> Json:
        return self._chunk({"content": text})

    def finish(self, finish_reason: FinishReason) -> Json:
        return self._chunk({}, finish_reason.value)

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object(self.CHUNK, [choice])


class TextAnswer(Answer):
    """text_completion, whole and in chunks"""

    __slots__ = ()
    PREFIX = "cmpl"
    CHUNK = "text_completion"

    def whole(self, text: str, finish_reason: FinishReason, usage: Json) -> Json:
        return self._chunk(text, finish_reason.value) | {"usage": usage}

    def delta(self, text: str) -> Json:
        return self._chunk(text)

    def finish(self, finish_reason: FinishReason) -> Json:
        return self._chunk("", finish_reason.value)

    def _chunk(self, text: str, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return self._object(self.CHUNK, [choice])


def usage(stats: GenerationStats, completion_tokens: int) -> Json:
    """OpenAI's usage, and what speculation did for it under `speculation`."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": stats.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_prompt_tokens},
        "speculation": {name: getattr(stats, name) for name in _SPECULATION},
    }


def encode(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
