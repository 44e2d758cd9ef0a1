"""A verification engine without a model: the double of `client.VLLMEngine`.

The target is a function from the tokens so far to the next one, so it is greedy: P is one-hot.
Everything else is as in the real engine: both modes, probes, recovery, assist, stop tokens,
limits, and the same `DraftQueue`. Tests add latency (`step_s`) and faults (`die`, `fail`, `mute`).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cloud_server.engine.interface import EngineSink, EngineStats, KVCacheSize, Prefilled
from picospec.errors import CloudUnavailable, PicoSpecError
from picospec.protocol.draft_queue import DraftQueue, Work
from picospec.protocol.messages import (
    AssistPolicy,
    Draft,
    FinishReason,
    Limits,
    ModelCard,
    Open,
    Rejection,
    Verdict,
    VerificationMode,
)

Target = Callable[[Sequence[int]], int]  # tokens so far -> the next token

SCRIPTED_CARD = ModelCard(
    model_id="scripted",
    logits_width=64,
    tokenizer_fingerprint="0" * 64,
    chat_template_fingerprint="",
    eos_token_ids=(0,),
    max_model_len=512,
    modes=(VerificationMode.SPLIT, VerificationMode.COUPLED),
    limits=Limits(),
    protocol_version=1,
)


def toy_target(token_ids: Sequence[int]) -> int:
    """Some next token in 1 .. 63 that depends on the last two and on the position.

    >>> toy_target([5, 9])
    47
    """
    before = token_ids[-2] if len(token_ids) > 1 else 0
    return 1 + (3 * token_ids[-1] + before + 7 * len(token_ids)) % 63


class ScriptedEngine:
    """`VerificationEngine` over a `Target`.

    `opened`, `delivered` and `aborted` record what it was asked, by session key.
    """

    def __init__(
        self,
        target: Target = toy_target,
        *,
        card: ModelCard = SCRIPTED_CARD,
        step_s: float = 0.0,
        kv_tokens: int = 1 << 20,
    ) -> None:
        self.target = target
        self.card = card
        self.step_s = step_s  # from a delivery to its verdict
        self.kv_cache_size = KVCacheSize(kv_tokens)
        self.start_error: PicoSpecError | None = None
        self.open_error: PicoSpecError | None = None
        self.mute = False  # keep every event back
        self.hung = False  # leave pings without an answer
        self.opened: list[tuple[str, Open]] = []
        self.delivered: list[tuple[str, Draft]] = []
        self.aborted: list[str] = []
        self._sequences: dict[str, _Sequence] = {}
        self._alive = False

    async def start(self) -> ModelCard:
        if self.start_error is not None:
            raise self.start_error
        self._alive = True
        return self.card

    async def open(self, session_key: str, request: Open, sink: EngineSink) -> None:
        self._check_alive()
        if self.open_error is not None:
            raise self.open_error
        self.opened.append((session_key, request))
        self._sequences[session_key] = _Sequence(self, session_key, request, sink)

    async def deliver(self, session_key: str, draft: Draft, arrived_s: float) -> None:
        self._check_alive()
        self.delivered.append((session_key, draft))
        if (sequence := self._sequences.get(session_key)) is not None:
            sequence.add(draft)

    async def abort(self, session_key: str) -> None:
        self.aborted.append(session_key)
        if (sequence := self._sequences.pop(session_key, None)) is not None:
            sequence.close()

    async def ping(self) -> None:
        self._check_alive()
        if self.hung:
            await asyncio.Event().wait()

    def stats(self) -> EngineStats:
        waiting = sum(not sequence.busy for sequence in self._sequences.values())
        return EngineStats(
            running_sessions=len(self._sequences) - waiting,
            held_sessions=waiting,
            stale_tokens=sum(s.queue.stale_tokens for s in self._sequences.values()),
        )

    @property
    def healthy(self) -> bool:
        return self._alive

    async def shutdown(self) -> None:
        self._alive = False
        for session_key in list(self._sequences):
            self.forget(session_key)

    def die(self) -> None:
        """As when the engine's process is gone."""
        self._alive = False
        self.fail(CloudUnavailable("the engine died"))

    def fail(self, error: PicoSpecError) -> None:
        """End every session with `error`."""
        for session_key in list(self._sequences):
            sink = self._sequences[session_key].sink
            self.forget(session_key)
            sink(error)

    def forget(self, session_key: str) -> None:
        self._sequences.pop(session_key).close()

    @property
    def sessions(self) -> int:
        return len(self._sequences)

    def _check_alive(self) -> None:
        if not self._alive:
            raise CloudUnavailable("the engine is not running")


