"""What an engine step of so many tokens takes: measured at the start, refined by each step.

`best_drafts` spends it: the drafts of a step are those that raise the batch's tokens per second.
"""

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

MEASURED_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)
REPEATS = 5
REFINEMENT = 0.05  # of a step in the scale of all
SCALE_STEP_MAX = 2.0  # a step this much slower than expected tells of something else
# What a draft costs beside its row in the forward, where the gRPC process has the engine's cores: a
# frame takes 0.15 ms there, and more than half of all drafts are never judged.
HANDLING_S = 0.0004
UNKNOWN: Mapping[int, float] = {1: 0.02, 64: 0.03}  # until the worker has told


def measure(forward: Callable[[int], object], counts: Sequence[int]) -> dict[int, float]:
    """Median seconds of `forward(n)`, by n; the lengths take turns."""
    times_s: dict[int, list[float]] = {count: [] for count in counts}
    for count in counts:
        forward(count)  # kernels are chosen and buffers made
    for _ in range(REPEATS):
        for count in counts:
            started_s = time.perf_counter()
            forward(count)
            times_s[count].append(time.perf_counter() - started_s)
    return {count: statistics.median(each) for count, each in times_s.items()}


class StepCosts:
    """Seconds of a step, by its tokens; linear between what was measured and beyond it.

    >>> costs = StepCosts({1: 0.020, 5: 0.024})
    >>> costs.seconds(3), costs.seconds(9)
    (0.022, 0.028)
    """

    def __init__(
        self, measured_s: Mapping[int, float] = UNKNOWN, *, handling_s: float = 0.0
    ) -> None:
        """`measured_s`: two numbers of tokens at least. `handling_s`: of a draft, beside that."""
        self.handling_s = handling_s
        points = sorted(measured_s.items())
        self._counts = [count for count, _ in points]
        # More tokens never take less: what was measured so is noise, or padded.
        self._seconds = [
            min(seconds for _, seconds in points[index:]) for index in range(len(points))
        ]
        self._scale = 1.0

    def seconds(self, num_tokens: int) -> float:
        counts = self._counts
        right = min(max(1, bisect_left(counts, num_tokens)), len(counts) - 1)
        left = right - 1
        slope = (self._seconds[right] - self._seconds[left]) / (counts[right] - counts[left])
        seconds = self._seconds[left] + slope * (num_tokens - counts[left])
        return self._scale * max(seconds, self._seconds[0])

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of decoding took so long."""
        ratio = min(seconds / self.seconds(num_tokens), SCALE_STEP_MAX)
        self._scale *= 1.0 + REFINEMENT * (ratio - 1.0)


def best_drafts(
    costs: StepCosts, num_sessions: int, drafts: Sequence[tuple[float, int]]
) -> list[int]:
    """How many drafts of each session to judge in a step.

    The step forwards `num_sessions` tokens anyway. `drafts` has each session's acceptance and what
    is there. Every session gets a token without drafts; draft number j adds one with probability
    acceptance ** j. What is taken is the set of drafts with the most tokens per second.

    >>> costs = StepCosts({1: 0.020, 3: 0.022, 5: 0.040})
    >>> best_drafts(costs, 1, [(0.9, 8)])
    [2]
    >>> best_drafts(costs, 2, [(0.9, 4), (0.3, 4)])
    [1, 0]
    """
    chances = [
        (acceptance**place, index)
        for index, (acceptance, available) in enumerate(drafts)
        for place in range(1, available + 1)
    ]
    chances.sort(key=lambda chance: -chance[0])
    tokens, best, num_best = float(num_sessions), 0.0, 0
    for count in range(len(chances) + 1):
        if count:
            tokens += chances[count - 1][0]
        rate = tokens / (costs.seconds(num_sessions + count) + count * costs.handling_s)
        if rate > best:
            best, num_best = rate, count
    taken = [0] * len(drafts)
    for _, index in chances[:num_best]:
        taken[index] += 1
    return taken


def hopeful(acceptance: float, most: int, hope_min: float = 0.02) -> int:
    """How many drafts in a row have a chance to be reached, at most `most`.

    >>> hopeful(0.5, 16), hopeful(1.0, 16)
    (5, 16)
    """
    if acceptance >= 1.0:
        return most
    return min(most, int(math.log(hope_min) / math.log(max(acceptance, 1e-6))))
