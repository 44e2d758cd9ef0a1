"""What passes between an edge session and its drafter, as frozen values.

Commands go to the drafter, events come back; session, pipeline, context and worker pass them on
unchanged. Both name a *branch*: the number of the chain that is being drafted. Every rollback
starts a new branch, so that what was drafted before the drafter heard of it can be told from what
was drafted after.
"""

from dataclasses import dataclass

from picospec.sampling.distribution import Distribution

# Commands


@dataclass(frozen=True, slots=True)
class Allow:
    """Tokens may be drafted for positions below `limit`; a drafter that has paused goes on.

    A limit at or below the text's end stops it.
    """

    limit: int


@dataclass(frozen=True, slots=True)
class Rollback:
    """Truncate to `length` tokens, append the committed `token_ids`, go on as `branch`."""

    branch: int
    length: int
    token_ids: tuple[int, ...] = ()


DrafterCommand = Allow | Rollback


# Events


@dataclass(frozen=True, slots=True)
class Drafted:
    """Draft tokens for `position` and after; `laws` has the Q that each was drawn from in split
    mode, else nothing. It travels with the draft, so it outlives the drafter."""

    branch: int
    position: int
    token_ids: tuple[int, ...]
    laws: tuple[Distribution, ...] = ()


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Nothing can be proposed for `position`, until a rollback changes the text."""

    branch: int
    position: int


@dataclass(frozen=True, slots=True)
class Paused:
    """The last draft is likely to be rejected: none follows before Allow or a rollback."""

    branch: int
    position: int


DrafterEvent = Drafted | Exhausted | Paused
