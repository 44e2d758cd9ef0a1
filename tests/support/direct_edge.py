"""An edge without a network, a drafter's process or a pipeline: engine tests drive it by hand.

It is written against docs/protocol.md and shares no code with `EdgeSession`: one round is
drafted, delivered and awaited, then the next; so the engine is checked by a second reading. Where
the cloud takes over, rounds may come late or not at all.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cloud_server.engine.interface import EngineEvent, Prefilled, VerificationEngine
from picospec.errors import PicoSpecError
from picospec.protocol.messages import (
    EMPTY_TOKENS,
    AssistPolicy,
    Draft,
    FinishReason,
    Open,
    Rejection,
    SamplingParams,
    Verdict,
    VerificationMode,
)
from picospec.sampling.distribution import Distribution, draw
from picospec.sampling.noise import Purpose
from picospec.sampling.rejection import RejectionSampler

DraftLaw = Callable[[Sequence[int]], Distribution | None]  # context -> Q, None: no proposal
# How many seconds late a round of these drafts is sent; None: never.
Lateness = Callable[[Sequence[int]], float | None]

_keys = itertools.count()


@dataclass
class Outcome:
    """What a generation came to."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def taken_over(self) -> int:
        """Tokens that the cloud drew without a draft of them, the first left out."""
        alone = [verdict for verdict in self.verdicts[1:] if not verdict.num_draft_tokens]
        return sum(len(verdict.token_ids) for verdict in alone)

    @property
    def accepted(self) -> int:
        return sum(verdict.num_accepted for verdict in self.verdicts)

    @property
    def drafted(self) -> int:
        return sum(verdict.num_draft_tokens for verdict in self.verdicts)


async def generate(
    engine: VerificationEngine,
    prompt: Sequence[int],
    draft_law: DraftLaw,
    *,
    mode: VerificationMode,
    max_tokens: int,
    sampling: SamplingParams,
    draft_length: int | Callable[[], int] = 4,
    exact: bool = True,
    sparse_k: int = 64,
    stop_token_ids: tuple[int, ...] = (),
    output: Sequence[int] = (),
    lateness: Lateness | None = None,
) -> Outcome:
    """One generation over `engine`; raises what the engine reports.

    With `lateness` the cloud decodes alone whenever no draft of the session is queued.
    """
    edge = _Edge(
        engine,
        list(prompt),
        draft_law=draft_law,
        mode=mode,
        sampling=sampling,
        draft_length=draft_length,
        lateness=lateness,
    )
    edge.outcome.token_ids.extend(output)
    return await edge.run(
        Open(
            session_id=edge.key,
            prompt_token_ids=np.asarray(prompt, np.int32),
            output_token_ids=np.asarray(output, np.int32) if len(output) else EMPTY_TOKENS,
            sampling=sampling,
            mode=mode,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            exact=exact,
            sparse_k=sparse_k,
            assist=AssistPolicy.NEVER if lateness is None else AssistPolicy.ALWAYS,
        )
    )


