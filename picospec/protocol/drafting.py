"""What passes between an edge session and its drafter, as frozen values.

Commands go to the drafter, events come back; session, pipeline, context and worker pass them on
unchanged. Both name a *branch*: the number of the chain that is being drafted. Every rollback or
recovery starts a new branch, so that what was drafted before the drafter heard of it can be told
from what was drafted after.
"""

from dataclasses import dataclass

from picospec.protocol.messages import Rejection

# Commands


@dataclass(frozen=True, slots=True)
class Allow:
    """Tokens may be drafted for positions below `limit`; a drafter that has paused goes on."""

    limit: int


@dataclass(frozen=True, slots=True)
class Rollback:
    """Truncate to `length` tokens, append the committed `token_ids`, go on as `branch`."""

    branch: int
    length: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Recover:
    """Truncate to `position` and draw its recovered token from `rejection`; go on as `branch`.

    `attempt` numbers the tail sample it carries, from 0; `judged` says whether a draft was
    rejected there (it was drawn from Q) or none was proposed (Q = 0). Answered by Recovered or
    ProbeNeeded.
    """

    branch: int
    position: int
    rejection: Rejection
    attempt: int
    judged: bool


DrafterCommand = Allow | Rollback | Recover


# Events


@dataclass(frozen=True, slots=True)
class Drafted:
    """Draft tokens for `position` and after; `probs` has their q in split mode, else nothing."""

    branch: int
    position: int
    token_ids: tuple[int, ...]
    probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Nothing can be proposed for `position`, until a rollback or recovery changes the text."""

    branch: int
    position: int


@dataclass(frozen=True, slots=True)
class Paused:
    """The last draft is likely to be rejected: none follows before Allow, rollback or recovery."""

    branch: int
    position: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """The recovered token of `position`; drafting goes on after it."""

    branch: int
    position: int
    token_id: int


@dataclass(frozen=True, slots=True)
class ProbeNeeded:
    """The tail sample is used up: tail sample number `attempt` of `position` is wanted."""

    branch: int
    position: int
    attempt: int


DrafterEvent = Drafted | Exhausted | Paused | Recovered | ProbeNeeded
