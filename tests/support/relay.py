"""A WAN relay in a thread of its own, for tests that are not on an event loop."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self

from bench.wan import LineConditions, WanRelay

HOST = "127.0.0.1"
CALL_TIMEOUT_S = 10.0


class Relay:
    """Passes bytes between whoever connects to `port` and `target_port`.

    `cut` breaks every connection, bytes under way included, and has new ones refused until `mend`.
    """

    def __init__(self, target_port: int) -> None:
        self._relay = WanRelay(HOST, target_port, LineConditions(), LineConditions())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait_for(self._relay.__aenter__())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._wait_for(self._relay.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()

    @property
    def port(self) -> int:
        return self._relay.port

    def cut(self) -> None:
        self._call(lambda: self._relay.cut(math.inf))

    def mend(self) -> None:
        self._call(self._relay.restore)

    def _call(self, method: Callable[[], None]) -> None:
        async def call() -> None:
            method()

        self._wait_for(call())

    def _wait_for(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)
