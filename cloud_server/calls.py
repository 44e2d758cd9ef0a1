"""One `Generate` call: its outbound frames, and how it ends.

Rules:
- A call ends once, by the first of: the cloud's last verdict, the edge's Finish, an error of
  either side, silence, a slow reader, cancellation, shutdown. `Call.end` is the only way.
- Nothing here waits for a peer: the engine's events go into a bounded queue, and a call whose
  queue is full ends instead of growing.

How many calls there may be: admission.py.
"""

import asyncio
from dataclasses import dataclass
from time import monotonic

from cloud_server.engine.interface import EngineEvent, Prefilled
from picospec.errors import CapacityError, DeadlineExceeded, PicoSpecError
from picospec.protocol.messages import Verdict


@dataclass(slots=True, eq=False)
class Call:
    """One generation: its outbound frames, its end and what the log tells about it."""

    key: str  # the engine's session_key: unique for its lifetime
    outbound: asyncio.Queue[Prefilled | Verdict]
    ended: asyncio.Future[PicoSpecError | None]  # None: ended well
    started_s: float  # time.monotonic; uvloop's own clock counts whole milliseconds
    heard_s: float  # when a frame last came from or went to the edge
    prefilling: bool = False  # the engine has the Open and has not answered: not the edge's turn
    outcome: str = ""
    request_id: str = ""
    first_position: int = 0
    end_position: int = 0  # of what the verdicts sent so far commit
    num_verdicts: int = 0
    verdict_s: float = 0.0  # when the last one was sent

    def end(self, outcome: str, error: PicoSpecError | None = None) -> None:
        """The first call decides; later ones change nothing."""
        if self.ended.done():
            return
        if error is not None:
            # Its frames refer to this session: a cycle that would keep the call alive.
            error.__traceback__ = error.__context__ = None
        self.outcome = outcome
        self.ended.set_result(error)

    def offer(self, event: EngineEvent) -> None:
        """The engine's sink. Never blocks, never raises."""
        if self.ended.done():
            return
        if isinstance(event, PicoSpecError):
            self.end("engine_error", event)
            return
        try:
            self.outbound.put_nowait(event)
        except asyncio.QueueFull:
            self.end(
                "slow_reader",
                CapacityError(
                    f"The edge left {self.outbound.maxsize} frames unread; the session ends"
                ),
            )


class SilenceTimer:
    """Ends a call of which nothing was heard for `timeout_s`.

    It is set once. When it is due it compares the time of the last frame with the timeout and, if
    needed, waits for the rest; so a frame costs only one store.
    """

    def __init__(self, call: Call, timeout_s: float) -> None:
        self._call = call
        self._timeout_s = timeout_s
        self._look_in(timeout_s)

    def _look(self) -> None:
        call = self._call
        quiet_s = 0.0 if call.prefilling else monotonic() - call.heard_s
        if quiet_s < self._timeout_s:
            self._look_in(self._timeout_s - quiet_s)
            return
        call.end(
            "idle", DeadlineExceeded(f"Nothing was heard from the edge for {self._timeout_s:g} s")
        )

    def _look_in(self, delay_s: float) -> None:
        self._handle = asyncio.get_running_loop().call_later(delay_s, self._look)

    def cancel(self) -> None:
        self._handle.cancel()
