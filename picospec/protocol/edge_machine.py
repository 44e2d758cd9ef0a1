"""How an edge's session may be set (policy) and how it may move (transitions). Pure data.

`edge_session.EdgeSession` moves by these tables; what is not in them is illegal.
"""

import enum
from dataclasses import dataclass

from picospec.protocol.messages import AssistPolicy, VerificationMode


@dataclass(frozen=True, slots=True)
class SpeculationPolicy:
    """How an edge speculates; the cloud's limits cap it."""

    mode: VerificationMode = VerificationMode.SPLIT
    draft_length: int = 4  # tokens per round
    window: int = 32  # most unverified tokens
    parallel_draft: bool = True  # off: draft a round, wait for its verdict (vanilla)
    fast_verify: bool = True  # off: whole rounds travel and are verified as one
    round_timeout_s: float = 0.0  # whole rounds: longest wait for one to fill; 0 = no limit
    confidence_stop: float = 0.0  # the drafter pauses below this confidence; 0 = never
    split_rejection: bool = True  # split: off sends all of P with a rejection
    exact: bool = True  # split: off truncates P to its Top-K
    sparse_k: int = 64  # split: most pairs in a rejection
    assist: AssistPolicy = AssistPolicy.NEVER  # when the cloud decodes alone
    resume_attempts: int = 5  # in a row without a token in between
    resume_timeout_s: float = 30.0  # from the loss of the link to the end of all attempts


class EdgeState(enum.Enum):
    NEW = "new"
    DRAFTING = "drafting"
    PROBING = "probing"  # the cloud draws a fresh tail sample for the recovered token
    # The same without a stream.
    OFFLINE = "offline"
    OFFLINE_PROBING = "offline, probing"
    FINISHED = "finished"


class EventKind(enum.Enum):
    """Events as far as they move the state; a Verdict's kind depends on what it carries."""

    START = "start"
    DRAFTED = "drafted"
    EXHAUSTED = "exhausted"
    PAUSED = "paused"
    OPENED = "opened"
    VERDICT = "verdict"
    REJECTION = "verdict with a rejection"
    UNRESOLVED = "verdict with a rejection whose tail sample is used up"
    FINISH = "the last token"
    LINK_LOST = "link lost"
    RESUME = "resume"
    CANCEL = "cancel"


FROM_CLOUD = frozenset(
    {
        EventKind.OPENED,
        EventKind.VERDICT,
        EventKind.REJECTION,
        EventKind.UNRESOLVED,
        EventKind.FINISH,
    }
)
ONLINE = frozenset({EdgeState.DRAFTING, EdgeState.PROBING})
WITH_CHAIN = frozenset({EdgeState.DRAFTING, EdgeState.OFFLINE, EdgeState.FINISHED})
PROBED = frozenset({EdgeState.PROBING, EdgeState.OFFLINE_PROBING})

_S, _E = EdgeState, EventKind
TRANSITIONS: dict[tuple[EdgeState, EventKind], EdgeState] = {
    (_S.NEW, _E.START): _S.DRAFTING,
    (_S.DRAFTING, _E.DRAFTED): _S.DRAFTING,
    (_S.DRAFTING, _E.EXHAUSTED): _S.DRAFTING,
    (_S.DRAFTING, _E.PAUSED): _S.DRAFTING,
    (_S.DRAFTING, _E.OPENED): _S.DRAFTING,
    (_S.DRAFTING, _E.VERDICT): _S.DRAFTING,
    (_S.DRAFTING, _E.REJECTION): _S.DRAFTING,
    (_S.DRAFTING, _E.UNRESOLVED): _S.PROBING,
    (_S.DRAFTING, _E.FINISH): _S.FINISHED,
    (_S.DRAFTING, _E.LINK_LOST): _S.OFFLINE,
    (_S.PROBING, _E.OPENED): _S.PROBING,
    (_S.PROBING, _E.REJECTION): _S.DRAFTING,
    (_S.PROBING, _E.UNRESOLVED): _S.PROBING,
    (_S.PROBING, _E.FINISH): _S.FINISHED,
    (_S.PROBING, _E.LINK_LOST): _S.OFFLINE_PROBING,
    (_S.OFFLINE, _E.DRAFTED): _S.OFFLINE,
    (_S.OFFLINE, _E.EXHAUSTED): _S.OFFLINE,
    (_S.OFFLINE, _E.PAUSED): _S.OFFLINE,
    (_S.OFFLINE, _E.LINK_LOST): _S.OFFLINE,
    (_S.OFFLINE, _E.RESUME): _S.DRAFTING,
    (_S.OFFLINE_PROBING, _E.LINK_LOST): _S.OFFLINE_PROBING,
    (_S.OFFLINE_PROBING, _E.RESUME): _S.PROBING,
    **{(state, _E.CANCEL): _S.FINISHED for state in EdgeState},
    # The cloud and the drafter may speak on while they are told.
    **{(_S.FINISHED, event): _S.FINISHED for event in EventKind},
}
