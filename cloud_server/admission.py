"""Admission: how many generations may run at once, and when no new one may start.

A call counts against the limit until it is over and the engine has let go of its session.
"""

import asyncio
import itertools
from time import monotonic

from cloud_server.calls import Call, SilenceTimer
from picospec.errors import CapacityError, CloudUnavailable, PicoSpecError


class AdmittedCalls:
    """All running calls of one server."""

    def __init__(self, max_calls: int, outbound_frames_max: int, idle_timeout_s: float) -> None:
        self._max_calls = max_calls
        self._outbound_frames_max = outbound_frames_max
        self._idle_timeout_s = idle_timeout_s
        self._calls: dict[Call, SilenceTimer] = {}
        self._numbers = itertools.count(1)
        self._empty = asyncio.Event()
        self._empty.set()
        self._refusal = ""

    def __len__(self) -> int:
        return len(self._calls)

    def refuse(self, reason: str) -> None:
        """Admit no call from now on."""
        self._refusal = reason

    def check_open(self) -> None:
        """Raises CloudUnavailable if no calls are admitted any more."""
        if self._refusal:
            raise CloudUnavailable(self._refusal)

    def admit(self) -> Call:
        """A new call, to be given back with `release`.

        Raises CapacityError when there are `max_calls`, CloudUnavailable after `refuse`.
        """
        self.check_open()
        if len(self._calls) >= self._max_calls:
            raise CapacityError(f"All {self._max_calls} sessions are taken")
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
        if not self._calls:
            self._empty.set()

    def end_all(self, outcome: str, error: PicoSpecError) -> None:
        for call in self._calls:
            call.end(outcome, error)

    async def drained(self) -> None:
        """Wait until no call is left."""
        await self._empty.wait()
