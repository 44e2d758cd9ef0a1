"""Room in the KV cache: who is let in, who waits, who is refused.

Rules:
- A generation reserves its prompt and a share of its output before the engine hears of it, and
  gives the reservation back when it ends. What the rest of its output takes is not reserved: the
  engine evicts held sessions for it.
- While there is no room, generations wait in the order in which they came; a small one does not
  overtake. The queue and the wait are bounded.

Pure asyncio: the clock is passed in.
"""

import asyncio
import enum
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from cloud_server.config import ServerConfig
from cloud_server.engine.interface import KVCacheSize
from picospec.errors import CapacityError, CloudUnavailable, RemoteProtocolError
from picospec.protocol.messages import Open

RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S = 1.0, 60.0
_HOLD_WEIGHT = 0.2  # of the newest reservation in the mean time that one is held


class Refusal(enum.Enum):
    """Why there was no room."""

    SESSIONS = "sessions"  # server.max_sessions are taken
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"


class NoRoom(CapacityError):
    """A generation was refused before any work was done for it."""

    def __init__(self, message: str, reason: Refusal, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.reason = reason


@dataclass(slots=True)
class _Waiter:
    key: str
    num_tokens: int
    called: asyncio.Event = field(default_factory=asyncio.Event)  # it has room, or is refused


@dataclass(frozen=True, slots=True)
class _Reservation:
    num_tokens: int
    since_s: float


class KVRoom:
    """Reservations of KV cache, in tokens, by the generation's key."""

    def __init__(
        self, size: KVCacheSize, config: ServerConfig, now: Callable[[], float] = monotonic
    ) -> None:
        self._size = size
        self._output_share = config.output_share
        self._output_reserve_max = config.output_reserve_max
        self._queue_max = config.queue_max
        self._queue_timeout_s = config.queue_timeout_s
        self._now = now
        self._reservations: dict[str, _Reservation] = {}
        self._waiting: deque[_Waiter] = deque()
        self._hold_s = 0.0  # how long a reservation is held, a moving mean
        self._refusal = ""
        self.reserved_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._size.num_tokens

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def needed(self, request: Open) -> int:
        """Tokens to reserve for `request`: whole blocks, since others cannot use their rest.

        Raises RemoteProtocolError if the whole generation would not fit into an empty cache.
        """
        num_prompt, num_output = len(request.prompt_token_ids), len(request.output_token_ids)
        if self._size.whole_blocks(num_prompt + request.max_tokens) > self._size.num_tokens:
            raise RemoteProtocolError(
                f"{num_prompt} prompt tokens and {request.max_tokens} output tokens are more than "
                f"the KV cache holds ({self._size.num_tokens})",
                "open.max_tokens",
            )
        share = math.ceil(self._output_share * (request.max_tokens - num_output))
        return self._size.whole_blocks(
            num_prompt + num_output + min(share, self._output_reserve_max)
        )

    async def reserve(self, key: str, num_tokens: int) -> None:
        """Reserve `num_tokens`, at most all there are, when they are free.

        To be given back with `release`, also when this is cancelled or fails.
        Raises NoRoom if too many wait or the wait is too long, CloudUnavailable after `refuse`.
        """
        if not self._waiting and self._fits(num_tokens):
            self._grant(key, num_tokens)
            return
        if len(self._waiting) >= self._queue_max:
            raise self._no_room(Refusal.QUEUE_FULL, f"{len(self._waiting)} generations wait")
        waiter = _Waiter(key, num_tokens)
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await waiter.called.wait()
        except TimeoutError:
            if key not in self._reservations:  # it may have come with the deadline
                raise self._no_room(
                    Refusal.QUEUE_TIMEOUT, f"none within {self._queue_timeout_s:g} s"
                ) from None
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._admit()  # those behind it may be smaller
        if key not in self._reservations:
            raise CloudUnavailable(self._refusal)

    def release(self, key: str) -> None:
        """Give the reservation of `key` back; does nothing without one."""
        reservation = self._reservations.pop(key, None)
        if reservation is None:
            return
        self.reserved_tokens -= reservation.num_tokens
        held_s = self._now() - reservation.since_s
        weight = _HOLD_WEIGHT if self._hold_s else 1.0
        self._hold_s += weight * (held_s - self._hold_s)
        self._admit()

    def refuse(self, reason: str) -> None:
        """Send away whoever waits: nobody is let in any more."""
        self._refusal = reason
        waiting, self._waiting = self._waiting, deque()
        for waiter in waiting:
            waiter.called.set()

    def _fits(self, num_tokens: int) -> bool:
        return self.reserved_tokens + num_tokens <= self._size.num_tokens

    def _grant(self, key: str, num_tokens: int) -> None:
        self._reservations[key] = _Reservation(num_tokens, self._now())
        self.reserved_tokens += num_tokens

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0].num_tokens):
            waiter = self._waiting.popleft()
            self._grant(waiter.key, waiter.num_tokens)
            waiter.called.set()

    def _no_room(self, reason: Refusal, detail: str) -> NoRoom:
        return NoRoom(
            f"The KV cache has no room for another generation: {detail}",
            reason,
            self._retry_after_s(),
        )

    def _retry_after_s(self) -> float:
        """When those that wait now should be in: they follow the reservations that end."""
        between_ends_s = self._hold_s / max(1, len(self._reservations))
        wait_s = between_ends_s * (len(self._waiting) + 1)
        return min(max(wait_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
