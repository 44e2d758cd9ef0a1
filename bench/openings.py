"""What benchmarks open: sessions of the cloud, contexts of a drafter, generations of an edge.

Each has a name of its own, and ends by its number of tokens only.
"""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_agent.drafting.messages import ContextSpec
from edge_agent.generation import GenerationRequest
from edge_agent.link import Link, Stream
from picospec.protocol.messages import (
    EMPTY_TOKENS,
    AssistPolicy,
    Open,
    SamplingParams,
    TokenArray,
    Verdict,
    VerificationMode,
)

COUPLED, SPLIT = VerificationMode.COUPLED, VerificationMode.SPLIT

_names = (f"bench-{number}" for number in itertools.count())


def opening(
    prompt: TokenArray,
    max_tokens: int,
    *,
    mode: VerificationMode = COUPLED,
    temperature: float = 0.0,
    seed: int = 1,
    assist: AssistPolicy = AssistPolicy.NEVER,
    verify_whole_rounds: bool = False,
) -> Open:
    return Open(
        session_id=next(_names),
        prompt_token_ids=prompt,
        output_token_ids=EMPTY_TOKENS,
        sampling=SamplingParams(temperature=temperature, seed=seed),
        mode=mode,
        max_tokens=max_tokens,
        assist=assist,
        verify_whole_rounds=verify_whole_rounds,
    )


@asynccontextmanager
async def opened(link: Link, session: Open) -> AsyncIterator[Stream]:
    stream = link.open_stream(session.session_id)
    try:
        stream.send(session)
        yield stream
    finally:
        await stream.aclose()


async def verdicts(stream: Stream) -> AsyncIterator[Verdict]:
    """Up to the end of the stream."""
    while (frame := await stream.receive()) is not None:
        if isinstance(frame, Verdict):
            yield frame


def context(
    prompt: TokenArray,
    max_tokens: int,
    *,
    mode: VerificationMode = COUPLED,
    temperature: float = 0.0,
    seed: int = 1,
    logits_width: int = 0,
) -> ContextSpec:
    return ContextSpec(
        request_id=next(_names),
        token_ids=prompt,
        sampling=SamplingParams(temperature=temperature, seed=seed),
        mode=mode,
        stop_token_ids=(),
        prompt_length=len(prompt),
        max_length=len(prompt) + max_tokens,
        logits_width=logits_width,
    )


def request(
    prompt: TokenArray, max_tokens: int, *, temperature: float = 0.0, seed: int = 1
) -> GenerationRequest:
    return GenerationRequest(
        request_id=next(_names),
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=temperature, seed=seed),
        max_tokens=max_tokens,
        stop_token_ids=(),
    )