class _Edge:
    def __init__(
        self,
        engine: VerificationEngine,
        prompt: list[int],
        draft_law: DraftLaw,
        mode: VerificationMode,
        sampling: SamplingParams,
        draft_length: int | Callable[[], int],
        lateness: Lateness | None,
    ) -> None:
        self.key = f"direct-{next(_keys)}"
        self.outcome = Outcome()
        self._engine = engine
        self._prompt = prompt
        self._draft_law = draft_law
        self._mode = mode
        self._sampling = sampling
        self._draft_length = draft_length
        self._lateness = lateness
        self._sending: asyncio.Task[None] | None = None
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._epoch = 0
        self._max_tokens = 0

    @property
    def _context(self) -> list[int]:
        return self._prompt + self.outcome.token_ids

    async def run(self, request: Open) -> Outcome:
        self._max_tokens = request.max_tokens
        await self._engine.open(self.key, request, self._events.put_nowait)
        if self._lateness is not None:
            return await self._run_taken_over(self._lateness)
        chain: list[tuple[int, Distribution]] = []
        while True:
            verdict = await self._verdict()
            accepted = [token for token, _ in chain[: verdict.num_accepted]]
            self.outcome.token_ids += accepted + list(verdict.token_ids)
            if verdict.finish_reason is not None:
                self.outcome.finish_reason = verdict.finish_reason
                return self.outcome
            forced: tuple[int, ...] = ()
            if verdict.rejection is not None:
                law = chain[verdict.num_accepted][1] if chain else None
                forced = (await self._recover(verdict.rejection, law),)
                self.outcome.token_ids += forced
            chain = await self._send_round(forced)

    async def _run_taken_over(self, lateness: Lateness) -> Outcome:
        chain: list[tuple[int, Distribution]] = []  # not judged yet, nor known to be late
        while True:
            verdict = await self._verdict()
            assert verdict.position == len(self._context)
            known = [token for token, _ in chain]
            committed = known[: verdict.num_accepted] + list(verdict.token_ids)
            self.outcome.token_ids += committed
            if verdict.finish_reason is not None:
                self.outcome.finish_reason = verdict.finish_reason
                return self.outcome
            forced: tuple[int, ...] = ()
            if verdict.rejection is not None:
                law = chain[verdict.num_accepted][1]
                forced = (await self._recover(verdict.rejection, law),)
                self.outcome.token_ids += forced
            elif known[: len(committed)] == committed[: len(known)]:
                del chain[: len(committed)]
                if chain:
                    continue  # the rest may still serve
            chain = [] if forced else self._draft()
            late_s = lateness([token for token, _ in chain]) if chain else None
            if late_s is None and not forced:
                chain = []
                continue
            self._epoch += 1
            await self._stop_sending()
            frame = self._frame(self._epoch, len(self._context) - len(forced), forced, chain)
            self._sending = asyncio.create_task(self._send_late(frame, late_s or 0.0))

    async def _send_late(self, frame: Draft, late_s: float) -> None:
        await asyncio.sleep(late_s)
        await self._deliver(frame)

    async def _stop_sending(self) -> None:
        """What was on its way is of an epoch that is over."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    async def _verdict(self) -> Verdict:
        while True:
            event = await asyncio.wait_for(self._events.get(), 60)
            if isinstance(event, PicoSpecError):
                raise event
            if isinstance(event, Prefilled):
                continue
            self.outcome.verdicts.append(event)
            return event

    async def _recover(self, rejection: Rejection, law: Distribution | None) -> int:
        position = len(self._context)
        sampler = RejectionSampler(self._sampling.seed, position, draft_law=law)
        for attempt in itertools.count():
            token = sampler.offer(rejection, attempt)
            if token is not None:
                return token
            self._epoch += 1
            await self._deliver(Draft(self._epoch, position, probe=attempt + 2, end_of_round=True))
            verdict = await self._verdict()
            assert verdict.rejection is not None
            rejection = verdict.rejection
        raise AssertionError

    def _draft(self) -> list[tuple[int, Distribution]]:
        context = self._context
        length = self._draft_length if isinstance(self._draft_length, int) else self._draft_length()
        chain: list[tuple[int, Distribution]] = []
        for _ in range(min(length, self._max_tokens - len(self.outcome.token_ids))):
            law = self._draft_law(context)
            if law is None:
                break
            split = self._mode is VerificationMode.SPLIT
            purpose = Purpose.DRAFT if split else Purpose.COUPLED
            token = draw(law, self._sampling.seed, len(context), purpose)
            chain.append((token, law))
            context = [*context, token]
        return chain

    def _frame(
        self,
        epoch: int,
        base: int,
        forced: tuple[int, ...],
        chain: Sequence[tuple[int, Distribution]],
    ) -> Draft:
        split = self._mode is VerificationMode.SPLIT
        return Draft(
            epoch,
            base,
            token_ids=forced + tuple(token for token, _ in chain),
            draft_probs=tuple(law.prob(token) for token, law in chain) if split else (),
            num_forced=len(forced),
            end_of_round=True,
            probe=0 if chain or forced else 1,
        )

    async def _send_round(self, forced: tuple[int, ...]) -> list[tuple[int, Distribution]]:
        chain = self._draft()
        self._epoch += 1
        base = len(self._context) - len(forced)
        await self._deliver(self._frame(self._epoch, base, forced, chain))
        if forced and not chain:
            # The recovered token alone is not judged: ask for the next position.
            self._epoch += 1
            await self._deliver(Draft(self._epoch, len(self._context), probe=1))
        return chain

    async def _deliver(self, draft: Draft) -> None:
        await self._engine.deliver(self.key, draft, time.monotonic())
