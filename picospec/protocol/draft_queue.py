"""The engine's side of a session: drafts that wait for their verdict.

A `DraftQueue` lives in the engine's process, one for each session, and applies the rules of
docs/protocol.md against what is really committed at that moment:
1. Drafts stay here until they are judged. `take` only looks, so preemption loses nothing.
2. Where a queued draft overlaps a committed position it must equal it; otherwise the rest of
   its epoch is dropped ("dead").
3. After a split rejection the session awaits recovery: only a new epoch that begins with the
   recovered token, or with a probe, brings it back.
4. Nothing here raises. `CloudSession` has refused illegal frames before; whatever slips
   through makes its epoch dead, and is counted in `stale_tokens`.

`committed` is read by reference: it must have grown by the time of the next call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from picospec.protocol.epoch import Epoch
from picospec.protocol.messages import Draft, VerificationMode


@dataclass(frozen=True, slots=True)
class Work:
    """What one step should judge: drafts from `position` on, or, without any, a probe."""

    epoch: int
    position: int
    token_ids: tuple[int, ...] = ()
    draft_probs: tuple[float, ...] = ()  # split: one for each draft
    probe: int = 0  # as in Draft.probe; 0 = not a probe
    arrived_s: float = 0.0  # when the newest draft in it (or the probe) arrived


class _Queued(NamedTuple):
    token_id: int
    draft_prob: float
    arrived_s: float


class DraftQueue:
    """Drafts of the current epoch that are not judged yet.

    A coupled example, with `committed` = [7, 7] (the prompt):

    >>> committed = [7, 7]
    >>> queue = DraftQueue(VerificationMode.COUPLED, committed)
    >>> queue.add(Draft(epoch=0, base_position=2, token_ids=(4, 5, 6)), 0.0)
    >>> queue.take(2).token_ids
    (4, 5)
    >>> committed += [4, 5, 6]  # both accepted, and the bonus token is the third draft
    >>> queue.judged()
    >>> queue.has_work
    False
    >>> queue.add(Draft(epoch=0, base_position=4, token_ids=(6, 8)), 0.0)  # 6 is committed
    >>> queue.take(2)
    Work(epoch=0, position=5, token_ids=(8,), draft_probs=(), probe=0, arrived_s=0.0)
    >>> committed += [9]  # 8 was rejected, so the rest of the epoch is dead
    >>> queue.judged()
    >>> queue.add(Draft(epoch=0, base_position=6, token_ids=(1, 2)), 0.0)
    >>> queue.has_work, queue.stale_tokens
    (False, 2)

    A split one: a rejection, then the recovered token and a draft.

    >>> committed = [7, 7]
    >>> queue = DraftQueue(VerificationMode.SPLIT, committed)
    >>> queue.add(Draft(epoch=0, base_position=2, token_ids=(4,), draft_probs=(0.5,)), 0.0)
    >>> queue.take(4).token_ids
    (4,)
    >>> queue.judged(rejected=True)
    >>> queue.awaiting_recovery
    True
    >>> queue.add(Draft(1, 2, token_ids=(3, 8), draft_probs=(0.25,), num_forced=1), 0.0)
    3
    >>> committed.append(3)
    >>> queue.take(4)
    Work(epoch=1, position=3, token_ids=(8,), draft_probs=(0.25,), probe=0, arrived_s=0.0)
    """

    def __init__(
        self, mode: VerificationMode, committed: Sequence[int], *, verify_whole_rounds: bool = False
    ) -> None:
        """`committed` holds prompt and output, index = position; it grows as tokens commit."""
        self._split = mode is VerificationMode.SPLIT
        self._committed = committed
        self._whole_rounds = verify_whole_rounds
        self._epoch = Epoch[_Queued]()  # its drafts that are not judged yet
        self._dead = False  # the rest of that epoch is dropped
        self._num_taken = 0  # drafts in the last Work
        self._round_end = 0  # where the last whole round ends
        self._step_limit = 0  # most drafts in a Work; 0 = the caller's to say
        self._probe = 0
        self._probe_position = 0
        self._probe_arrived_s = 0.0
        self.awaiting_recovery = False
        self.stale_tokens = 0  # dropped without having been judged

    @property
    def epoch(self) -> int:
        """What a Verdict names: the epoch judged, 0 before any."""
        return max(0, self._epoch.number)

    @property
    def is_dead(self) -> bool:
        """Whether the rest of the epoch contradicts what is committed, and is dropped."""
        self._settle()
        return self._dead

    @property
    def is_edges_turn(self) -> bool:
        """Whether the next position is the edge's to draw: after a rejection, until its recovered
        token is here, or where it has asked for P by a probe."""
        return self.awaiting_recovery or (self._split and self._has_probe())

    @property
    def has_drafts(self) -> bool:
        """Whether any were queued when the queue was last looked at."""
        return bool(self._epoch.entries)

    @property
    def num_ready(self) -> int:
        """Drafts that may be judged now."""
        self._settle()
        return self._num_ready()

    @property
    def has_work(self) -> bool:
        """Whether there is something to judge now."""
        self._settle()
        return self._has_probe() or self._num_ready() > 0

    def add(self, draft: Draft, arrived_s: float) -> int | None:
        """Queue a frame. Returns the recovered token at its head, to be committed at once.

        The caller must have it in `committed` before the next call.
        """
        recovered = None
        if self._epoch.is_begun_by(draft):
            self._begin(draft)
            if draft.num_forced and not self._dead:
                recovered = draft.token_ids[0]
        elif self._epoch.has_passed(draft):
            self.stale_tokens += len(draft.token_ids)
            return None
        self._step_limit = draft.step_limit or self._step_limit
        self._settle()
        # Queued, committed, or committed by this call.
        known = self._epoch.num_known(draft)
        end = max(self._epoch.end, len(self._committed))
        misplaced = draft.base_position > end or draft.num_forced > known
        fresh = draft.token_ids[known:]
        if self._dead or misplaced:
            self._dead = True
            self._drop()
            self.stale_tokens += len(fresh)
            return None
        if not draft.token_ids:
            self._probe, self._probe_position = draft.probe, draft.base_position
            self._probe_arrived_s = arrived_s
        elif fresh:
            if not self._epoch.entries:
                self._epoch.base = draft.base_position + known
            probs = draft.draft_probs[known - draft.num_forced :] if self._split else ()
            self._epoch.entries += [
                _Queued(token_id, prob, arrived_s)
                for token_id, prob in zip(fresh, probs or (0.0,) * len(fresh), strict=True)
            ]
        if draft.end_of_round:
            self._round_end = draft.base_position + len(draft.token_ids)
        return recovered

    def take(self, num_tokens_max: int) -> Work | None:
        """What the next step should judge, at most `num_tokens_max` drafts; None = nothing.

        Nor more than the edge has asked for in Draft.step_limit.

        Looks only: the same is returned until `judged`, or until more has arrived. A split
        probe goes first, since its answer ends the epoch; a coupled one is answered by the
        verdict on drafts as well.
        """
        self._settle()
        self._num_taken = 0
        position = len(self._committed)
        num_ready = min(self._num_ready(), max(0, num_tokens_max))
        if self._step_limit:
            num_ready = min(num_ready, self._step_limit)
        if self._has_probe() and (self._split or not num_ready):
            return Work(self.epoch, position, probe=self._probe, arrived_s=self._probe_arrived_s)
        if not num_ready:
            return None
        taken = self._epoch.entries[:num_ready]
        self._num_taken = num_ready
        return Work(
            self.epoch,
            position,
            tuple(draft.token_id for draft in taken),
            tuple(draft.draft_prob for draft in taken) if self._split else (),
            arrived_s=taken[-1].arrived_s,
        )

    def judged(self, *, rejected: bool = False) -> None:
        """The last Work's verdict is in `committed`; `rejected` if it carries a Rejection.

        Also to be called where the cloud answers Open.probe with a Rejection.
        """
        self._settle()
        if rejected:
            self.awaiting_recovery = True
            self._dead = True
            self._drop()
        self._num_taken = 0

    def _begin(self, draft: Draft) -> None:
        """Start the epoch of `draft`, its first frame."""
        self._drop()
        self._epoch.begin(draft)
        self._round_end = 0
        at_end = draft.base_position == len(self._committed)
        recovers = bool(draft.num_forced) or not draft.token_ids
        if self.awaiting_recovery:
            self._dead = not (recovers and at_end)
            self.awaiting_recovery = self._dead
        else:
            self._dead = bool(draft.num_forced)
        if draft.num_forced and not self._dead:
            self._epoch.base += 1

    def _settle(self) -> None:
        """Compare the queue's head with what was committed meanwhile."""
        num_committed = len(self._committed)
        if self._probe and self._probe_position < num_committed:
            self._probe = 0
        overlap = min(num_committed - self._epoch.base, len(self._epoch.entries))
        for index in range(overlap):
            if self._epoch.entries[index].token_id != self._committed[self._epoch.base + index]:
                self._dead = True
                self._drop()
                return
        if overlap > 0:
            del self._epoch.entries[:overlap]
            self._epoch.base += overlap
            self._num_taken = max(0, self._num_taken - overlap)

    def _drop(self) -> None:
        """Forget what is queued. What the last step took was judged, so it is not stale."""
        self.stale_tokens += len(self._epoch.entries) - self._num_taken
        self._epoch.entries.clear()
        self._num_taken = 0
        self._probe = 0

    def _has_probe(self) -> bool:
        return self._probe > 0 and self._probe_position == len(self._committed)

    def _num_ready(self) -> int:
        """Queued drafts that may be judged, from the first uncommitted position on."""
        if self._epoch.base != len(self._committed):
            return 0
        if not self._whole_rounds:
            return len(self._epoch.entries)
        return max(0, min(len(self._epoch.entries), self._round_end - self._epoch.base))
