"""What becomes of a generation that breaks its own contract."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from edge_agent.api.text import TextGeneration
from edge_agent.detokenizer import StopScanner
from edge_agent.generation import GenerationChunk, GenerationStats
from edge_agent.metrics import EdgeMetrics
from picospec.errors import DrafterFailed, LocalProtocolError, http_status
from tests.support.tiny_tokenizer import tiny_tokenizer


class Unfinished:
    """A generation that stops without saying why: a bug of ours, whoever drafts."""

    stats = GenerationStats()

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        yield GenerationChunk((1,))

    async def aclose(self) -> None: ...


async def test_a_generation_without_an_end_is_our_fault_not_the_drafters() -> None:
    text = TextGeneration(
        Unfinished(),
        detokenizer=tiny_tokenizer().detokenizer(),
        stops=StopScanner(()),
        stop_token_ids=(),
        metrics=EdgeMetrics(),
        started_s=0.0,
    )
    with pytest.raises(LocalProtocolError) as caught:
        async for _ in text:
            pass
    assert http_status(caught.value) == 500 != http_status(DrafterFailed(""))
