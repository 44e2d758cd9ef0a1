"""The seam to who steers draft length and window: an edge drives it, and so does a simulation."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What the edge does next, in tokens."""

    draft_length: int  # a round, and most drafts that an engine step takes
    window: int  # most unverified tokens


class DraftLengthController(Protocol):
    """Steers one generation. Nothing here raises or blocks."""

    def drafted(self, num_tokens: int, seconds: float) -> None:
        """The drafter has computed `seconds` for `num_tokens`."""

    def judged(
        self,
        num_judged: int,
        num_accepted: int,
        num_forwards: int,
        queue_s: float,
        compute_s: float,
    ) -> None:
        """A verdict, the target's forwards since the last one, and how long it queued and computed
        in the cloud."""

    def round_trip(self, seconds: float) -> None:
        """Both ways on the network, without the cloud's queueing and computing."""

    def plan(self, now: float) -> DraftPlan:
        """To be asked after each verdict; `now` in seconds, never falling."""
