"""Frames survive the wire; malformed messages are refused with the field at fault."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picospec.errors import RemoteProtocolError
from picospec.protocol import codec
from picospec.protocol.messages import (
    AssistPolicy,
    Draft,
    Finish,
    FinishReason,
    Limits,
    Open,
    Rejection,
    SamplingParams,
    Verdict,
    VerificationMode,
)
from picospec.v1 import speculation_pb2 as pb
from tests.support.builders import make_card, make_opened

OPEN = Open(
    session_id="chat-1",
    prompt_token_ids=np.array([1, 2**31 - 1], np.int32),
    output_token_ids=np.array([7], np.int32),
    sampling=SamplingParams(
        temperature=0.5, top_p=0.75, top_k=40, seed=2**64 - 1, logit_bias=((3, -1.5),)
    ),
    mode=VerificationMode.COUPLED,
    max_tokens=12,
    stop_token_ids=(2, 5),
    exact=False,
    sparse_k=9,
    assist=AssistPolicy.IDLE,
    verify_whole_rounds=True,
    probe=3,
)
REJECTION = Rejection(
    token_ids=np.array([4, 2], np.int32),
    probs=np.array([0.5, 0.25], np.float32),
    tail_mass=0.25,
    tail_token_id=9,
    tail_prob=0.125,
)
# Its ids are 0, 1, 2 ... and do not travel.
WHOLE_LAW = Rejection(np.arange(5, dtype=np.int32), np.array([0, 0.5, 0, 0.25, 0.25], np.float32))


def plain(value: Any) -> Any:
    """Dataclasses as dicts and arrays as lists, so that they can be compared."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value.tolist() if isinstance(value, np.ndarray) else value


def edge_over_the_wire(frame: Any) -> Any:
    return codec.EdgeDecoder().decode(
        pb.GenerateRequest.FromString(codec.EdgeEncoder().encode(frame).SerializeToString())
    )


def cloud_over_the_wire(frame: Any) -> Any:
    return codec.decode_cloud(
        pb.GenerateResponse.FromString(codec.encode_cloud(frame).SerializeToString())
    )


def test_open_survives_the_wire() -> None:
    assert plain(edge_over_the_wire(OPEN)) == plain(OPEN)


@given(
    st.builds(
        Draft,
        epoch=st.integers(0, 2**32 - 1),
        base_position=st.integers(1, 2**32 - 1),
        token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=20).map(tuple),
        draft_probs=st.lists(st.floats(0, 1, width=32), max_size=20).map(tuple),
        num_forced=st.integers(0, 1),
        end_of_round=st.booleans(),
        probe=st.integers(0, 2**32 - 1),
    )
)
def test_drafts_survive_the_wire(draft: Draft) -> None:
    assert edge_over_the_wire(draft) == draft


@pytest.mark.parametrize("reason", [None, *FinishReason])
@pytest.mark.parametrize("rejection", [None, REJECTION, WHOLE_LAW])
def test_verdicts_survive_the_wire(
    reason: FinishReason | None, rejection: Rejection | None
) -> None:
    verdict = Verdict(
        2,
        30,
        num_accepted=3,
        token_ids=(1, 8),
        rejection=rejection,
        finish_reason=reason,
        num_draft_tokens=4,
        queue_us=120,
        compute_us=45_000,
        num_forwards=2,
    )
    assert plain(cloud_over_the_wire(verdict)) == plain(verdict)


def test_a_step_limit_survives_the_wire() -> None:
    draft = edge_over_the_wire(Draft(1, 9, token_ids=(3,), draft_probs=(0.5,), step_limit=7))
    assert isinstance(draft, Draft)
    assert draft.step_limit == 7  # which does not take part in the comparison


