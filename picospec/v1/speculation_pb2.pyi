from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VerificationMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERIFICATION_MODE_UNSPECIFIED: _ClassVar[VerificationMode]
    VERIFICATION_MODE_SPLIT: _ClassVar[VerificationMode]
    VERIFICATION_MODE_COUPLED: _ClassVar[VerificationMode]

class AssistPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ASSIST_POLICY_UNSPECIFIED: _ClassVar[AssistPolicy]
    ASSIST_POLICY_NEVER: _ClassVar[AssistPolicy]
    ASSIST_POLICY_IDLE: _ClassVar[AssistPolicy]
    ASSIST_POLICY_ALWAYS: _ClassVar[AssistPolicy]
    ASSIST_POLICY_AUTO: _ClassVar[AssistPolicy]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
VERIFICATION_MODE_UNSPECIFIED: VerificationMode
VERIFICATION_MODE_SPLIT: VerificationMode
VERIFICATION_MODE_COUPLED: VerificationMode
ASSIST_POLICY_UNSPECIFIED: AssistPolicy
ASSIST_POLICY_NEVER: AssistPolicy
ASSIST_POLICY_IDLE: AssistPolicy
ASSIST_POLICY_ALWAYS: AssistPolicy
ASSIST_POLICY_AUTO: AssistPolicy
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class GetModelRequest(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("protocol_version", "model_id", "logits_width", "tokenizer_fingerprint", "chat_template_fingerprint", "eos_token_ids", "max_model_len", "modes", "limits")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LOGITS_WIDTH_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_id: str
    logits_width: int
    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_model_len: int
    modes: _containers.RepeatedScalarFieldContainer[VerificationMode]
    limits: Limits
    def __init__(self, protocol_version: _Optional[int] = ..., model_id: _Optional[str] = ..., logits_width: _Optional[int] = ..., tokenizer_fingerprint: _Optional[str] = ..., chat_template_fingerprint: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., max_model_len: _Optional[int] = ..., modes: _Optional[_Iterable[_Union[VerificationMode, str]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_draft_tokens", "max_window", "max_sparse_k", "max_stop_token_ids", "max_logit_bias")
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_WINDOW_FIELD_NUMBER: _ClassVar[int]
    MAX_SPARSE_K_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    max_draft_tokens: int
    max_window: int
    max_sparse_k: int
    max_stop_token_ids: int
    max_logit_bias: int
    def __init__(self, max_draft_tokens: _Optional[int] = ..., max_window: _Optional[int] = ..., max_sparse_k: _Optional[int] = ..., max_stop_token_ids: _Optional[int] = ..., max_logit_bias: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias_token_ids", "logit_bias_values")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias_values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias_token_ids: _Optional[_Iterable[int]] = ..., logit_bias_values: _Optional[_Iterable[float]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol_version", "session_id", "prompt_token_ids", "output_token_ids", "sampling", "mode", "exact", "sparse_k", "max_tokens", "stop_token_ids", "assist", "verify_whole_rounds", "probe")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    SPARSE_K_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ASSIST_FIELD_NUMBER: _ClassVar[int]
    VERIFY_WHOLE_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    session_id: str
    prompt_token_ids: bytes
    output_token_ids: bytes
    sampling: SamplingParams
    mode: VerificationMode
    exact: bool
    sparse_k: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    assist: AssistPolicy
    verify_whole_rounds: bool
    probe: int
    def __init__(self, protocol_version: _Optional[int] = ..., session_id: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., output_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., mode: _Optional[_Union[VerificationMode, str]] = ..., exact: _Optional[bool] = ..., sparse_k: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., assist: _Optional[_Union[AssistPolicy, str]] = ..., verify_whole_rounds: _Optional[bool] = ..., probe: _Optional[int] = ...) -> None: ...

class Draft(_message.Message):
    __slots__ = ("epoch", "base_position", "token_ids", "draft_probs", "num_forced", "end_of_round", "probe", "step_limit")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BASE_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_PROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_FORCED_FIELD_NUMBER: _ClassVar[int]
    END_OF_ROUND_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    STEP_LIMIT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    base_position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    draft_probs: _containers.RepeatedScalarFieldContainer[float]
    num_forced: int
    end_of_round: bool
    probe: int
    step_limit: int
    def __init__(self, epoch: _Optional[int] = ..., base_position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., draft_probs: _Optional[_Iterable[float]] = ..., num_forced: _Optional[int] = ..., end_of_round: _Optional[bool] = ..., probe: _Optional[int] = ..., step_limit: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("open", "draft", "finish")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    open: Open
    draft: Draft
    finish: Finish
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., draft: _Optional[_Union[Draft, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("first_position", "cached_prompt_tokens", "max_draft_tokens", "window", "sparse_k")
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SPARSE_K_FIELD_NUMBER: _ClassVar[int]
    first_position: int
    cached_prompt_tokens: int
    max_draft_tokens: int
    window: int
    sparse_k: int
    def __init__(self, first_position: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., max_draft_tokens: _Optional[int] = ..., window: _Optional[int] = ..., sparse_k: _Optional[int] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("token_ids", "probs", "tail_mass", "tail_token_id", "tail_prob")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROBS_FIELD_NUMBER: _ClassVar[int]
    TAIL_MASS_FIELD_NUMBER: _ClassVar[int]
    TAIL_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TAIL_PROB_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    probs: bytes
    tail_mass: float
    tail_token_id: int
    tail_prob: float
    def __init__(self, token_ids: _Optional[bytes] = ..., probs: _Optional[bytes] = ..., tail_mass: _Optional[float] = ..., tail_token_id: _Optional[int] = ..., tail_prob: _Optional[float] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("epoch", "position", "num_accepted", "token_ids", "rejection", "finish_reason", "num_draft_tokens", "queue_us", "compute_us", "num_forwards", "batch_size", "draft_budget")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REJECTION_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    NUM_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_BUDGET_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    position: int
    num_accepted: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    rejection: Rejection
    finish_reason: FinishReason
    num_draft_tokens: int
    queue_us: int
    compute_us: int
    num_forwards: int
    batch_size: int
    draft_budget: int
    def __init__(self, epoch: _Optional[int] = ..., position: _Optional[int] = ..., num_accepted: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., rejection: _Optional[_Union[Rejection, _Mapping]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., num_draft_tokens: _Optional[int] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., num_forwards: _Optional[int] = ..., batch_size: _Optional[int] = ..., draft_budget: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("opened", "verdict")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    verdict: Verdict
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ...) -> None: ...
