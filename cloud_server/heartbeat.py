"""Whether the engine still finishes its steps: asked now and then, and timed."""

import asyncio
from time import monotonic

from cloud_server.engine.interface import VerificationEngine
from picospec.errors import CloudUnavailable

INTERVAL_S = 5.0  # each question wakes an engine that sleeps


class Heartbeat:
    """Asks the engine, which answers between two steps."""

    def __init__(self, engine: VerificationEngine, step_timeout_s: float) -> None:
        """`step_timeout_s`: an engine that takes longer to answer hangs."""
        self._engine = engine
        self._step_timeout_s = step_timeout_s
        self._asked_s: float | None = None  # the question that waits for its answer

    async def run(self) -> None:
        """Until cancelled, or until the engine is dead."""
        while True:
            self._asked_s = monotonic()
            try:
                await self._engine.ping()
            except CloudUnavailable:
                return
            self._asked_s = None
            await asyncio.sleep(INTERVAL_S)

    @property
    def problem(self) -> str:
        """Why the engine counts as hung; "" while it does not."""
        if self._asked_s is None:
            return ""
        waited_s = monotonic() - self._asked_s
        if waited_s < self._step_timeout_s:
            return ""
        return f"the engine has finished no step for {waited_s:.0f} s"