def test_frames_that_go_on_do_not_say_where() -> None:
    frames = (
        Draft(3, 9, token_ids=(4,), num_forced=1),
        Draft(3, 10, token_ids=(5, 6), draft_probs=(0.5, 0.25)),
        Draft(3, 12, probe=1),
        Draft(3, 12, token_ids=(7,), draft_probs=(0.5,)),
        Draft(3, 10, token_ids=(5,), draft_probs=(0.5,)),  # again
        Draft(4, 11, token_ids=(8,), draft_probs=(0.5,)),
    )
    encoder, decoder = codec.EdgeEncoder(), codec.EdgeDecoder()
    messages = [encoder.encode(frame) for frame in frames]
    assert [bool(each.draft.base_position) for each in messages] == [True, *[False] * 3, True, True]
    assert tuple(decoder.decode(each) for each in messages) == frames


def test_frames_are_dropped_unmissed_before_one_of_a_new_epoch() -> None:
    encoder, decoder = codec.EdgeEncoder(), codec.EdgeDecoder()
    first = encoder.encode(Draft(0, 9, token_ids=(4,)))
    encoder.encode(Draft(0, 10, token_ids=(5,)))
    newer = Draft(1, 10, token_ids=(6,))
    decoder.decode(first)
    assert decoder.decode(encoder.encode(newer)) == newer


def test_a_frame_that_goes_on_has_no_epoch() -> None:
    decoder = codec.EdgeDecoder()
    decoder.decode(pb.GenerateRequest(draft=pb.Draft(epoch=1, base_position=5, token_ids=[5])))
    with pytest.raises(RemoteProtocolError) as caught:
        decoder.decode(pb.GenerateRequest(draft=pb.Draft(epoch=1, token_ids=[5])))
    assert caught.value.field == "draft.base_position"


def test_a_round_and_a_rejection_are_as_small_as_the_papers() -> None:
    """At most 50 B for 4 drafts with their q, 100 B for the 10 most probable tokens; the drafts
    in one frame, or in one each, the first of them behind a recovered token."""
    ids, probs = (49_151, 40_000, 20_000, 1), (0.1, 0.2, 0.3, 0.4)
    draft = Draft(200, 3000, token_ids=ids, draft_probs=probs, end_of_round=True)
    assert len(codec.EdgeEncoder().to_bytes(draft)) <= 50
    encoder = codec.EdgeEncoder()
    encoder.encode(Draft(200, 2999, token_ids=(40_000,), num_forced=1))
    singles = [
        Draft(200, 3000 + index, token_ids=(token_id,), draft_probs=(prob,))
        for index, (token_id, prob) in enumerate(zip(ids, probs, strict=True))
    ]
    assert sum(len(encoder.to_bytes(single)) for single in singles) <= 50
    top = np.arange(49_142, 49_152, dtype=np.int32)
    rejection = Rejection(
        top, np.full(10, 0.09, np.float32), tail_mass=0.1, tail_token_id=49_000, tail_prob=0.01
    )
    message = codec.encode_cloud(Verdict(200, 3000, rejection=rejection))
    assert message.verdict.rejection.ByteSize() <= 100


@pytest.mark.parametrize("largest", [1, 65_535, 65_536, 2**31 - 1])
def test_a_laws_ids_survive_the_wire_whatever_their_width(largest: int) -> None:
    rejection = Rejection(np.array([largest, 0], np.int32), np.array([0.5, 0.5], np.float32))
    verdict = Verdict(0, 3, rejection=rejection)
    assert plain(cloud_over_the_wire(verdict)) == plain(verdict)


def test_ids_beyond_31_bits_arrive_as_negative_ones() -> None:
    message = pb.Rejection(token_ids=b"\xff" * 4, probs=np.ones(1, "<f4").tobytes())
    verdict = codec.decode_cloud(pb.GenerateResponse(verdict=pb.Verdict(rejection=message)))
    assert isinstance(verdict, Verdict)
    assert verdict.rejection is not None
    assert verdict.rejection.token_ids.tolist() == [-1]


