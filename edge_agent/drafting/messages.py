"""What passes between the edge's event loop and its drafting worker, as frozen values.

Commands go to the worker, events come back. Both name a *branch*: the number of the chain a
context is drafting. Every rollback or recovery starts a new branch, so that whatever was
drafted before the worker heard of it can be told from what was drafted after.
"""

from __future__ import annotations

from dataclasses import dataclass

from picospec.errors import DrafterFailed
from picospec.protocol.messages import Rejection, SamplingParams, TokenArray, VerificationMode


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """Which drafter to load, and what it may use of the machine."""

    backend: str  # a key of drafter.BACKENDS
    model: str  # folder
    threads: int = 1
    cpu: int | None = None  # pins the worker to this core


@dataclass(frozen=True, slots=True, eq=False)
class ContextSpec:
    """One text to draft for.

    `max_length` bounds prompt and output together: runtimes reserve their cache by it.
    `logits_width` is the target's: drafted tokens are below it. 0 leaves either to the drafter.
    """

    request_id: str
    token_ids: TokenArray  # [num_tokens] prompt and committed output, at least one
    sampling: SamplingParams
    mode: VerificationMode
    stop_token_ids: tuple[int, ...]
    prompt_length: int
    max_length: int = 0
    logits_width: int = 0
    confidence_stop: float = 0.0  # pause after a draft from a law less confident than this


# Commands


@dataclass(frozen=True, slots=True, eq=False)
class OpenContext:
    """Begins a context, or rebuilds one after the worker died (branch, limit, blocked)."""

    spec: ContextSpec
    num_committed: int  # of spec.token_ids; the rest are drafts of `branch`
    branch: int = 0
    limit: int = 0
    blocked: bool = False


@dataclass(frozen=True, slots=True)
class Allow:
    """Tokens may be drafted for positions below `limit`; a paused context goes on."""

    limit: int


@dataclass(frozen=True, slots=True)
class Rollback:
    """Truncate to `length` tokens, append the committed `token_ids`, go on as `branch`."""

    branch: int
    length: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Recover:
    """Truncate to `position` and draw its recovered token from `rejection` (rejection.py).

    `attempt` numbers the tail sample it carries, from 0; `judged` says whether a draft was
    rejected there (its law is Q) or none was proposed (Q = 0). Goes on as `branch`.
    """

    branch: int
    position: int
    rejection: Rejection
    attempt: int
    judged: bool


@dataclass(frozen=True, slots=True)
class CloseContext:
    """Free the context; no event follows."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by Pong between two turns: the worker is not hung."""


Command = OpenContext | Allow | Rollback | Recover | CloseContext | Ping


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


@dataclass(frozen=True, slots=True)
class ContextFailed:
    """The context is lost: the backend refused it, or the worker died too often."""

    error: DrafterFailed


DraftEvent = Drafted | Exhausted | Paused | Recovered | ProbeNeeded | ContextFailed


# The worker's own reports


@dataclass(frozen=True, slots=True)
class Pong:
    """The worker has finished the turn in which Ping reached it."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The drafter is loaded. `logits_width` 0 means that it proposes ids of any width."""

    logits_width: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The drafter could not be loaded; the worker exits."""

    message: str
