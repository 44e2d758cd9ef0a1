"""The course of a chain of which every draft is accepted, from a recovered token on.

It is the course of every chain, up to the verdict that ends it. `prediction` turns it
into throughput; `simulation` plays the same system by events and chance.
"""

from dataclasses import dataclass, field

from picospec.performance.costs import Costs, Network, Scheme


@dataclass(slots=True)
class _Edge:
    """The drafter and the uplink. Places count from 1."""

    costs: Costs
    scheme: Scheme
    link: Network
    arrival_ms: dict[int, float] = field(default_factory=dict)  # place -> at the cloud
    busy_ms: float = 0.0  # until when the drafter is
    last: int = 0  # place of the last draft
    sent: int = 0  # place of the last draft sent
    known: int = 0  # places that the edge knows to be committed
    known_ms: float = 0.0  # since when
    round_end: int = 0  # without parallel drafting: where the round ends
    wire_ms: float = 0.0  # until when the uplink is busy
    head_ms: float = 0.0  # when the recovered token is at the cloud, if it travels alone
    head_unsent: bool = False  # it travels with the first round

    def __post_init__(self) -> None:
        self.head_unsent = self.scheme.split
        if self.scheme.fast_verify and self.head_unsent:
            self.head_ms = self._send(0.0, 0)

    def draft(self, before_ms: float = float("inf")) -> bool:
        """Draft a token, unless it could not begin before `before_ms`, and send what is due."""
        if not self._allowed():
            return False
        begin_ms = max(self.busy_ms, self.known_ms)
        if begin_ms >= before_ms:
            return False
        self.busy_ms = begin_ms + self.costs.draft_ms
        self.last += 1
        self._flush(self.busy_ms)
        return True

    def draft_all(self, before_ms: float) -> None:
        """All that can begin before."""
        while self.draft(before_ms):
            pass

    def hear(self, committed: int, now_ms: float) -> bool:
        """Of a verdict. Whether its last token is free: no draft was made for it."""
        is_free = self.last < committed or (self.last == committed and self.busy_ms > now_ms)
        self.known, self.known_ms = committed, now_ms
        if is_free:
            self.arrival_ms.pop(committed, None)
            self.last = committed
        self.sent = max(self.sent, committed)
        self._flush(now_ms)
        return is_free

    def _allowed(self) -> bool:
        place = self.last + 1
        if self.scheme.parallel_draft:
            return place <= self.known + self.scheme.window
        if place > self.round_end and self.known >= self.last:
            self.round_end = self.known + self.scheme.round_length
        return place <= self.round_end

    def _flush(self, now_ms: float) -> None:
        size = self.scheme.frame_length
        while self.last - self.sent >= size:
            self._send_drafts(size, now_ms)
        if self.last > self.sent == self.known and not self._allowed():
            self._send_drafts(self.last - self.sent, now_ms)

    def _send_drafts(self, num_drafts: int, now_ms: float) -> None:
        at_ms = self._send(now_ms, num_drafts)
        for _ in range(num_drafts):
            self.sent += 1
            self.arrival_ms[self.sent] = at_ms

    def _send(self, now_ms: float, num_drafts: int) -> float:
        """Returns the arrival."""
        num_bytes = self.link.up_bytes(num_drafts + self.head_unsent)
        self.head_unsent = False
        self.wire_ms = max(now_ms, self.wire_ms) + self.link.transfer_ms(num_bytes)
        return self.wire_ms + self.link.rtt_ms / 2


class AcceptedChain:
    """By place j = 1, 2 ... (index j - 1) after a recovered token, as far as it was walked.

    Time 0 is when the edge has that token. Vanilla speculation, rounds of two, T_d = 10 a token,
    T_v(2) = 50, RTT = 20: the first round is judged at 20 + 10 + 50 = 80 and known at the edge at
    90, the second 90 later.

    >>> from picospec.performance.costs import VerifyCost
    >>> costs = Costs(10.0, VerifyCost(((0, 40.0), (2, 50.0))))
    >>> scheme = Scheme(2, 2, parallel_draft=False, fast_verify=False, kept_rows=False)
    >>> chain = AcceptedChain(costs, scheme, Network(rtt_ms=20.0))
    >>> chain.step()
    >>> chain.step()
    >>> chain.recovered_ms
    [90.0, 90.0, 180.0, 180.0]
    """

    def __init__(self, costs: Costs, scheme: Scheme, link: Network) -> None:
        # When the edge would have its next recovered token, had the draft at j been rejected.
        self.recovered_ms: list[float] = []
        # Coupled: the cloud's bonus token is there before a draft for j was made.
        self.is_free: list[bool] = []
        self._edge = edge = _Edge(costs, scheme, link)
        self._costs, self._scheme = costs, scheme
        self._step_ms = [costs.step_ms(k) for k in range(scheme.draft_length + 1)]
        delay_ms = link.rtt_ms / 2
        self._verdict_ms, self._rejection_ms = (
            delay_ms + link.transfer_ms(link.down_bytes(scheme, rejected=rejected))
            for rejected in (False, True)
        )
        self._keeps_rows = scheme.split and scheme.kept_rows
        self._has_row = False
        self._free_at_ms = 0.0
        if self._keeps_rows and scheme.fast_verify:  # pre-verification
            self._free_at_ms = edge.head_ms + self._step_ms[0]
            self._has_row = True

    def step(self) -> None:
        """The engine's next: judge what has arrived, or what arrives next, and tell the edge."""
        edge, first = self._edge, len(self.recovered_ms) + 1
        while first not in edge.arrival_ms:
            if not edge.draft():
                raise AssertionError("the edge and the engine wait for each other")
        begin_ms = max(self._free_at_ms, edge.arrival_ms[first])
        edge.draft_all(begin_ms)
        num_taken = 1
        while (
            num_taken < self._scheme.draft_length + self._has_row
            and edge.arrival_ms.get(first + num_taken, float("inf")) <= begin_ms
        ):
            num_taken += 1
        if self._has_row:
            judged_ms = begin_ms + self._costs.row_judge_ms
            end_ms = judged_ms + self._step_ms[num_taken - 1]
            self._judge(judged_ms, 1)
            num_left = num_taken - 1
        else:
            end_ms = begin_ms + self._step_ms[num_taken]
            num_left = num_taken
        if not self._scheme.split:  # the bonus token is compared with the draft at its place
            num_left += 1
        self._judge(end_ms, num_left)
        self._has_row = self._keeps_rows
        self._free_at_ms = end_ms
        heard_ms = end_ms + self._verdict_ms
        edge.draft_all(heard_ms)
        is_free = edge.hear(len(self.recovered_ms), heard_ms)
        if not self._scheme.split:
            self.is_free[-1] = is_free

    def _judge(self, at_ms: float, num_places: int) -> None:
        """The next places; were one rejected, the edge would have a recovered token ..."""
        edge, heard_ms = self._edge, at_ms + self._rejection_ms
        edge.draft_all(heard_ms)
        recover_ms = self._costs.recover_ms if self._scheme.split else 0.0
        self.recovered_ms += [max(heard_ms, edge.busy_ms) + recover_ms] * num_places
        self.is_free += [False] * num_places
