"""The seam between the OpenAI API and the speculative pipeline: one generation.

`pipeline.SpeculativeGenerator` is the real generator; `ScriptedGenerator` below is the double
for unit tests of the API.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from picospec.errors import PicoSpecError
from picospec.protocol.messages import FinishReason, SamplingParams, TokenArray


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """Checked and tokenized: nothing in it can be refused by the cloud any more."""

    request_id: str
    prompt_token_ids: TokenArray  # [num_prompt_tokens], at least one
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...]  # end-of-sequence ids included
    seeded: bool = False  # the caller chose the seed: the text must be a function of it


@dataclass(slots=True)
class GenerationStats:
    """Counts of one generation, kept up to date while it runs."""

    mode: str = ""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0  # sent to the cloud and judged
    accepted_tokens: int = 0
    verdicts: int = 0
    forwards: int = 0  # of the target for this generation
    rollbacks: int = 0
    resumes: int = 0  # times the link was lost and the session taken up again
    bytes_up: int = 0  # gRPC message payloads
    bytes_down: int = 0


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """Newly committed tokens, in order; the last chunk has a finish_reason."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


class Generation(Protocol):
    """A running generation. Iterate it for chunks; `aclose` cancels it (idempotent)."""

    stats: GenerationStats

    def __aiter__(self) -> AsyncIterator[GenerationChunk]: ...

    async def aclose(self) -> None: ...


class Generator(Protocol):
    """Starts generations. Iterating one raises CloudUnavailable, CapacityError ..."""

    def generate(self, request: GenerationRequest) -> Generation: ...


@dataclass
class ScriptedGenerator:
    """A double: every generation yields `token_ids`, one per chunk, then `finish_reason`.

    With `error`, it is raised after `error_after` chunks.
    """

    token_ids: Sequence[int]
    finish_reason: FinishReason = FinishReason.STOP
    error: PicoSpecError | None = None
    error_after: int = 0
    delay_s: float = 0.0
    requests: list[GenerationRequest] = field(default_factory=list)
    closed: int = 0

    def generate(self, request: GenerationRequest) -> Generation:
        self.requests.append(request)
        return _ScriptedGeneration(self, request)


class _ScriptedGeneration:
    def __init__(self, script: ScriptedGenerator, request: GenerationRequest) -> None:
        self._script = script
        self._request = request
        self.stats = GenerationStats(mode="split", prompt_tokens=len(request.prompt_token_ids))

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        script = self._script
        token_ids = script.token_ids[: self._request.max_tokens]
        for index, token_id in enumerate(token_ids):
            if script.error is not None and index >= script.error_after:
                raise script.error
            await asyncio.sleep(script.delay_s)
            self.stats.output_tokens += 1
            yield GenerationChunk((token_id,))
        truncated = len(token_ids) < len(script.token_ids)
        yield GenerationChunk((), FinishReason.LENGTH if truncated else script.finish_reason)

    async def aclose(self) -> None:
        self._script.closed += 1
