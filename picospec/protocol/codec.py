"""Messages to protobuf and back: the only importer of the generated messages.

Frames of the edge are coded in the context of their stream, by an `EdgeEncoder` and an
`EdgeDecoder`; everything else stands alone. Decoding checks the shape of what arrived (lengths of
packed arrays, enum values, a frame that is not there) and raises RemoteProtocolError with the
field; whether the values make sense is `validation`'s business. Long arrays are mapped with
np.frombuffer, without a copy.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from picospec.errors import RemoteProtocolError
from picospec.protocol.messages import (
    AssistPolicy,
    CloudFrame,
    Draft,
    EdgeFrame,
    Finish,
    FinishReason,
    Limits,
    ModelCard,
    Open,
    Opened,
    ProbArray,
    Rejection,
    SamplingParams,
    TokenArray,
    Verdict,
    VerificationMode,
)
from picospec.v1 import speculation_pb2 as pb

# Ids travel as uint32 and are read as int32: the same bits for every id below 2**31, and a
# negative number, which validation refuses, for the others.
_WIRE_TOKEN = np.dtype("<i4")
_WIRE_PROB = np.dtype("<f4")
_NARROW_TOKEN = np.dtype("<u2")

_MODES = {
    pb.VERIFICATION_MODE_SPLIT: VerificationMode.SPLIT,
    pb.VERIFICATION_MODE_COUPLED: VerificationMode.COUPLED,
}
_ASSIST = {
    pb.ASSIST_POLICY_UNSPECIFIED: AssistPolicy.NEVER,
    pb.ASSIST_POLICY_NEVER: AssistPolicy.NEVER,
    pb.ASSIST_POLICY_IDLE: AssistPolicy.IDLE,
    pb.ASSIST_POLICY_ALWAYS: AssistPolicy.ALWAYS,
    pb.ASSIST_POLICY_AUTO: AssistPolicy.AUTO,
}
_FINISH: dict[pb.FinishReason, FinishReason | None] = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_WIRE_MODE = {mode: number for number, mode in _MODES.items()}
_WIRE_ASSIST = {policy: number for number, policy in _ASSIST.items()}
_WIRE_FINISH = {reason: number for number, reason in _FINISH.items()}


def _alike(frame_type: type[Any], *, but: Collection[str] = ()) -> tuple[str, ...]:
    """The fields that a frame and its message have in common, by name and by form."""
    return tuple(field.name for field in fields(frame_type) if field.name not in but)


_OPENED, _LIMITS = _alike(Opened), _alike(Limits)
_SAMPLING = _alike(SamplingParams, but={"logit_bias"})
_CARD = _alike(ModelCard, but={"eos_token_ids", "modes", "limits"})
_OPEN = _alike(
    Open,
    but={"prompt_token_ids", "output_token_ids", "sampling", "mode", "stop_token_ids", "assist"},
)

Known = TypeVar("Known")
AnyMessage = TypeVar("AnyMessage", bound=Message)


class EdgeEncoder:
    """Frames of one stream, in their order, to messages.

    A Draft that goes on where the last one ended travels without its epoch and its position.
    """

    def __init__(self) -> None:
        self._next: _Place | None = None

    def encode(self, frame: EdgeFrame) -> pb.GenerateRequest:
        """The message for `frame`, the stream's next."""
        match frame:
            case Draft():
                draft = pb.Draft(
                    token_ids=frame.token_ids,
                    draft_probs=frame.draft_probs,
                    num_forced=frame.num_forced,
                    end_of_round=frame.end_of_round,
                    probe=frame.probe,
                    step_limit=frame.step_limit,
                )
                if (frame.epoch, frame.base_position) != self._next:
                    draft.epoch, draft.base_position = frame.epoch, frame.base_position
                self._next = _place_after(frame)
                return pb.GenerateRequest(draft=draft)
            case Open():
                return pb.GenerateRequest(open=_encode_open(frame))
            case Finish():
                return pb.GenerateRequest(finish=pb.Finish())

    def to_bytes(self, frame: EdgeFrame) -> bytes:
        """The payload of the message for `frame`, the stream's next."""
        payload: bytes = self.encode(frame).SerializeToString()
        return payload


