"""What passes between the edge's event loop and its drafting worker, as frozen values.

Commands go to the worker, events come back. Those of the session (`picospec.protocol.drafting`)
pass unchanged; here is what opens and closes a context, and what the worker says of itself.
"""

from dataclasses import dataclass

from picospec.errors import DrafterFailed
from picospec.protocol.drafting import DrafterCommand, DrafterEvent
from picospec.protocol.messages import SamplingParams, TokenArray, VerificationMode


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """Which drafter to load, and what it may use of the machine."""

    backend: str  # a key of drafter.BACKENDS
    model: str  # folder
    threads: int = 1
    cpu: int | None = None  # pins the worker to this core
    cache_bytes: int = 0  # most for KV caches; 0: a share of the machine's memory


@dataclass(frozen=True, slots=True, eq=False)
class ContextSpec:
    """One text to draft for.

    `max_length` bounds prompt and output together.
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
    confidence_stop: float = 0.0  # pause after a draft whose distribution is less sure than this


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
class CloseContext:
    """Free the context; no event follows."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by Pong between two turns: the worker is not hung."""


Command = OpenContext | DrafterCommand | CloseContext | Ping


# Events


@dataclass(frozen=True, slots=True)
class ContextFailed:
    """The context is lost: the backend refused it, or the worker died too often."""

    error: DrafterFailed


DraftEvent = DrafterEvent | ContextFailed


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
