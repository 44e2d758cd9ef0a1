"""Server-sent events: how an answer travels while it is made."""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Send

from edge_agent.api.answers import Answer, Json, encode, usage
from edge_agent.api.errors import failure_of
from edge_agent.api.text import TextChunk, TextGeneration
from picospec.errors import PicoSpecError
from picospec.protocol.messages import FinishReason

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects events would undo the streaming
]
_DONE = b"data: [DONE]\n\n"
_LAST_WORD_S = 2.0  # for telling a client that may not be reading


class EventStream:
    """The events of one answer, in OpenAI's order.

    Opening chunks, one chunk for each token with text, the finish chunk, the usage chunk for who
    asked, [DONE]. After a failure: one error event, and the end without [DONE].
    """

    def __init__(self, send: Send, answer: Answer, *, include_usage: bool) -> None:
        self._send = send
        self._answer = answer
        self._include_usage = include_usage
        self.started = False

    async def run(
        self, first: TextChunk, rest: AsyncIterator[TextChunk], generation: TextGeneration
    ) -> FinishReason:
        """Sends the whole answer; its first chunk is at hand. Raises what `rest` raises."""
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        opening = list(self._answer.opening())
        finish_reason = await self._send_chunk(opening, first)
        while finish_reason is None:
            finish_reason = await self._send_chunk([], await anext(rest))
        closing = self._event(self._answer.finish(finish_reason))
        if self._include_usage:
            counts = usage(generation.stats, generation.completion_tokens)
            closing += _event(self._answer.closing_usage(counts))
        await self._write(closing + _DONE, more=False)
        return finish_reason

    async def fail(self, error: PicoSpecError | Exception) -> None:
        """The error event, after which the response ends."""
        async with asyncio.timeout(_LAST_WORD_S):
            await self._write(_event(failure_of(error).body()), more=False)

    async def _send_chunk(self, opening: list[Json], chunk: TextChunk) -> FinishReason | None:
        objects = opening + [self._answer.delta(text) for text in chunk.deltas]
        if objects:
            await self._write(b"".join(map(self._event, objects)), more=True)
        return chunk.finish_reason

    def _event(self, chunk: Json) -> bytes:
        # Who asked for usage expects the field, empty, on every chunk before the usage chunk.
        return _event(chunk | {"usage": None} if self._include_usage else chunk)

    async def _write(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _event(value: Json) -> bytes:
    return b"data: " + encode(value) + b"\n\n"