class EdgeDecoder:
    """The inverse of an EdgeEncoder: messages of one stream, in their order, to frames."""

    def __init__(self) -> None:
        self._next: _Place | None = None

    def decode(self, message: pb.GenerateRequest) -> EdgeFrame:
        """The frame in `message`. Raises RemoteProtocolError naming the malformed field."""
        match message.WhichOneof("frame"):
            case "draft":
                frame = self._draft(message.draft)
                self._next = _place_after(frame)
                return frame
            case "open":
                return _decode_open(message.open)
            case "finish":
                return Finish()
            case _:
                raise RemoteProtocolError("The message holds no frame that is known here", "frame")

    def _draft(self, draft: pb.Draft) -> Draft:
        epoch, position = draft.epoch, draft.base_position
        if not position:
            if self._next is None:
                raise RemoteProtocolError(
                    "The stream's first draft must say where it begins", "draft.base_position"
                )
            if epoch:
                raise RemoteProtocolError(
                    "A draft that names its epoch must say where it begins", "draft.base_position"
                )
            epoch, position = self._next
        return Draft(
            epoch=epoch,
            base_position=position,
            token_ids=tuple(draft.token_ids),
            draft_probs=tuple(draft.draft_probs),
            num_forced=draft.num_forced,
            end_of_round=draft.end_of_round,
            probe=draft.probe,
            step_limit=draft.step_limit,
        )


_Place = tuple[int, int]  # epoch and position


def _place_after(draft: Draft) -> _Place:
    """Where a Draft begins that goes on where `draft` ends."""
    return draft.epoch, draft.base_position + len(draft.token_ids)


def encode_cloud(frame: CloudFrame) -> pb.GenerateResponse:
    """The message for `frame`."""
    match frame:
        case Verdict():
            return pb.GenerateResponse(
                verdict=pb.Verdict(
                    epoch=frame.epoch,
                    position=frame.position,
                    num_accepted=frame.num_accepted,
                    token_ids=frame.token_ids,
                    rejection=(
                        None if frame.rejection is None else _encode_rejection(frame.rejection)
                    ),
                    finish_reason=_WIRE_FINISH[frame.finish_reason],
                    num_draft_tokens=frame.num_draft_tokens,
                    queue_us=frame.queue_us,
                    compute_us=frame.compute_us,
                    num_forwards=frame.num_forwards,
                    batch_size=frame.batch_size,
                    draft_budget=frame.draft_budget,
                )
            )
        case Opened():
            return pb.GenerateResponse(opened=pb.Opened(**_copied(frame, _OPENED)))


def decode_cloud(message: pb.GenerateResponse) -> CloudFrame:
    """The frame in `message`. Raises RemoteProtocolError naming the malformed field."""
    match message.WhichOneof("frame"):
        case "verdict":
            verdict = message.verdict
            return Verdict(
                epoch=verdict.epoch,
                position=verdict.position,
                num_accepted=verdict.num_accepted,
                token_ids=tuple(verdict.token_ids),
                rejection=(
                    _decode_rejection(verdict.rejection) if verdict.HasField("rejection") else None
                ),
                finish_reason=_known(_FINISH, verdict.finish_reason, "verdict.finish_reason"),
                num_draft_tokens=verdict.num_draft_tokens,
                queue_us=verdict.queue_us,
                compute_us=verdict.compute_us,
                num_forwards=verdict.num_forwards,
                batch_size=verdict.batch_size,
                draft_budget=verdict.draft_budget,
            )
        case "opened":
            return Opened(**_copied(message.opened, _OPENED))
        case _:
            raise RemoteProtocolError("The message holds no frame that is known here", "frame")


def encode_model(card: ModelCard) -> pb.GetModelResponse:
    """The message for `card`."""
    return pb.GetModelResponse(
        **_copied(card, _CARD),
        eos_token_ids=card.eos_token_ids,
        modes=[_WIRE_MODE[mode] for mode in card.modes],
        limits=pb.Limits(**_copied(card.limits, _LIMITS)),
    )


def decode_model(message: pb.GetModelResponse) -> ModelCard:
    """The model card in `message`; modes that this version does not know are left out."""
    return ModelCard(
        **_copied(message, _CARD),
        eos_token_ids=tuple(message.eos_token_ids),
        modes=tuple(_MODES[mode] for mode in message.modes if mode in _MODES),
        limits=Limits(**_copied(message.limits, _LIMITS)),
    )


def model_request(protocol_version: int) -> pb.GetModelRequest:
    """The question that `encode_model` answers."""
    return pb.GetModelRequest(protocol_version=protocol_version)


# The edge's link carries bytes, so that it knows their number and no message class.

GENERATE_METHOD = "/picospec.v1.SpeculationService/Generate"
GET_MODEL_METHOD = "/picospec.v1.SpeculationService/GetModel"


def cloud_from_bytes(payload: bytes) -> CloudFrame:
    """The frame in a GenerateResponse's payload. Raises RemoteProtocolError."""
    return decode_cloud(_parsed(pb.GenerateResponse, payload))


def model_request_to_bytes(protocol_version: int) -> bytes:
    """The payload of a GetModelRequest."""
    payload: bytes = model_request(protocol_version).SerializeToString()
    return payload


