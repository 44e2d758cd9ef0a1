"""When the edge's drafts are due: a frame should land where the cloud can use it.

A verdict is half a round trip old when the edge reads it, and a frame needs the other half. By then
a cloud that decodes alone is some tokens further. Drafts that would land behind it serve only as
the beginning of a chain, and drafts far ahead of it are not needed yet. Both wait, so that one
frame carries them: a frame costs the cloud a good part of a millisecond, however short it is.
"""

import sys
from dataclasses import dataclass

from picospec.protocol.draft_chain import DraftChain


@dataclass(frozen=True, slots=True)
class Aim:
    """In tokens from the first uncommitted position on. As it comes, all is due at once.

    >>> chain = DraftChain(position=5, split=False, draft_length=16, fast_verify=True)
    >>> chain.extend((1, 2, 3))
    >>> Aim(lead=3).is_due(chain), Aim(lead=2).is_due(chain)
    (False, True)
    >>> frames = chain.frames(16, round_is_over=False, now=0.0)
    >>> chain.extend((4,))
    >>> Aim(reach=3, bundle=2).is_due(chain), Aim(reach=4, bundle=2).is_due(chain)
    (False, True)
    """

    lead: int = 0  # so far the cloud is by itself when a frame lands
    reach: int = sys.maxsize  # what has been sent up to there keeps it busy when the next one lands
    bundle: int = 1  # drafts in a frame beyond that

    def is_due(self, chain: DraftChain) -> bool:
        """Whether the unsent drafts of `chain` are to be sent, though more may follow soon."""
        if chain.end - chain.position <= self.lead:
            return False
        return chain.in_flight < self.reach or chain.unsent >= self.bundle


AT_ONCE = Aim()
