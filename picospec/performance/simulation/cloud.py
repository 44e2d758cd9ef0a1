"""The cloud of a simulated session: the engine, its queue, and the row that it may keep.

Places are output positions, counted from the first token, 0. Of the edge it knows what came over
the wire, and nothing else.
"""

from picospec.performance.simulation.clock_and_wires import (
    BEGINS,
    STEP_ENDS,
    SimulatedDraft,
    SimulatedVerdict,
    Step,
    World,
)


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

    def open(self, after_ms: float) -> None:
        """With the prompt, which it has forwarded `after_ms` from now: the first token is there."""
        self._committed = -1
        self._busy = True
        self._world.after(after_ms, STEP_ENDS, self._first_token)

    def _first_token(self) -> None:
        self._busy = False
        self._committed = 0
        self._head_waits = self._world.scheme.split
        verdict = SimulatedVerdict(epoch=0, num_accepted=0, num_own=1, rejected=False)
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
            self._queue += drafts
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
        if not taken:
            if keeps_rows and scheme.fast_verify and self._head_waits:
                self._busy, self._head_waits = True, False
                self._forward(costs.step_ms(0), [])
            return
        self._busy, self._head_waits = True, False
        if not self._has_row:
            self._forward(costs.step_ms(len(taken)), taken)
        elif taken[0].is_good:
            ms = costs.row_judge_ms + costs.step_ms(len(taken) - 1)
            self._forward(ms, taken)
        else:  # rejected by the row: nothing to forward
            ms = costs.row_judge_ms
            world.after(ms, STEP_ENDS, lambda: self._step_ended(taken[:1]))

    def _forward(self, ms: float, taken: list[SimulatedDraft]) -> None:
        self._world.counts.forwards += 1

        def ended(took_ms: float) -> None:
            self._world.counts.verify_ms += took_ms
            self._step_ended(taken)

        self._world.step = Step(self._world, ms, ended)

    def _step_ended(self, taken: list[SimulatedDraft]) -> None:
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
            verdict = SimulatedVerdict(self._epoch, num_accepted, own, rejected)
            num_bytes = self._world.link.down_bytes(scheme, rejected=rejected)
            self._world.send_down(num_bytes, lambda: self._world.hear(verdict))
        self._look_up()
