"""The edge's drafts that wait for their verdict, and what of them went out on the stream.

The counterpart of `DraftQueue`. A `DraftChain` knows tokens, positions and epochs; what is due
and what a verdict means for it is the session's to say.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from picospec.errors import RemoteOrderError
from picospec.protocol.messages import Draft, Verdict
from picospec.sampling.distribution import Distribution


class _Unjudged(NamedTuple):
    token_id: int
    law: Distribution | None  # Q; split only


class DraftChain:
    """Unjudged drafts from `position`, the first uncommitted position, on.

    >>> chain = DraftChain(position=5, split=False, draft_length=2, fast_verify=True)
    >>> chain.extend((7, 8, 9))
    >>> [frame.token_ids for frame in chain.frames(2, round_is_over=False, now=0.0)]
    [(7, 8), (9,)]
    >>> chain.in_flight, chain.end
    (3, 8)
    >>> chain.commit(num_kept=1, num_own=1)  # 7 was accepted, then came another token than 8
    >>> chain.branch_off(judged_end=7)  # 9 was sent in vain
    1
    >>> chain.position, chain.end, chain.epoch
    (7, 7, 1)
    """

    def __init__(self, position: int, *, split: bool, draft_length: int, fast_verify: bool) -> None:
        """`draft_length`: drafts per round or, with `fast_verify`, most that a forward judges."""
        self.position = position
        self._split = split
        self._draft_length = draft_length
        self._fast_verify = fast_verify
        self._drafts: list[_Unjudged] = []
        self.waits_since_s: float | None = (
            None  # when the first unsent draft came, or the last left
        )
        self.new_stream()

    def new_stream(self) -> None:
        """Nothing was sent on the stream that comes."""
        self.epoch = 0
        self._epoch_used = False  # whether a frame of it was sent
        self._head: int | None = None  # recovered, at position - 1, not sent yet
        self._sent_end = 0
        self._sent_at: deque[tuple[int, float]] = deque()  # (end position, time) of each frame
        self._is_echoed = True  # a verdict has told that the cloud knows the epoch
        self._limit_untold = self._fast_verify  # the cloud does not know draft_length yet

    @property
    def draft_length(self) -> int:
        return self._draft_length

    @draft_length.setter
    def draft_length(self, draft_length: int) -> None:
        self._limit_untold |= self._fast_verify and draft_length != self._draft_length
        self._draft_length = draft_length

    def __len__(self) -> int:
        return len(self._drafts)

    @property
    def end(self) -> int:
        """The position after the last draft: the drafter's next."""
        return self.position + len(self._drafts)

    @property
    def in_flight(self) -> int:
        """Drafts that were sent."""
        return max(0, self._sent_end - self.position)

    @property
    def unsent(self) -> int:
        """Drafts that were not sent."""
        return self.end - max(self._sent_end, self.position)

    def lands_behind(self, lead: int) -> bool:
        """Whether a cloud that goes on for `lead` tokens is past all of it, and nothing in it has
        to go out for another reason: a recovered token, or a round that is full."""
        return self._fast_verify and self._head is None and len(self) <= lead

    def extend(self, token_ids: Sequence[int], laws: Sequence[Distribution] = ()) -> None:
        """`laws` has the Q of each in split mode. Raises ValueError if it has not."""
        kept = laws if self._split else (None,) * len(token_ids)
        self._drafts += itertools.starmap(_Unjudged, zip(token_ids, kept, strict=True))

    def law(self, index: int) -> Distribution | None:
        """What draft `index` was drawn from; None if there is no such draft."""
        return self._drafts[index].law if index < len(self._drafts) else None

    def check(self, verdict: Verdict) -> None:
        """Raises RemoteOrderError where `verdict` does not fit what was sent."""
        accepted = verdict.num_accepted
        if verdict.position != self.position:
            raise RemoteOrderError(
                f"A verdict for position {verdict.position} instead of {self.position}",
                "verdict.position",
            )
        if verdict.epoch > self.epoch:
            raise RemoteOrderError(f"Epoch {verdict.epoch} was never sent", "verdict.epoch")
        if accepted and (accepted > self.in_flight or verdict.epoch != self.epoch):
            raise RemoteOrderError(
                f"{accepted} drafts of epoch {verdict.epoch} accepted; {self.in_flight} of "
                f"{self.epoch} are in flight",
                "verdict.num_accepted",
            )

    def agrees(self, num_accepted: int, own: Sequence[int]) -> int:
        """How many drafts are confirmed by a verdict: the accepted, and those that follow them
        and are equal to the cloud's own tokens."""
        num_kept = num_accepted
        for draft, committed in zip(self._drafts[num_accepted:], own, strict=False):
            if draft.token_id != committed:
                break
            num_kept += 1
        return num_kept

    def first(self, num_tokens: int) -> tuple[int, ...]:
        """Token ids of the first drafts."""
        return tuple(draft.token_id for draft in self._drafts[:num_tokens])

    def commit(self, num_kept: int, num_own: int) -> None:
        """The first `num_kept` drafts are committed, then `num_own` tokens that are not drafts."""
        del self._drafts[:num_kept]
        self.position += num_kept + num_own

    def branch_off(self, judged_end: int) -> int:
        """Give up all drafts. Returns how many had been sent from `judged_end` on, in vain."""
        num_stale = max(0, self._sent_end - judged_end)
        if self._epoch_used:
            self.epoch, self._epoch_used = self.epoch + 1, False
            self._is_echoed = False
        self._drafts.clear()
        self._head = None
        self._sent_end = 0
        self._sent_at.clear()
        self.waits_since_s = None
        return num_stale

    def recovered(self, token_id: int) -> None:
        """The token just committed, to go out as the forced head of a new epoch."""
        self._head = token_id

    def frames(self, size_max: int, *, round_is_over: bool, now: float) -> list[Draft]:
        """What is due: all there is, in frames of at most `size_max` drafts; with whole rounds
        only full ones, unless the round is over."""
        frames = []
        if self._head is not None and self._fast_verify:
            frames.append(self._frame(0, size_max, now))
        while self.unsent:
            size = min(self.unsent, size_max)
            if not self._fast_verify:
                size = min(size, self._draft_length)
                if size < min(self._draft_length, size_max) and not round_is_over:
                    break
            frames.append(self._frame(size, size_max, now))
        if self._head is not None and round_is_over:
            frames.append(self._frame(0, size_max, now))
        if not self.unsent:
            self.waits_since_s = None
        elif self.waits_since_s is None or frames:
            self.waits_since_s = now
        return frames

    def _frame(self, num_drafts: int, size_max: int, now: float) -> Draft:
        """The next unsent drafts, after the head if it is still to go."""
        step_limit = min(self._draft_length, size_max) if self._limit_untold else 0
        self._limit_untold = False
        base = max(self._sent_end, self.position)
        drafts = self._drafts[base - self.position :][:num_drafts]
        head = () if self._head is None else (self._head,)
        self._head = None
        self._epoch_used = True
        self._sent_end = base + num_drafts
        self._sent_at.append((self._sent_end, now))
        return Draft(
            self.epoch,
            base - len(head),
            head + tuple(draft.token_id for draft in drafts),
            tuple(_prob(draft) for draft in drafts) if self._split else (),
            num_forced=len(head),
            end_of_round=not self._fast_verify,
            step_limit=step_limit,
        )

    def probe(self, number: int) -> Draft:
        """A probe of `position`."""
        self._epoch_used = True
        return Draft(self.epoch, self.position, probe=number)

    def round_trip(self, verdict: Verdict, now: float) -> float | None:
        """Seconds on the network, both ways, of the newest draft judged; where none was, of the
        epoch's first frame, if this is the first verdict that knows the epoch, and up to a step
        more. None if neither. To be asked before the verdict is committed.
        """
        if verdict.epoch != self.epoch or not self._sent_at:
            return None
        is_echo, self._is_echoed = not self._is_echoed, True
        if verdict.num_draft_tokens:
            judged_end = verdict.position + verdict.num_draft_tokens
            while self._sent_at and self._sent_at[0][0] < judged_end:
                self._sent_at.popleft()
        elif not is_echo:
            return None
        if not self._sent_at:
            return None
        spent_s = (verdict.queue_us + verdict.compute_us) * 1e-6
        return max(0.0, now - self._sent_at[0][1] - spent_s)

    def rules(self) -> dict[str, bool]:
        """What must hold between two events, and whether it does."""
        ends = [end for end, _ in self._sent_at]
        return {
            "what was sent is in the chain": self._sent_end <= self.end,
            "frames were sent in order": ends == sorted(ends),
            "the last frame ends what was sent": not ends or ends[-1] == self._sent_end,
            "an epoch of which a frame was sent is in use": self._epoch_used or not self._sent_end,
            "what waits was not sent": self.waits_since_s is None or self.unsent > 0,
            "the recovered token waits for its epoch's first frame": self._head is None
            or not (self._epoch_used or self._sent_end),
        }


def _prob(draft: _Unjudged) -> float:
    """q, which rounding may leave a little above 1 for a certain token."""
    assert draft.law is not None
    return min(draft.law.prob(draft.token_id), 1.0)
