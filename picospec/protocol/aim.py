"""When the edge's drafts go out: a frame should land where and when the cloud can use it.

A verdict is half a round trip old when the edge reads it, and a frame needs the other half. By then
a cloud that decodes alone is some tokens further: drafts that land behind it serve only as the
beginning of a chain, and wait for those that do not. In a batch the cloud looks at drafts when a
step begins: those that come during one wait at the edge for each other, until the last moment. A
frame costs the cloud 0.2 ms, however short it is.
"""

import math
from dataclasses import dataclass

from picospec.protocol.draft_chain import DraftChain


@dataclass(frozen=True, slots=True)
class Aim:
    """As it comes, drafts go out at once.

    >>> chain = DraftChain(position=5, split=False, draft_length=16, fast_verify=True)
    >>> chain.extend((1, 2, 3))
    >>> Aim(lead=3).is_reached(chain), Aim(lead=2).is_reached(chain)
    (False, True)
    >>> aim = Aim(period_s=0.040, offset_s=0.015)
    >>> [round(aim.departs_s(1.0, now), 3) for now in (1.010, 1.020, 1.060)]
    [1.015, 1.055, 1.095]
    """

    lead: int = 0  # tokens that the cloud makes by itself until a frame lands
    period_s: float = 0.0  # of the cloud's steps; 0: it looks at drafts whenever they come
    offset_s: float = 0.0  # after a verdict a frame still gets into the step that follows

    def is_reached(self, chain: DraftChain) -> bool:
        """Whether the end of `chain` lands ahead of the cloud."""
        return chain.end - chain.position > self.lead

    def departs_s(self, heard_s: float | None, now: float) -> float:
        """When drafts that are there `now` go out; the last verdict came at `heard_s`."""
        if not self.period_s:
            return now
        if heard_s is None:  # the cloud reads the prompt
            return now + self.period_s
        missed = math.ceil((now - heard_s - self.offset_s) / self.period_s)
        return heard_s + self.offset_s + max(0, missed) * self.period_s


AT_ONCE = Aim()
