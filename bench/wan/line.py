"""One direction of a WAN, without I/O and without a clock: what enters when, and arrives when.

The rules of a `Line`:

- nothing arrives earlier than `delay_s` after it left, and nothing overtakes;
- at most `bandwidth_bps` leave; what waits for its turn to leave sees every change of the link,
  what has left does not;
- while held nothing arrives; what was held leaves anew at the release, as if sent again then.
"""

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LineConditions:
    """The conditions in one direction.

    `delay_s` is the least time from end to end. Jitter adds to it, uniformly from 0 to `jitter_s`.
    `bandwidth_bps` is in bits of TCP payload a second; None: unlimited.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth_bps: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name in ("delay_s", "jitter_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, not {value}")
        bandwidth = self.bandwidth_bps
        if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth_bps must be finite and above 0, or None, not {bandwidth}")

    @classmethod
    def symmetric(
        cls, rtt_s: float, jitter_s: float = 0.0, bandwidth_bps: float | None = None
    ) -> Self:
        """For either direction: half of `rtt_s`, the rest as it is. Raises ValueError."""
        return cls(rtt_s / 2, jitter_s, bandwidth_bps)


@dataclass(slots=True)
class _Entry(Generic[T]):
    item: T
    num_bytes: int
    leaves_s: float  # wholly: its last bit is on the line
    arrives_s: float


class Line(Generic[T]):
    """A first-in-first-out line under `link`; every method is told the time.

    Example, 8 kbit/s and 0.5 s of delay: two items of 1000 bytes pushed at 0 s leave at 1 s and
    2 s, and arrive at 1.5 s and 2.5 s.
    """

    def __init__(self, link: LineConditions, rng: random.Random) -> None:
        self.link = link
        self._rng = rng
        self._entries: deque[_Entry[T]] = deque()
        self._free_s = 0.0  # when the sender's interface has nothing left to send
        self._last_arrival_s = 0.0
        self._held = False

    @property
    def next_s(self) -> float | None:
        """When the next item arrives; None: nothing is under way, or all is held."""
        return self._entries[0].arrives_s if self._entries and not self._held else None

    def push(self, item: T, num_bytes: int, now_s: float) -> None:
        """`item` enters; one of 0 bytes takes its turn, and no time, on the line."""
        leaves_s = max(now_s, self._free_s)
        if self.link.bandwidth_bps is not None:
            leaves_s += num_bytes * 8 / self.link.bandwidth_bps
        arrives_s = leaves_s + self.link.delay_s
        if self.link.jitter_s:
            arrives_s += self._rng.uniform(0.0, self.link.jitter_s)
        self._free_s = leaves_s
        self._last_arrival_s = max(arrives_s, self._last_arrival_s)
        self._entries.append(_Entry(item, num_bytes, leaves_s, self._last_arrival_s))

    def pop(self, now_s: float) -> T | None:
        """The next item that has arrived by now."""
        if (next_s := self.next_s) is None or next_s > now_s:
            return None
        return self._entries.popleft().item

    def set(self, link: LineConditions, now_s: float) -> None:
        """Other conditions, for all that has not left."""
        self.link = link
        self._send_again(self._take_back(now_s), now_s)

    def hold(self) -> None:
        self._held = True

    def release(self, now_s: float) -> None:
        """Without a hold before it, nothing happens."""
        if self._held:
            self._held = False
            self._send_again(self._take_back(-math.inf), now_s)

    def discard(self, doomed: Callable[[T], bool], now_s: float) -> None:
        """Forget the doomed among what has not left: the rest moves up."""
        waiting = self._take_back(now_s)
        self._send_again([entry for entry in waiting if not doomed(entry.item)], now_s)

    def clear(self) -> None:
        """Forget all that is under way. The link stays, and so does a hold."""
        self._entries.clear()
        self._free_s = self._last_arrival_s = 0.0

    def _take_back(self, now_s: float) -> list[_Entry[T]]:
        """Those that leave after now, no longer in the line."""
        waiting: list[_Entry[T]] = []
        while self._entries and self._entries[-1].leaves_s > now_s:
            waiting.append(self._entries.pop())
        return waiting[::-1]

    def _send_again(self, entries: list[_Entry[T]], now_s: float) -> None:
        self._free_s = now_s
        self._last_arrival_s = self._entries[-1].arrives_s if self._entries else now_s
        for entry in entries:
            self.push(entry.item, entry.num_bytes, now_s)
