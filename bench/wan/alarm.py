"""A timer for asyncio that rings within 0.1 ms or so, and never early.

asyncio's own timers will not do here: epoll takes whole milliseconds, so `call_at` comes up to
1 ms late, and uvloop's timers round as well. The kernel's timerfd keeps nanoseconds and is a
file that any event loop can watch. Linux only; Python has it itself from 3.13 on.
"""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from typing import ClassVar

CLOCK_MONOTONIC = 1  # that of time.monotonic
TFD_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_: ClassVar = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_: ClassVar = [("interval", _Timespec), ("first", _Timespec)]


class Alarm:
    """Calls `ring`, in the running loop, once `time.monotonic()` has reached what was set."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """Raises OSError where the kernel refuses."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        self._check(self._fd)
        self._ring = ring
        self._when_s: float | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._expired)

    def set(self, when_s: float | None) -> None:
        """Ring then, at once if that is over; None: not at all. Replaces what was set."""
        if when_s == self._when_s:
            return
        self._when_s = when_s
        nanoseconds = 0 if when_s is None else max(1, int(when_s * 1e9))  # 0 switches it off
        first = _Timespec(*divmod(nanoseconds, 10**9))
        spec = ctypes.byref(_Itimerspec(_Timespec(0, 0), first))
        self._check(self._libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, spec, None))

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _expired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew since
            return
        when_s, self._when_s = self._when_s, None
        if when_s is not None and when_s > time.monotonic():  # the float's rounding
            self.set(when_s)
            return
        self._ring()

    @staticmethod
    def _check(result: int) -> None:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
