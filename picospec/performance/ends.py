"""The two ends of a simulated session: the edge with its drafter, the cloud with its engine.

Places are output positions, counted from the first token, 0. `Edge` and `Cloud` know of each other
what came over the wire, and nothing else.
"""

from __future__ import annotations

from picospec.performance.world import (
    BEGINS,
    HAPPENED,
    STEP_ENDS,
    SimulatedDraft,
    SimulatedVerdict,
    Step,
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
        self._sent_at: dict[int, float] = {}  # place of a frame's last draft -> ms
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
        self._report(verdict)
        num_kept = verdict.num_accepted
        bonus_kept = False
        if verdict.num_own and not verdict.rejected and num_kept < len(self._chain):
            bonus_kept = self._chain[num_kept].is_good
        num_kept += bonus_kept
        del self._chain[:num_kept]
        self.committed += num_kept
        world.replan()
        if verdict.rejected or (verdict.num_own and not bonus_kept):
            had_draft = verdict.rejected or bool(self._chain)
            self._branch_off()
            self.committed += verdict.num_own
            if had_draft:
                self._run_base = self.committed
            self._recovering = verdict.rejected and world.scheme.split
        self._sent_end = max(self._sent_end, self.committed)
        self._look_up()

    def _report(self, verdict: SimulatedVerdict) -> None:
        """Count it, and tell the controller what an edge would see."""
        world = self._world
        world.counts.verdicts += 1
        world.counts.accepted += verdict.num_accepted
        controller = world.controller
        if controller is None:
            return
        queue_s, compute_s = verdict.queue_ms / 1e3, verdict.compute_ms / 1e3
        num_judged, num_forwards = verdict.num_judged, verdict.num_forwards
        controller.judged(num_judged, verdict.num_accepted, num_forwards, queue_s, compute_s)
        sent_ms = self._sent_at.get(self.committed + verdict.num_judged)
        if sent_ms is not None:
            spent_ms = verdict.queue_ms + verdict.compute_ms
            controller.round_trip((world.now_ms - sent_ms - spent_ms) / 1e3)

    def _branch_off(self) -> None:
        self._epoch += 1
        self._chain.clear()
        self._sent_at.clear()
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
        if world.controller is not None:
            world.controller.drafted(1, draft_ms / 1e3)
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
        self._sent_at[self._sent_end] = world.now_ms
        self._head_unsent = False
        num_bytes = world.link.up_bytes(num_drafts + head)
        world.send_up(num_bytes, lambda: world.deliver(epoch, drafts, head))


class Cloud:
    """The engine, its queue, and the row that it may keep."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._committed = 0
        self._epoch = 0
        self._dead = False  # the rest of the epoch contradicts what is committed
        self._queue: list[SimulatedDraft] = []
        self._busy = False
        self._has_row = False
        self._head_waits = False  # for its forward
        self._num_forwards = 0  # since the last verdict

    def open(self, after_ms: float) -> None:
        """With the prompt, which it has forwarded `after_ms` from now: the first token is there."""
        self._committed = -1
        self._busy = True
        self._world.after(after_ms, STEP_ENDS, self._first_token)

    def _first_token(self) -> None:
        self._busy = False
        self._committed = 0
        self._head_waits = self._world.scheme.split
        verdict = SimulatedVerdict(0, 0, 0, 1, False, 1, 0.0, 0.0)
        num_bytes = self._world.link.down_bytes(self._world.scheme, rejected=False)
        self._world.send_down(num_bytes, lambda: self._world.hear(verdict))
        self._look_up()

    def receive(self, epoch: int, drafts: list[SimulatedDraft], head: bool) -> None:
        if epoch > self._epoch:
            self._epoch, self._dead = epoch, False
            self._committed += head
            self._queue.clear()
        if head:
            self._has_row, self._head_waits = False, True
        if epoch == self._epoch and not self._dead:
            now_ms = self._world.now_ms
            self._queue += [draft._replace(arrived_ms=now_ms) for draft in drafts]
        self._look_up()

    def _look_up(self) -> None:
        """Begin a step, once all that happens now has happened."""
        self._settle()
        self._world.after(0.0, BEGINS, self._begin_step)

    def _settle(self) -> None:
        """Coupled: compare the head of the queue with the bonus token."""
        while self._queue and self._queue[0].place <= self._committed:
            if not self._queue.pop(0).is_good:
                self._dead = True
                self._queue.clear()

    def _begin_step(self) -> None:
        if self._busy:
            return
        world = self._world
        costs, scheme = world.costs, world.scheme
        keeps_rows = scheme.split and scheme.kept_rows
        # A draft that the row judges needs no place in the forward's.
        taken = self._queue[: scheme.draft_length + self._has_row]
        queue_ms = world.now_ms - taken[-1].arrived_ms if taken else 0.0
        if not taken:
            if keeps_rows and scheme.fast_verify and self._head_waits:
                self._busy, self._head_waits = True, False
                self._forward(costs.step_ms(0), 0.0, [])
            return
        self._busy, self._head_waits = True, False
        if not self._has_row:
            self._forward(costs.step_ms(len(taken)), queue_ms, taken)
        elif taken[0].is_good:
            ms = costs.row_judge_ms + costs.step_ms(len(taken) - 1)
            self._forward(ms, queue_ms, taken)
        else:  # rejected by the row: nothing to forward
            ms = costs.row_judge_ms
            world.after(ms, STEP_ENDS, lambda: self._step_ended(taken[:1], queue_ms, 0.0))

    def _forward(self, ms: float, queue_ms: float, taken: list[SimulatedDraft]) -> None:
        self._num_forwards += 1
        self._world.counts.forwards += 1

        def ended(took_ms: float) -> None:
            self._world.counts.verify_ms += took_ms
            self._step_ended(taken, queue_ms, took_ms)

        self._world.step = Step(self._world, ms, ended)

    def _step_ended(self, taken: list[SimulatedDraft], queue_ms: float, compute_ms: float) -> None:
        scheme = self._world.scheme
        self._busy = False
        num_accepted = next((i for i, d in enumerate(taken) if not d.is_good), len(taken))
        rejected = num_accepted < len(taken)
        own = 0 if scheme.split or not taken else 1
        del self._queue[:num_accepted]
        self._committed += num_accepted + own
        self._has_row = scheme.split and scheme.kept_rows and not rejected
        if rejected:
            self._dead = True
            self._queue.clear()
        if taken:
            verdict = SimulatedVerdict(
                self._epoch,
                len(taken),
                num_accepted,
                own,
                rejected,
                self._num_forwards,
                queue_ms,
                compute_ms,
            )
            self._num_forwards = 0
            num_bytes = self._world.link.down_bytes(scheme, rejected=rejected)
            self._world.send_down(num_bytes, lambda: self._world.hear(verdict))
        self._look_up()
