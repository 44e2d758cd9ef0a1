"""The generations being served: how each ends, and how many there may be.

Rules:
- A session ends once, by the first of: the cloud's last verdict, the edge's Finish, an error of
  either side, silence, a slow reader, cancellation, shutdown. `Session.end` is the only way.
- Nothing here waits for a peer: the engine's events go into a bounded queue, and a session
  whose queue is full ends instead of growing.
- A session counts against the limit until its call is over and the engine has let go of it.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from time import monotonic

from cloud_server.engine.interface import EngineEvent
from picospec.errors import CapacityError, CloudUnavailable, DeadlineExceeded, PicoSpecError
from picospec.protocol.messages import Opened, Verdict


@dataclass(slots=True, eq=False)
class Session:
    """One generation: its outbound frames, its end and what is told about it in the log."""

    key: str  # unique for the engine's lifetime
    outbound: asyncio.Queue[Opened | Verdict]
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


class SessionTable:
    """All running sessions of one server."""

    def __init__(self, max_sessions: int, outbound_frames_max: int, idle_timeout_s: float) -> None:
        self._max_sessions = max_sessions
        self._outbound_frames_max = outbound_frames_max
        self._idle_timeout_s = idle_timeout_s
        self._sessions: dict[Session, _SilenceTimer] = {}
        self._numbers = itertools.count(1)
        self._empty = asyncio.Event()
        self._empty.set()
        self._refusal = ""

    def __len__(self) -> int:
        return len(self._sessions)

    def refuse(self, reason: str) -> None:
        """Admit no session from now on."""
        self._refusal = reason

    def check_open(self) -> None:
        """Raises CloudUnavailable if no sessions are admitted any more."""
        if self._refusal:
            raise CloudUnavailable(self._refusal)

    def admit(self) -> Session:
        """A new session, to be given back with `release`.

        Raises CapacityError when there are `max_sessions`, CloudUnavailable after `refuse`.
        """
        self.check_open()
        if len(self._sessions) >= self._max_sessions:
            raise CapacityError(f"All {self._max_sessions} sessions are taken")
        now = monotonic()
        session = Session(
            key=f"s{next(self._numbers)}",
            outbound=asyncio.Queue(self._outbound_frames_max),
            ended=asyncio.get_running_loop().create_future(),
            started_s=now,
            heard_s=now,
        )
        self._sessions[session] = _SilenceTimer(session, self._idle_timeout_s)
        self._empty.clear()
        return session

    def release(self, session: Session) -> None:
        self._sessions.pop(session).cancel()
        if not self._sessions:
            self._empty.set()

    def end_all(self, outcome: str, error: PicoSpecError) -> None:
        for session in self._sessions:
            session.end(outcome, error)

    async def drained(self) -> None:
        """Wait until no session is left."""
        await self._empty.wait()


class _SilenceTimer:
    """Ends a session of which nothing was heard for `timeout_s`.

    It is set once and looks, when it is due, whether there is time left, so that a frame costs
    no more than a store.
    """

    def __init__(self, session: Session, timeout_s: float) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._look_in(timeout_s)

    def _look(self) -> None:
        session = self._session
        quiet_s = 0.0 if session.prefilling else monotonic() - session.heard_s
        if quiet_s < self._timeout_s:
            self._look_in(self._timeout_s - quiet_s)
            return
        session.end(
            "idle",
            DeadlineExceeded(f"Nothing was heard from the edge for {self._timeout_s:g} s"),
        )

    def _look_in(self, delay_s: float) -> None:
        self._handle = asyncio.get_running_loop().call_later(delay_s, self._look)

    def cancel(self) -> None:
        self._handle.cancel()
