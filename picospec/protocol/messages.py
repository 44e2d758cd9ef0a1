"""What passes between the edge and the cloud, as frozen values.

These are nouns without behaviour; `codec` turns them into protobuf and back, the sessions
say when each may be sent. Token ids and positions are plain ints, short arrays are tuples, and
arrays that may be long are read-only numpy arrays (int32 token ids, float32 probabilities).
"""

import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from picospec import PROTOCOL_VERSION

TokenArray = NDArray[np.int32]  # [num_tokens]
ProbArray = NDArray[np.float32]  # [num_tokens]


class VerificationMode(enum.Enum):
    """How drafts are judged (docs/protocol.md)."""

    SPLIT = "split"
    COUPLED = "coupled"


class AssistPolicy(enum.Enum):
    """When the cloud decodes a token by itself because a session has no drafts."""

    NEVER = "never"
    IDLE = "idle"  # in steps that no other session needs
    ALWAYS = "always"
    AUTO = "auto"  # unless waiting for a draft brings more tokens per second


class FinishReason(enum.Enum):
    """Why a generation ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The law that output tokens follow. Immutable; bounds are checked by `validation`.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; repetition_penalty 1 is off.
    `seed` (64 bits, unsigned) determines every random choice of both sides.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cloud accepts from one session."""

    max_draft_tokens: int = 16
    max_window: int = 64
    max_sparse_k: int = 1024
    max_stop_token_ids: int = 64
    max_logit_bias: int = 1024


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The served model, as an edge must know it before it opens a generation."""

    model_id: str
    logits_width: int
    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    modes: tuple[VerificationMode, ...]
    limits: Limits
    protocol_version: int


@dataclass(frozen=True, slots=True, eq=False)
class Open:
    """The first frame of a generation: the whole truth a replica needs to serve it."""

    session_id: str
    prompt_token_ids: TokenArray
    output_token_ids: TokenArray
    sampling: SamplingParams
    mode: VerificationMode
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    exact: bool = True
    sparse_k: int = 64
    assist: AssistPolicy = AssistPolicy.NEVER
    verify_whole_rounds: bool = False
    probe: int = 0
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed for the positions from `base_position` on; without any, a probe."""

    epoch: int
    base_position: int
    token_ids: tuple[int, ...] = ()
    draft_probs: tuple[float, ...] = ()  # split: one for each unforced token
    num_forced: int = 0
    end_of_round: bool = False
    probe: int = 0
    # Most drafts judged by one forward from now on, 0: as before. How, not what: not compared.
    step_limit: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Finish:
    """The edge has all it wants (a stop string, say); the cloud drops the session."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The prompt is in the KV cache; what the cloud accepted."""

    first_position: int
    cached_prompt_tokens: int
    max_draft_tokens: int
    window: int
    sparse_k: int


@dataclass(frozen=True, slots=True, eq=False)
class Rejection:
    """P at the rejected position: its Top-K set S, the tail's mass, one draw from the tail."""

    token_ids: TokenArray  # [k] most probable first, or all in order of the ids
    probs: ProbArray  # [k]
    tail_mass: float = 0.0
    tail_token_id: int = 0
    tail_prob: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one verification step decided for one session.

    Positions `position .. position + num_accepted - 1` hold accepted drafts of `epoch`;
    `token_ids` follow them (the cloud's own: recovered, bonus or decoded alone). With a
    `rejection` the position after the accepted drafts awaits the edge's recovered token.
    """

    epoch: int
    position: int
    num_accepted: int = 0
    token_ids: tuple[int, ...] = ()
    rejection: Rejection | None = None
    finish_reason: FinishReason | None = None
    num_draft_tokens: int = 0
    queue_us: int = 0
    compute_us: int = 0
    num_forwards: int = 0  # of the target since the last verdict
    batch_size: int = 0  # sessions that the step forwarded
    draft_budget: int = 0  # most drafts of this session that pay in one step now


EdgeFrame = Open | Draft | Finish
CloudFrame = Opened | Verdict

EMPTY_TOKENS: TokenArray = np.empty(0, np.int32)
EMPTY_TOKENS.flags.writeable = False
