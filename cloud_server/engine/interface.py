"""The seam between the gRPC process and the engine: what a verification engine is.

`client.VLLMEngine` is the real one; `scripted.ScriptedEngine` the double for unit tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from picospec.errors import PicoSpecError
from picospec.protocol.messages import Draft, ModelCard, Open, Verdict


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt is in the KV cache: a session's first event."""

    first_position: int  # of the output that the verdicts commit
    cached_prompt_tokens: int = 0


EngineEvent = Prefilled | Verdict | PicoSpecError  # an error ends the session
EngineSink = Callable[[EngineEvent], None]  # called on the event loop; must not block


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    """How much the KV cache holds, and in what pieces."""

    num_tokens: int
    block_size: int = 1  # tokens

    def whole_blocks(self, num_tokens: int) -> int:
        """What `num_tokens` take up.

        >>> KVCacheSize(num_tokens=320, block_size=32).whole_blocks(33)
        64
        """
        return -(-num_tokens // self.block_size) * self.block_size


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine, for metrics and health."""

    running_sessions: int = 0  # with drafts to verify or a prompt to prefill
    held_sessions: int = 0  # waiting for the edge
    waiting_sessions: int = 0  # not admitted yet
    kv_cache_usage: float = 0.0  # 0..1
    evicted_sessions: int = 0  # held sessions whose KV was given to others, total
    preempted_sessions: int = 0  # total
    stale_tokens: int = 0  # drafts dropped because their epoch was over, total
    forwarded_tokens: int = 0  # of prompts, drafts and padding, total
    steps: int = 0  # total, and what they took:
    step_s: float = 0.0  # from the start of scheduling to the verdicts
    forward_s: float = 0.0  # of that, the model with its logits
    sampling_s: float = 0.0  # of that, judging drafts and drawing tokens


class VerificationEngine(Protocol):
    """Verifies drafts for many sessions. All methods run on the gRPC process's event loop."""

    async def start(self) -> ModelCard:
        """Load the model; returns what is served. Raises PicoSpecError if it cannot."""

    @property
    def kv_cache_size(self) -> KVCacheSize:
        """Known once the engine has started."""

    async def open(self, session_key: str, request: Open, sink: EngineSink) -> None:
        """Admit a session; its events go to `sink`, in order, Prefilled first.

        `session_key` is unique for the engine's lifetime. Raises CloudUnavailable if the
        engine is dead.
        """

    async def deliver(self, session_key: str, draft: Draft, arrived_s: float) -> None:
        """Hand drafts to an open session, in order. Unknown (finished) sessions ignore them.

        `arrived_s` is when the frame reached the cloud (time.monotonic); Verdict.queue_us counts
        from it.
        """

    async def abort(self, session_key: str) -> None:
        """End a session and free its KV cache at once. Idempotent; no event follows."""

    async def ping(self) -> None:
        """Returns when the engine has answered, which it does between two steps.

        Raises CloudUnavailable if the engine is dead.
        """

    def stats(self) -> EngineStats: ...

    @property
    def healthy(self) -> bool: ...

    async def shutdown(self) -> None: ...
