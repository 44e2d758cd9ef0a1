"""Admission: how many generations may run at once, and when no new one may start.

A call counts against the limit from its beginning until the engine has let go of its session. How
much of the KV cache it needs is known from its Open only: kv_room.py.
"""

import asyncio
import itertools
from time import monotonic

from cloud_server.calls import Call, SilenceTimer
from cloud_server.config import ServerConfig
from cloud_server.engine.interface import KVCacheSize
from cloud_server.kv_room import RETRY_AFTER_MIN_S, KVRoom, NoRoom, Refusal
from picospec.errors import CloudUnavailable, PicoSpecError


class AdmittedCalls:
    """All running calls of one server, and the KV cache that they have reserved."""

    def __init__(self, config: ServerConfig, kv_cache_size: KVCacheSize) -> None:
        self._max_calls = config.max_sessions
        self._outbound_frames_max = config.outbound_frames_max
        self._idle_timeout_s = config.session_idle_timeout_s
        self.room = KVRoom(kv_cache_size, config)
        self._calls: dict[Call, SilenceTimer] = {}
        self._numbers = itertools.count(1)
        self._empty = asyncio.Event()
        self._empty.set()
        self._refusal = ""

    def __len__(self) -> int:
        return len(self._calls)

    def refuse(self, reason: str) -> None:
        """Admit no call from now on, nor any that waits for room."""
        self._refusal = reason
        self.room.refuse(reason)

    def check_open(self) -> None:
        """Raises CloudUnavailable if no calls are admitted any more."""
        if self._refusal:
            raise CloudUnavailable(self._refusal)

    def admit(self) -> Call:
        """A new call, to be given back with `release`.

        Raises NoRoom when there are `max_calls`, CloudUnavailable after `refuse`.
        """
        self.check_open()
        if len(self._calls) >= self._max_calls:
            raise NoRoom(
                f"All {self._max_calls} sessions are taken", Refusal.SESSIONS, RETRY_AFTER_MIN_S
            )
        now = monotonic()
        call = Call(
            key=f"s{next(self._numbers)}",
            outbound=asyncio.Queue(self._outbound_frames_max),
            ended=asyncio.get_running_loop().create_future(),
            started_s=now,
            heard_s=now,
        )
        self._calls[call] = SilenceTimer(call, self._idle_timeout_s)
        self._empty.clear()
        return call

    def release(self, call: Call) -> None:
        self._calls.pop(call).cancel()
        self.room.release(call.key)
        if not self._calls:
            self._empty.set()

    def end_all(self, outcome: str, error: PicoSpecError) -> None:
        for call in self._calls:
            call.end(outcome, error)

    async def drained(self) -> None:
        """Wait until no call is left."""
        await self._empty.wait()
