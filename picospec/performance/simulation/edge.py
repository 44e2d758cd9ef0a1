"""The edge of a simulated session: the session and its drafter.

Places are output positions, counted from the first token, 0. Of the cloud it knows what came over
the wire, and nothing else.
"""

from picospec.performance.simulation.clock_and_wires import (
    BEGINS,
    HAPPENED,
    SimulatedDraft,
    SimulatedVerdict,
    World,
)


class Edge:
    """The edge session and its drafter. The drafter finishes what it has begun, then looks up."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.committed = 0
        self._epoch = 0
        self._run_base = 0  # place of the last recovered token
        self._chain: list[SimulatedDraft] = []  # unjudged, from committed + 1 on
        self._sent_end = 0  # place of the last draft sent
        self._round_end = 0
        self._head_unsent = False
        self._busy = self._recovering = False

    def begin(self) -> None:
        """With a token that both sides have just committed."""
        self._send_head()
        self._look_up()

    def open(self, prefill_ms: float) -> None:
        """With a request: nothing is committed, and drafts may be made once the prompt is in."""
        self.committed = self._run_base = self._sent_end = self._round_end = -1
        self._busy = True
        self._world.after(prefill_ms, HAPPENED, self._prefilled)

    def _prefilled(self) -> None:
        self._busy = False
        self._look_up()

    def hear(self, verdict: SimulatedVerdict) -> None:
        world = self._world
        world.counts.verdicts += 1
        world.counts.accepted += verdict.num_accepted
        num_kept = verdict.num_accepted
        bonus_kept = False
        if verdict.num_own and not verdict.rejected and num_kept < len(self._chain):
            bonus_kept = self._chain[num_kept].is_good
        num_kept += bonus_kept
        del self._chain[:num_kept]
        self.committed += num_kept
        if verdict.rejected or (verdict.num_own and not bonus_kept):
            had_draft = verdict.rejected or bool(self._chain)
            self._branch_off()
            self.committed += verdict.num_own
            if had_draft:
                self._run_base = self.committed
            self._recovering = verdict.rejected and world.scheme.split
        self._sent_end = max(self._sent_end, self.committed)
        self._look_up()

    def _branch_off(self) -> None:
        self._epoch += 1
        self._chain.clear()
        self._sent_end = self._round_end = 0

    def _look_up(self) -> None:
        """Send what is due, and begin what can begin, once all that happens now has happened."""
        self._flush()
        self._world.after(0.0, BEGINS, self._begin_work)

    def _begin_work(self) -> None:
        if self._busy:
            return
        world, epoch = self._world, self._epoch
        if self._recovering:
            self._busy = True
            world.after(world.costs.recover_ms, HAPPENED, self._recovered)
        elif self._allowed():
            self._busy = True
            world.drafts(True)
            draft_ms = world.costs.draft_ms
            world.counts.draft_ms += draft_ms
            world.after(draft_ms, HAPPENED, lambda: self._drafted(epoch, draft_ms))
        else:
            world.drafts(False)

    def _drafted(self, epoch: int, draft_ms: float) -> None:
        world = self._world
        self._busy = False
        if epoch == self._epoch:
            place = self.committed + len(self._chain) + 1
            self._chain.append(SimulatedDraft(place, world.accepts(place, self._run_base)))
        self._look_up()

    def _recovered(self) -> None:
        self._busy = self._recovering = False
        self.committed += 1
        self._run_base = self._sent_end = self.committed
        self._send_head()
        self._look_up()

    def _allowed(self) -> bool:
        place, scheme = self.committed + len(self._chain) + 1, self._world.scheme
        if place > self._world.last_place:
            return False
        if scheme.parallel_draft:
            return place <= self.committed + scheme.window
        if not self._chain and self.committed >= self._round_end:
            self._round_end = self.committed + scheme.round_length
        return place <= self._round_end

    def _flush(self) -> None:
        if self._recovering:
            return
        size = self._world.scheme.frame_length
        end = self.committed + len(self._chain)
        while end - self._sent_end >= size:
            self._send_drafts(size)
        nothing_in_flight = self._sent_end == self.committed and not self._allowed()
        if end > self._sent_end and (nothing_in_flight or end == self._world.last_place):
            self._send_drafts(end - self._sent_end)

    def _send_head(self) -> None:
        """The recovered token: on its own, or with the first round."""
        scheme = self._world.scheme
        if not scheme.split:
            return
        self._head_unsent = True
        if scheme.fast_verify:
            self._send_drafts(0)

    def _send_drafts(self, num_drafts: int) -> None:
        world, epoch, head = self._world, self._epoch, self._head_unsent
        first = self._sent_end - self.committed
        drafts = self._chain[first : first + num_drafts]
        self._sent_end += num_drafts
        self._head_unsent = False
        num_bytes = world.link.up_bytes(num_drafts + head)
        world.send_up(num_bytes, lambda: world.deliver(epoch, drafts, head))
