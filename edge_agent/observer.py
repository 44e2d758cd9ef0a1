"""What the pipeline reports while it runs, for metrics; called on the event loop, never blocks.

`metrics` implements it; `NullObserver` is the do-nothing variant.
"""

from typing import Any, Protocol

from picospec.protocol.messages import Verdict


class PipelineObserver(Protocol):
    """Counts and times of all generations."""

    def generation_started(self) -> None: ...

    def generation_finished(self, outcome: str) -> None:
        """`outcome` is "stop", "length", "cancelled" or the name of an error's class."""

    def round_trip(self, seconds: float) -> None:
        """Both ways on the network: what a verdict took beyond queueing and computing."""

    def verdict(self, verdict: Verdict) -> None: ...

    def rollback(self) -> None:
        """The chain was given up, partly or whole."""

    def stale(self, num_tokens: int) -> None:
        """Drafts that were sent and then given up before they were judged."""

    def drafted(self, num_tokens: int) -> None: ...

    def bytes_up(self, num_bytes: int) -> None:
        """gRPC message payloads."""

    def bytes_down(self, num_bytes: int) -> None: ...

    def resumed(self) -> None:
        """A lost session was taken up again."""

    def planned(self, draft_length: int, window: int) -> None:
        """A generation's course changed its lengths, in tokens."""


class NullObserver:
    """Observes nothing."""

    def _ignore(self, *args: Any, **kwargs: Any) -> None: ...

    generation_started = generation_finished = round_trip = verdict = rollback = stale = _ignore
    drafted = bytes_up = bytes_down = resumed = planned = _ignore