@dataclass(slots=True)
class _Sequence:
    """One session in the engine."""

    engine: ScriptedEngine
    key: str
    request: Open
    sink: EngineSink
    committed: list[int] = field(init=False)  # prompt and output, index = position
    queue: DraftQueue = field(init=False)
    limit: int = field(init=False)  # where the output must end
    first: bool = True
    timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        request = self.request
        self.committed = [*request.prompt_token_ids.tolist(), *request.output_token_ids.tolist()]
        self.queue = DraftQueue(
            request.mode, self.committed, verify_whole_rounds=request.verify_whole_rounds
        )
        self.limit = len(request.prompt_token_ids) + request.max_tokens
        self._schedule()

    @property
    def busy(self) -> bool:
        return self.timer is not None

    def add(self, draft: Draft) -> None:
        position = len(self.committed)
        recovered = self.queue.add(draft, asyncio.get_running_loop().time())
        if recovered is not None:
            self.committed.append(recovered)
            if (reason := self._finish_reason()) is not None:
                self._emit(Verdict(draft.epoch, position + 1, finish_reason=reason))
                return
        self._schedule()

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    @property
    def _goes_on_alone(self) -> bool:
        return self.request.assist is not AssistPolicy.NEVER and not self.queue.is_edges_turn

    def _schedule(self) -> None:
        if not self.busy and (self.first or self.queue.has_work or self._goes_on_alone):
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(self.engine.step_s, self._step)

    def _step(self) -> None:
        self.timer = None
        if self.first:
            self.first = False
            verdict = self._prefill()
        else:
            work = self.queue.take(self.engine.card.limits.max_draft_tokens)
            alone = Work(self.queue.epoch, len(self.committed))
            verdict = self._judge(work) if work is not None else self._commit(alone, 0, own=1)
        self._emit(verdict)
        if verdict.finish_reason is None:
            self._schedule()

    def _prefill(self) -> Verdict:
        position = len(self.committed)
        self._emit(Prefilled(first_position=position))
        if self.request.probe:
            self.queue.judged(rejected=True)
            return Verdict(0, position, rejection=self._rejection(), num_forwards=1)
        return self._commit(Work(0, position), 0, own=1)

    def _judge(self, work: Work) -> Verdict:
        """Accept drafts while they are what the target says, then go on as the mode wants."""
        num_accepted = 0
        for num_accepted, token_id in enumerate((*work.token_ids, -1)):
            if token_id != self.engine.target([*self.committed, *work.token_ids[:num_accepted]]):
                break
        if self.request.mode is VerificationMode.COUPLED:
            return self._commit(work, num_accepted, own=1)
        verdict = self._commit(work, num_accepted, own=0)
        judged_all = bool(work.token_ids) and num_accepted == len(work.token_ids)
        if verdict.finish_reason is not None or judged_all:
            self.queue.judged()
            return verdict
        self.queue.judged(rejected=True)
        return Verdict(
            verdict.epoch, verdict.position, num_accepted, rejection=self._rejection(),
            num_draft_tokens=verdict.num_draft_tokens, num_forwards=1,
        )  # fmt: skip

    def _commit(self, work: Work, num_accepted: int, *, own: int) -> Verdict:
        """Commit accepted drafts and `own` tokens of the target, up to the end of the output."""
        reason = None
        num_own = 0
        accepted = 0
        while reason is None and accepted + num_own < num_accepted + own:
            self.committed.append(self.engine.target(self.committed))
            if accepted < num_accepted:
                accepted += 1
            else:
                num_own += 1
            reason = self._finish_reason()
        if own:
            self.queue.judged()
        return Verdict(
            work.epoch, work.position, accepted, tuple(self.committed[work.position + accepted :]),
            finish_reason=reason, num_draft_tokens=len(work.token_ids), num_forwards=1,
        )  # fmt: skip

    def _finish_reason(self) -> FinishReason | None:
        if self.committed[-1] in self.request.stop_token_ids:
            return FinishReason.STOP
        full = len(self.committed) >= min(self.limit, self.engine.card.max_model_len)
        return FinishReason.LENGTH if full else None

    def _rejection(self) -> Rejection:
        token_id = self.engine.target(self.committed)
        return Rejection(np.array([token_id], np.int32), np.ones(1, np.float32))

    def _emit(self, event: Prefilled | Verdict) -> None:
        if isinstance(event, Verdict) and event.finish_reason is not None:
            self.engine.forget(self.key)
        if not self.engine.mute:
            self.sink(event)
