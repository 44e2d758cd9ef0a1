"""How far the drafter may go ahead of what is committed, and whether it has stopped before that."""

from picospec.protocol.draft_chain import DraftChain
from picospec.protocol.drafting import Allow
from picospec.protocol.session_spec import SessionSpec


class Allowance:
    """The drafter's limit: the window, the end of the answer or, without parallel drafting, the
    end of the round. Only a window of 0, which stops the drafter, takes a limit back."""

    def __init__(self, spec: SessionSpec) -> None:
        self._ceiling = self._window_max = spec.card.limits.max_window
        self.window = min(spec.policy.window, self._window_max)  # most unverified tokens
        self.limit = 0  # told to the drafter
        self.highest = 0  # limit ever told: what it may have drafted under way
        self.is_exhausted = False  # the drafter has nothing to propose after the chain
        self.is_paused = False  # the drafter waits for a verdict on the chain
        self._length_max = spec.length_max
        self._parallel = spec.policy.parallel_draft
        self._round_limit = 0  # not parallel: where the current round ends

    def set_window(self, window: int) -> None:
        self.window = min(window, self._window_max)

    def cap(self, window_max: int) -> None:
        """The cloud takes no more than `window_max` unverified tokens."""
        self._window_max = min(self._window_max, window_max)
        self.set_window(self.window)

    def extend(self, chain: DraftChain) -> list[Allow]:
        """What the drafter is to be told, if anything."""
        if self.is_exhausted:
            return []  # more room changes nothing; the next branch gets it
        if not self.window:
            if self.limit <= chain.position:
                return []
            self.limit = chain.position
            return [Allow(self.limit)]
        limit = chain.position + self.window
        if not self._parallel:
            if not len(chain) and chain.position >= self._round_limit:
                self._round_limit = chain.position + min(chain.draft_length, self.window)
            limit = self._round_limit
        limit = min(limit, self._length_max)
        if limit <= self.limit:
            return []
        self.limit = limit
        self.highest = max(self.highest, limit)
        return [Allow(limit)]

    def unpause(self, chain: DraftChain) -> None:
        """Have `extend` tell the drafter to go on, even if its limit stays."""
        self.is_paused = False
        self.limit = min(self.limit, chain.end)

    def branch_off(self) -> None:
        """The drafter starts anew from what is committed."""
        self.is_exhausted = self.is_paused = False
        self._round_limit = 0

    def is_used_up(self, chain: DraftChain) -> bool:
        """Whether the drafter can add nothing to `chain` before something is judged."""
        blocked = chain.end >= self.limit and not chain.in_flight
        stopped = self.is_exhausted or self.is_paused
        return stopped or blocked or chain.end >= self._length_max

    def rules(self, chain: DraftChain) -> dict[str, bool]:
        """What must hold between two events, and whether it does."""
        return {
            "no draft is beyond the limit": not len(chain) or chain.end <= self.highest,
            "the limit is within the answer": self.highest <= self._length_max,
            "the limit is within the cloud's window": self.limit <= chain.position + self._ceiling,
            "the window is within the cloud's": self.window <= self._window_max,
            "a pause is behind a draft": len(chain) > 0 or not self.is_paused,
        }