def model_from_bytes(payload: bytes) -> ModelCard:
    """The card in a GetModelResponse's payload. Raises RemoteProtocolError."""
    return decode_model(_parsed(pb.GetModelResponse, payload))


def _parsed(message_type: type[AnyMessage], payload: bytes) -> AnyMessage:
    try:
        message: AnyMessage = message_type.FromString(payload)
    except DecodeError as error:
        raise RemoteProtocolError("The payload is no such message", "frame") from error
    return message


def _copied(source: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def _encode_open(frame: Open) -> pb.Open:
    sampling = frame.sampling
    return pb.Open(
        **_copied(frame, _OPEN),
        prompt_token_ids=_token_bytes(frame.prompt_token_ids),
        output_token_ids=_token_bytes(frame.output_token_ids),
        sampling=pb.SamplingParams(
            **_copied(sampling, _SAMPLING),
            logit_bias_token_ids=[token_id for token_id, _ in sampling.logit_bias],
            logit_bias_values=[bias for _, bias in sampling.logit_bias],
        ),
        mode=_WIRE_MODE[frame.mode],
        stop_token_ids=frame.stop_token_ids,
        assist=_WIRE_ASSIST[frame.assist],
    )


def _decode_open(message: pb.Open) -> Open:
    if not message.HasField("sampling"):
        raise RemoteProtocolError("The sampling parameters are missing", "open.sampling")
    sampling = message.sampling
    if len(sampling.logit_bias_token_ids) != len(sampling.logit_bias_values):
        raise RemoteProtocolError(
            f"{len(sampling.logit_bias_values)} biases for "
            f"{len(sampling.logit_bias_token_ids)} token ids",
            "open.sampling.logit_bias_values",
        )
    bias = zip(sampling.logit_bias_token_ids, sampling.logit_bias_values, strict=True)
    return Open(
        **_copied(message, _OPEN),
        prompt_token_ids=_tokens(message.prompt_token_ids, "open.prompt_token_ids"),
        output_token_ids=_tokens(message.output_token_ids, "open.output_token_ids"),
        sampling=SamplingParams(**_copied(sampling, _SAMPLING), logit_bias=tuple(bias)),
        mode=_known(_MODES, message.mode, "open.mode"),
        stop_token_ids=tuple(message.stop_token_ids),
        assist=_known(_ASSIST, message.assist, "open.assist"),
    )


def _encode_rejection(rejection: Rejection) -> pb.Rejection:
    return pb.Rejection(
        token_ids=_law_token_bytes(rejection.token_ids),
        probs=np.asarray(rejection.probs, _WIRE_PROB).tobytes(),
        tail_mass=rejection.tail_mass,
        tail_token_id=rejection.tail_token_id,
        tail_prob=rejection.tail_prob,
    )


def _decode_rejection(message: pb.Rejection) -> Rejection:
    probs = _floats(message.probs, "verdict.rejection.probs")
    return Rejection(
        token_ids=_law_tokens(message.token_ids, len(probs), "verdict.rejection.token_ids"),
        probs=probs,
        tail_mass=message.tail_mass,
        tail_token_id=message.tail_token_id,
        tail_prob=message.tail_prob,
    )


def _law_token_bytes(token_ids: TokenArray) -> bytes:
    """The ids of a law as briefly as they can be packed; none for 0, 1, 2 ..."""
    size = len(token_ids)
    if token_ids[-1] == size - 1 and (token_ids == np.arange(size)).all():
        return b""
    narrow = int(token_ids.max()) <= np.iinfo(_NARROW_TOKEN).max
    return token_ids.astype(_NARROW_TOKEN if narrow else _WIRE_TOKEN, copy=False).tobytes()


def _law_tokens(data: bytes, size: int, field: str) -> TokenArray:
    if not data:
        return np.arange(size, dtype=np.int32)
    if len(data) == size * _NARROW_TOKEN.itemsize:
        return np.frombuffer(data, _NARROW_TOKEN).astype(np.int32)
    return _tokens(data, field)


def _token_bytes(token_ids: TokenArray) -> bytes:
    return np.asarray(token_ids, _WIRE_TOKEN).tobytes()


def _tokens(data: bytes, field: str) -> TokenArray:
    return np.frombuffer(_whole(data, field), _WIRE_TOKEN)


def _floats(data: bytes, field: str) -> ProbArray:
    return np.frombuffer(_whole(data, field), _WIRE_PROB)


def _whole(data: bytes, field: str) -> bytes:
    if len(data) % 4:
        raise RemoteProtocolError(f"{len(data)} bytes are not a whole number of elements", field)
    return data


def _known(values: Mapping[Any, Known], number: int, field: str) -> Known:
    if number not in values:
        raise RemoteProtocolError(f"{number} is not a value known here", field)
    return values[number]
