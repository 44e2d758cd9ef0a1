"""A generation's tokens as text, and what is counted on the way."""

import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass

from edge_agent.detokenizer import Detokenizer, StopScanner
from edge_agent.generation import Generation, GenerationStats
from edge_agent.metrics import EdgeMetrics
from picospec.errors import LocalProtocolError
from picospec.protocol.messages import FinishReason


@dataclass(frozen=True, slots=True)
class TextChunk:
    """The text of newly committed tokens, one entry per token that yields any.

    The last chunk of a generation has a finish_reason.
    """

    deltas: tuple[str, ...]
    finish_reason: FinishReason | None = None


class TextGeneration:
    """Iterate once for chunks of text. Stop strings end it early, their text is left out.

    `completion_tokens` counts as vLLM does: the end-of-sequence token counts and is not shown,
    tokens committed after a stop string do not.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        detokenizer: Detokenizer,
        stops: StopScanner,
        stop_token_ids: Collection[int],
        metrics: EdgeMetrics,
        started_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._generation = generation
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_token_ids = frozenset(stop_token_ids)
        self._metrics = metrics
        self._last_s = started_s
        self._clock = clock
        self.completion_tokens = 0

    @property
    def stats(self) -> GenerationStats:
        return self._generation.stats

    async def __aiter__(self) -> AsyncIterator[TextChunk]:
        async for chunk in self._generation:
            if chunk.token_ids:
                self._observe(len(chunk.token_ids))
            deltas: list[str] = []
            for token_id in chunk.token_ids:
                self.completion_tokens += 1
                if token_id not in self._stop_token_ids:
                    deltas.append(self._stops.feed(self._detokenizer.push(token_id)))
                if self._stops.stopped:
                    yield _chunk(deltas, FinishReason.STOP)
                    return
            if chunk.finish_reason is not None:
                deltas.append(self._stops.feed(self._detokenizer.finish()))
                deltas.append(self._stops.finish())
                stopped = self._stops.stopped
                yield _chunk(deltas, FinishReason.STOP if stopped else chunk.finish_reason)
                return
            yield _chunk(deltas)
        raise LocalProtocolError("The generation ended without a reason", "generation")

    async def aclose(self) -> None:
        """Cancels what still runs."""
        await self._generation.aclose()

    def _observe(self, num_tokens: int) -> None:
        now = self._clock()
        if self.completion_tokens == 0:
            self._metrics.time_to_first_token(now - self._last_s)
        else:
            self._metrics.inter_token(now - self._last_s, num_tokens)
        self._last_s = now


def _chunk(deltas: list[str], finish_reason: FinishReason | None = None) -> TextChunk:
    return TextChunk(tuple(delta for delta in deltas if delta), finish_reason)
