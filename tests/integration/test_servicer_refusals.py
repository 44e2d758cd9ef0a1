"""What an edge must not send: the status and the field it gets, and that nobody else notices."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cloud_server.engine.scripted import ScriptedEngine
from picospec.protocol import codec
from picospec.protocol.messages import Draft
from picospec.v1 import speculation_pb2 as pb
from tests.support.builders import SAMPLED, SPLIT, make_open
from tests.support.cloud import Cloud, RawStream, running_cloud

FIRST = 4  # position of the second output token: where the first draft goes


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    async with running_cloud() as running:
        yield running


INVALID, ORDER = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
NAN, INF = float("nan"), float("inf")
BAD_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (NAN, INF, -0.1),
    "top_p": (NAN, 0.0, 1.1),
    "min_p": (NAN, -0.1, 1.1),
    "presence_penalty": (NAN, 2.1),
    "frequency_penalty": (NAN, -2.1),
    "repetition_penalty": (NAN, 0.0, INF),
    "logit_bias": (((64, 1.0),), ((1, NAN),), ((1, 101.0),)),
}
BAD_OPENS: list[tuple[dict[str, Any], str, str]] = [
    ({"protocol_version": 2}, ORDER, "open.protocol_version"),
    ({"session_id": ""}, INVALID, "open.session_id"),
    ({"session_id": "a\nforged log line"}, INVALID, "open.session_id"),
    ({"prompt_token_ids": np.empty(0, np.int32)}, INVALID, "open.prompt_token_ids"),
    ({"prompt_token_ids": np.array([64], np.int32)}, INVALID, "open.prompt_token_ids"),
    ({"prompt_token_ids": np.array([-1], np.int32)}, INVALID, "open.prompt_token_ids"),
    ({"prompt_token_ids": np.ones(512, np.int32)}, INVALID, "open.prompt_token_ids"),
    ({"output_token_ids": np.array([99], np.int32)}, INVALID, "open.output_token_ids"),
    ({"output_token_ids": np.ones(16, np.int32)}, INVALID, "open.output_token_ids"),
    ({"max_tokens": 0}, INVALID, "open.max_tokens"),
    ({"max_tokens": 510}, INVALID, "open.max_tokens"),
    ({"stop_token_ids": (64,)}, INVALID, "open.stop_token_ids"),
    ({"stop_token_ids": (1,) * 65}, INVALID, "open.stop_token_ids"),
    # 0 asks for all of P, which is more than 1024 pairs of a wide model.
    ({"mode": SPLIT, "sparse_k": 2**31}, INVALID, "open.sparse_k"),
    ({"mode": SPLIT, "sparse_k": 1025}, INVALID, "open.sparse_k"),
    ({"probe": 1}, INVALID, "open.probe"),
    *(
        ({"sampling": replace(SAMPLED, **{name: value})}, INVALID, f"open.sampling.{name}")
        for name, values in BAD_SAMPLING.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("changes", "code", "field"), BAD_OPENS)
async def test_a_bad_open_is_refused_by_field(
    cloud: Cloud, changes: dict[str, Any], code: str, field: str
) -> None:
    stream = cloud.stream()
    await stream.send(make_open(**changes))
    refusal = await stream.failure()
    assert (refusal.code, refusal.fields) == (code, (field,)), refusal
    assert cloud.engine.opened == []
    await cloud.until_idle()
    assert cloud.metric("picospec_cloud_protocol_errors_total", field=field) == 1


def _open_message(**changes: Any) -> pb.GenerateRequest:
    message = codec.EdgeEncoder().encode(make_open())
    for name, value in changes.items():
        setattr(message.open, name, value)
    return message


MALFORMED: list[tuple[pb.GenerateRequest, str]] = [
    (pb.GenerateRequest(), "frame"),
    (_open_message(prompt_token_ids=b"\x01\x00\x00"), "open.prompt_token_ids"),
    (_open_message(output_token_ids=b"\x01"), "open.output_token_ids"),
    (_open_message(prompt_token_ids=b"\xff\xff\xff\xff"), "open.prompt_token_ids"),
    (_open_message(mode=0), "open.mode"),
    (_open_message(mode=7), "open.mode"),
    (_open_message(assist=7), "open.assist"),
    (
        pb.GenerateRequest(
            open=pb.Open(sampling=pb.SamplingParams(top_p=1, logit_bias_token_ids=[1]))
        ),
        "open.sampling.logit_bias_values",
    ),
    (pb.GenerateRequest(open=pb.Open(session_id="x")), "open.sampling"),
]


@pytest.mark.parametrize(("message", "field"), MALFORMED)
async def test_a_malformed_message_is_refused_by_field(
    cloud: Cloud, message: pb.GenerateRequest, field: str
) -> None:
    stream = cloud.stream()
    await stream.send(message)
    refusal = await stream.failure()
    assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", (field,)), refusal
    assert cloud.engine.opened == []


async def test_bytes_that_are_no_message_are_refused(cloud: Cloud) -> None:
    generate: Any = cloud.channel.stream_stream("/picospec.v1.SpeculationService/Generate")
    call = generate()
    await call.write(b"\xff\xff\xff")
    refusal = await RawStream(call).failure()
    assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", ("frame",))


async def test_a_message_that_is_too_large_is_refused() -> None:
    async with running_cloud(max_message_bytes=1000) as cloud:
        stream = cloud.stream()
        await stream.send(make_open(prompt_token_ids=np.ones(400, np.int32)))
        assert (await stream.failure()).code == "RESOURCE_EXHAUSTED"
        await cloud.until_idle()
        assert cloud.engine.opened == []


BASE = "draft.base_position"
# What is sent after the first verdict of a split session; the first draft belongs at FIRST.
BAD_FRAMES: list[tuple[Any, str, str]] = [
    (make_open(), ORDER, "open"),
    (Draft(0, FIRST, token_ids=(64,), draft_probs=(0.5,)), INVALID, "draft.token_ids"),
    (Draft(0, FIRST, token_ids=(2**32 - 1,), draft_probs=(0.5,)), INVALID, "draft.token_ids"),
    (Draft(0, FIRST, token_ids=(1,) * 17, draft_probs=(0.5,) * 17), INVALID, "draft.token_ids"),
    (Draft(0, FIRST, token_ids=(1,)), INVALID, "draft.draft_probs"),
    (Draft(0, FIRST, token_ids=(1,), draft_probs=(0.5, 0.5)), INVALID, "draft.draft_probs"),
    *(
        (Draft(0, FIRST, token_ids=(1,), draft_probs=(q,)), INVALID, "draft.draft_probs")
        for q in (NAN, INF, 0, -1, 1.5)
    ),
    (Draft(0, FIRST, token_ids=(1, 2), num_forced=2), INVALID, "draft.num_forced"),
    (Draft(0, FIRST, num_forced=1), INVALID, "draft.num_forced"),
    (Draft(0, FIRST, token_ids=(1,), draft_probs=(0.5,), probe=1), INVALID, "draft.probe"),
    (Draft(0, FIRST), INVALID, "draft.probe"),
    (Draft(0, FIRST, probe=2**31), INVALID, "draft.probe"),
    (Draft(0, 0, token_ids=(1,), draft_probs=(0.5,)), INVALID, BASE),
    (Draft(0, 2**31, token_ids=(1,), draft_probs=(0.5,)), INVALID, BASE),
    (Draft(1, FIRST, token_ids=(1,), draft_probs=(0.5,)), ORDER, "draft.epoch"),
    (Draft(0, FIRST + 1, token_ids=(1,), draft_probs=(0.5,)), ORDER, BASE),
    (Draft(0, 2, token_ids=(1,), draft_probs=(0.5,)), ORDER, BASE),
    (Draft(0, FIRST, token_ids=(1,), num_forced=1), ORDER, "draft.num_forced"),
    (
        Draft(0, FIRST, token_ids=(1,) * 16, draft_probs=(0.5,) * 16),
        ORDER,
        "draft.token_ids",  # beyond max_tokens
    ),
    # Frames that go on where the stream's last one ended: there is none, or its epoch is told.
    (pb.GenerateRequest(draft=pb.Draft(token_ids=[1], draft_probs=[0.5])), INVALID, BASE),
    (pb.GenerateRequest(draft=pb.Draft(epoch=1, token_ids=[1])), INVALID, BASE),
    (pb.GenerateRequest(), INVALID, "frame"),
]


@pytest.mark.parametrize(("frame", "code", "field"), BAD_FRAMES)
async def test_a_bad_frame_ends_its_session_alone(
    cloud: Cloud, frame: Any, code: str, field: str
) -> None:
    bystander, offender = cloud.stream(), cloud.stream()
    await bystander.start()
    await offender.start(make_open(mode=SPLIT))
    await offender.send(frame)
    refusal = await offender.failure()
    assert (refusal.code, refusal.fields) == (code, (field,)), refusal
    assert cloud.engine.delivered == []
    await bystander.send(Draft(0, FIRST, token_ids=(1, 2)))
    assert (await bystander.verdict()).num_draft_tokens == 2
    assert cloud.engine.sessions == 1


async def test_frames_in_the_wrong_state(cloud: Cloud) -> None:
    early = cloud.stream()
    await early.send(Draft(0, FIRST, token_ids=(1,)))
    refusal = await early.failure()
    assert (refusal.code, refusal.fields) == (ORDER, ("draft",))

    silent = cloud.stream()
    await silent.call.done_writing()
    refusal = await silent.failure()
    assert (refusal.code, refusal.fields) == (ORDER, ("open",))

    # After a rejection only the recovered token or a probe may begin the next epoch.
    rejected = cloud.stream()
    await rejected.start(make_open(mode=SPLIT))
    await rejected.send(Draft(0, FIRST, token_ids=(63,), draft_probs=(0.5,)))
    assert (await rejected.verdict()).rejection is not None
    await rejected.send(Draft(1, FIRST, token_ids=(1,), draft_probs=(0.5,)))
    refusal = await rejected.failure()
    assert (refusal.code, refusal.fields) == (ORDER, ("draft.num_forced",))


async def test_more_than_the_window_is_refused() -> None:
    async with running_cloud(ScriptedEngine(step_s=0.5)) as cloud:
        stream = cloud.stream()
        await stream.send(make_open(max_tokens=200))
        for frame in range(5):
            await stream.send(Draft(0, 3 + 16 * frame, token_ids=(1,) * 16))
        refusal = await stream.failure()
        assert (refusal.code, refusal.fields) == (ORDER, ("draft.token_ids",))
        assert len(cloud.engine.delivered) == 4
