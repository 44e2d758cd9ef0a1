"""When a lost generation is taken up again: attempts, pauses between them, and the end of hope.

Pure: time is passed in, in seconds.
"""

BACKOFF_FIRST_S = 0.1  # doubles with each attempt
BACKOFF_MAX_S = 5.0


class Resumption:
    """Bounds one generation's attempts from the first loss of its link to the next verdict.

    >>> resumption = Resumption(attempts_max=2, timeout_s=30.0)
    >>> [resumption.delay_s(now) for now in (10.0, 11.0, 12.0)]
    [0.1, 0.2, None]
    >>> resumption.made_progress()
    >>> resumption.delay_s(13.0)
    0.1
    """

    def __init__(self, *, attempts_max: int, timeout_s: float) -> None:
        self.attempts = 0  # since the last verdict
        self._attempts_max = attempts_max
        self._timeout_s = timeout_s
        self._lost_at: float | None = None  # the first loss since the last verdict

    @property
    def under_way(self) -> bool:
        """Whether the link was lost and no verdict has come since."""
        return self._lost_at is not None

    def delay_s(self, now: float) -> float | None:
        """The link was lost: how long to wait before the next attempt; None to give up."""
        if self._lost_at is None:
            self._lost_at, self.attempts = now, 0
        delay_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0**self.attempts)
        is_late = now + delay_s - self._lost_at > self._timeout_s
        if self.attempts >= self._attempts_max or is_late:
            return None
        self.attempts += 1
        return delay_s

    def made_progress(self) -> None:
        """A verdict has come."""
        self._lost_at = None
