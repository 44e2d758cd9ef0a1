"""Drafts on their way to the engine: those that come during a step go in one message.

A message costs the engine several times what a draft in it does, and wakes it on the cores that
compute its step. It looks at drafts when a step begins, so they reach it shortly before that.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from cloud_server.engine.envelope import Delivery

MARGIN = 0.1  # of a step, before it is expected to end


class Deliveries:
    """All methods are called on one event loop."""

    def __init__(self, send: Callable[[list[Delivery]], Awaitable[None]]) -> None:
        """`send` sends one message; it handles its own errors."""
        self._send = send
        self._waiting: list[Delivery] = []
        self._due_s = 0.0  # time.monotonic
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None

    def add(self, delivery: Delivery) -> None:
        """In time for the step that comes."""
        self._waiting.append(delivery)
        if self._timer is None:
            self._plan()

    def step_ends(self, at_s: float) -> None:
        """A step is expected to end at `at_s` (time.monotonic); 0: none is under way."""
        self._due_s = at_s - MARGIN * max(0.0, at_s - time.monotonic())
        self._plan()

    def close(self) -> None:
        """What waits is lost."""
        self._waiting.clear()
        self._plan()

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        delay_s = self._due_s - time.monotonic()
        if delay_s > 0.0:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._start)
        else:
            self._start()

    def _start(self) -> None:
        self._timer = None
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all(), name="deliveries")

    async def _send_all(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            await self._send(waiting)
