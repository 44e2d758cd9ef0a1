"""Which sessions have something to do: kept up to date, so that held ones cost no step anything.

The rule of this file: whoever changes a session's state calls `note`. That is where it is opened,
fed, judged by a row, stepped or evicted (scheduler.py). `check` says whether somebody forgot.
"""

from collections.abc import Iterable, Iterator

from cloud_server.engine.engine_session import EngineSession
from cloud_server.engine.takeover import Occasion

HELD = 1 << 62  # the number of a step that never comes


class ReadySessions:
    """Sessions in the order in which they became ready. A held session is in neither set."""

    def __init__(self) -> None:
        # Dictionaries, because a set has no order.
        self._working: dict[EngineSession, None] = {}  # their edge waits, or they are prefilled
        self._on_call: dict[EngineSession, None] = {}  # without work, but may be taken over

    def note(self, session: EngineSession) -> None:
        """`session` is new, or something about it has changed."""
        self._put(self._working, session, session.has_work)
        self._put(self._on_call, session, not session.has_work and session.may_be_taken_over)
        if session not in self._working and session not in self._on_call:
            session.request.next_decode_eligible_step = HELD  # until a step is composed with it

    def drop(self, session: EngineSession) -> None:
        """It has ended."""
        self._working.pop(session, None)
        self._on_call.pop(session, None)

    @property
    def working(self) -> list[EngineSession]:
        return list(self._working)

    @property
    def engine_idle(self) -> bool:
        """Whether no session's edge waits for a judgement or a prefill."""
        return not any(session.edge_waits for session in self._working)

    @property
    def on_call(self) -> list[EngineSession]:
        return list(self._on_call)

    def with_step(self, occasion: Occasion) -> Iterator[EngineSession]:
        """Those that the next step can bring forward."""
        yield from self._working
        for session in self._on_call:
            if session.takeover.is_due(occasion):
                yield session

    def has_step(self, session: EngineSession, occasion: Occasion) -> bool:
        return session in self._working or (
            session in self._on_call and session.takeover.is_due(occasion)
        )

    def resident(self) -> list[EngineSession]:
        """Those that hold KV cache, whether the next step brings them forward or not."""
        return [s for group in (self._working, self._on_call) for s in group if s.resident]

    def check(self, sessions: Iterable[EngineSession]) -> None:
        """Raises AssertionError if one of all `sessions` is not where it belongs."""
        remaining = {*self._working, *self._on_call}
        for session in sessions:
            name = session.request.request_id
            on_call = not session.has_work and session.may_be_taken_over
            assert (session in self._working) == session.has_work, name
            assert (session in self._on_call) == on_call, name
            remaining.discard(session)
        assert not remaining, [session.request.request_id for session in remaining]

    @staticmethod
    def _put(group: dict[EngineSession, None], session: EngineSession, belongs: bool) -> None:
        if belongs:
            group.setdefault(session)
        else:
            group.pop(session, None)