def test_the_other_frames_survive_the_wire() -> None:
    assert edge_over_the_wire(Finish()) == Finish()
    opened = make_opened(first_position=10, cached_prompt_tokens=8, sparse_k=32)
    assert cloud_over_the_wire(opened) == opened


def test_a_model_card_survives_the_wire_and_unknown_modes_are_left_out() -> None:
    card = make_card(
        logits_width=100,
        chat_template_fingerprint="c",
        eos_token_ids=(2,),
        max_model_len=512,
        modes=tuple(VerificationMode),
        limits=Limits(
            max_draft_tokens=8,
            max_window=16,
            max_sparse_k=4,
            max_stop_token_ids=2,
            max_logit_bias=1,
        ),
    )
    message = codec.encode_model(card)
    assert codec.decode_model(message) == card
    message.modes.append(77)
    assert codec.decode_model(message) == card


def test_payloads_that_are_no_messages_are_refused() -> None:
    frame = Draft(1, 5, token_ids=(2, 3), draft_probs=(0.5, 0.25))
    payload = codec.EdgeEncoder().to_bytes(frame)
    assert codec.EdgeDecoder().decode(pb.GenerateRequest.FromString(payload)) == frame
    with pytest.raises(RemoteProtocolError):
        codec.cloud_from_bytes(b"\xff\xff")
    with pytest.raises(RemoteProtocolError):
        codec.model_from_bytes(b"\x0a")


def test_arrays_are_mapped_without_a_copy_and_read_only() -> None:
    message = codec.EdgeEncoder().encode(OPEN)
    decoded = codec.EdgeDecoder().decode(message)
    assert isinstance(decoded, Open)
    assert not decoded.prompt_token_ids.flags.writeable
    assert not decoded.prompt_token_ids.flags.owndata
    assert decoded.prompt_token_ids.dtype == np.int32


def _open_message(**changes: Any) -> pb.GenerateRequest:
    message = codec.EdgeEncoder().encode(OPEN)
    for name, value in changes.items():
        setattr(message.open, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(), "frame"),
        (_open_message(prompt_token_ids=b"12345"), "open.prompt_token_ids"),
        (_open_message(output_token_ids=b"1"), "open.output_token_ids"),
        (_open_message(mode=0), "open.mode"),
        (_open_message(mode=9), "open.mode"),
        (_open_message(assist=9), "open.assist"),
        (pb.GenerateRequest(open=pb.Open(mode=pb.VERIFICATION_MODE_SPLIT)), "open.sampling"),
        (pb.GenerateRequest(draft=pb.Draft(token_ids=[5])), "draft.base_position"),
    ],
)
def test_malformed_edge_frames_are_refused(message: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        codec.EdgeDecoder().decode(message)
    assert caught.value.field == field


def test_biases_must_match_their_token_ids() -> None:
    message = codec.EdgeEncoder().encode(OPEN)
    message.open.sampling.logit_bias_values.append(1.0)
    with pytest.raises(RemoteProtocolError) as caught:
        codec.EdgeDecoder().decode(message)
    assert caught.value.field == "open.sampling.logit_bias_values"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateResponse(), "frame"),
        (
            pb.GenerateResponse(verdict=pb.Verdict(finish_reason=cast(pb.FinishReason, 9))),
            "verdict.finish_reason",
        ),
        (
            pb.GenerateResponse(verdict=pb.Verdict(rejection=pb.Rejection(probs=b"12345"))),
            "verdict.rejection.probs",
        ),
        (
            pb.GenerateResponse(
                verdict=pb.Verdict(rejection=pb.Rejection(probs=b"1234", token_ids=b"12345"))
            ),
            "verdict.rejection.token_ids",
        ),
    ],
)
def test_malformed_cloud_frames_are_refused(message: pb.GenerateResponse, field: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode_cloud(message)
    assert caught.value.field == field


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        message = pb.GenerateRequest.FromString(data)
    except Exception:
        return
    with contextlib.suppress(RemoteProtocolError):
        codec.EdgeDecoder().decode(message)
