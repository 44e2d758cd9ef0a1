"""The speculation service over a real gRPC connection, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from cloud_server.engine.scripted import ScriptedEngine, toy_target
from picospec import codec
from picospec.errors import CapacityError, PicoSpecError
from picospec.messages import (
    AssistPolicy,
    Draft,
    Finish,
    FinishReason,
    SamplingParams,
    VerificationMode,
)
from picospec.v1 import speculation_pb2 as pb
from tests.support.cloud import Cloud, RawStream, an_open, greedy_generation, running_cloud

SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED
FIRST = 4  # position of the second output token: where the first draft goes


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    async with running_cloud() as running:
        yield running


async def test_get_model_describes_the_engine(cloud: Cloud) -> None:
    card = codec.decode_model(await cloud.stub.GetModel(pb.GetModelRequest(protocol_version=1)))
    assert card == cloud.engine.card


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
@pytest.mark.parametrize("good", [0, 1, 3])
async def test_output_is_the_targets_whatever_is_drafted(
    cloud: Cloud, mode: VerificationMode, good: int
) -> None:
    request = an_open(mode=mode, max_tokens=24)
    output, num_verdicts = await greedy_generation(cloud.stream(), request, toy_target, good=good)
    expected = request.prompt_token_ids.tolist()
    for _ in range(24):
        expected.append(toy_target(expected))
    assert output == expected[3:]
    await cloud.until_idle()
    assert cloud.metric("vllm:generation_tokens_total") == 24
    # The first verdict judges nothing, nor does one on a lone recovered token at the end.
    assert num_verdicts - 2 <= cloud.metric("vllm:spec_decode_num_drafts_total") < num_verdicts
    assert cloud.metric("picospec_cloud_sessions_total", outcome="length") == 1


async def test_an_assisted_session_goes_on_without_drafts(cloud: Cloud) -> None:
    stream = cloud.stream()
    await stream.send(an_open(assist=AssistPolicy.ALWAYS, max_tokens=8))
    await stream.call.done_writing()  # the edge may stop sending; the verdicts still come
    frames = [frame async for frame in _frames(stream)]
    assert len(frames) == 9
    assert frames[-1].finish_reason is FinishReason.LENGTH


async def test_a_stop_token_ends_the_generation(cloud: Cloud) -> None:
    expected = [3, 1, 4]
    for _ in range(3):
        expected.append(toy_target(expected))
    stream = cloud.stream()
    await stream.start(an_open(stop_token_ids=(expected[-1],)))
    await stream.send(Draft(0, FIRST, (expected[4], expected[5], 1)))
    verdict = await stream.verdict()
    assert (verdict.num_accepted, verdict.finish_reason) == (2, FinishReason.STOP)
    assert await stream.receive() is None


async def test_finish_ends_the_generation_well(cloud: Cloud) -> None:
    stream = cloud.stream()
    await stream.start()
    await stream.send(Finish())
    assert await stream.receive() is None
    await cloud.until_idle()
    assert cloud.metric("picospec_cloud_sessions_total", outcome="finished_by_edge") == 1


async def test_late_and_duplicate_frames_are_dropped_and_counted(cloud: Cloud) -> None:
    stream = cloud.stream()
    await stream.start()
    await stream.send(Draft(0, FIRST, (1, 2, 3)))
    await stream.verdict()
    await stream.send(Draft(1, FIRST + 1, (5,)))
    await stream.verdict()
    await stream.send(Draft(0, FIRST + 3, (9, 9)))  # of an epoch that is over
    await stream.send(Draft(1, FIRST + 1, (5,)))  # again
    await stream.send(Finish())
    assert await stream.receive() is None
    await cloud.until_idle()
    assert [draft.epoch for _, draft in cloud.engine.delivered] == [0, 1]
    assert cloud.metric("picospec_cloud_stale_draft_tokens_total") >= 2


# --- what an edge must not do -----------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD_OPENS: list[tuple[dict[str, Any], str, str]] = [
    ({"protocol_version": 2}, "FAILED_PRECONDITION", "open.protocol_version"),
    ({"session_id": ""}, "INVALID_ARGUMENT", "open.session_id"),
    ({"session_id": "a\nforged log line"}, "INVALID_ARGUMENT", "open.session_id"),
    ({"prompt_token_ids": np.empty(0, np.int32)}, "INVALID_ARGUMENT", "open.prompt_token_ids"),
    ({"prompt_token_ids": np.array([64], np.int32)}, "INVALID_ARGUMENT", "open.prompt_token_ids"),
    ({"prompt_token_ids": np.array([-1], np.int32)}, "INVALID_ARGUMENT", "open.prompt_token_ids"),
    ({"prompt_token_ids": np.ones(512, np.int32)}, "INVALID_ARGUMENT", "open.prompt_token_ids"),
    ({"output_token_ids": np.array([99], np.int32)}, "INVALID_ARGUMENT", "open.output_token_ids"),
    ({"output_token_ids": np.ones(16, np.int32)}, "INVALID_ARGUMENT", "open.output_token_ids"),
    ({"max_tokens": 0}, "INVALID_ARGUMENT", "open.max_tokens"),
    ({"max_tokens": 510}, "INVALID_ARGUMENT", "open.max_tokens"),
    ({"stop_token_ids": (64,)}, "INVALID_ARGUMENT", "open.stop_token_ids"),
    ({"stop_token_ids": (1,) * 65}, "INVALID_ARGUMENT", "open.stop_token_ids"),
    ({"mode": SPLIT, "sparse_k": 0}, "INVALID_ARGUMENT", "open.sparse_k"),
    ({"mode": SPLIT, "sparse_k": 1025}, "INVALID_ARGUMENT", "open.sparse_k"),
    ({"mode": SPLIT, "assist": AssistPolicy.ALWAYS}, "INVALID_ARGUMENT", "open.assist"),
    ({"probe": 1}, "INVALID_ARGUMENT", "open.probe"),
    *(
        ({"sampling": SamplingParams(**{name: value})}, "INVALID_ARGUMENT", f"open.sampling.{name}")
        for name, values in {
            "temperature": (NAN, INF, -0.1),
            "top_p": (NAN, 0.0, 1.1),
            "min_p": (NAN, -0.1, 1.1),
            "presence_penalty": (NAN, 2.1),
            "frequency_penalty": (NAN, -2.1),
            "repetition_penalty": (NAN, 0.0, INF),
            "logit_bias": (((64, 1.0),), ((1, NAN),), ((1, 101.0),)),
        }.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("changes", "code", "field"), BAD_OPENS)
async def test_a_bad_open_is_refused_by_field(
    cloud: Cloud, changes: dict[str, Any], code: str, field: str
) -> None:
    stream = cloud.stream()
    await stream.send(an_open(**changes))
    refusal = await stream.failure()
    assert (refusal.code, refusal.fields) == (code, (field,)), refusal
    assert cloud.engine.opened == []
    await cloud.until_idle()
    assert cloud.metric("picospec_cloud_protocol_errors_total", field=field) == 1


def _open_message(**changes: Any) -> pb.GenerateRequest:
    message = codec.encode_edge(an_open())
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
    generate = cloud.channel.stream_stream("/picospec.v1.SpeculationService/Generate")
    call: Any = generate()
    await call.write(b"\xff\xff\xff")
    refusal = await RawStream(call).failure()
    assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", ("frame",))


async def test_a_message_that_is_too_large_is_refused() -> None:
    async with running_cloud(max_message_bytes=1000) as cloud:
        stream = cloud.stream()
        await stream.send(an_open(prompt_token_ids=np.ones(400, np.int32)))
        assert (await stream.failure()).code == "RESOURCE_EXHAUSTED"
        await cloud.until_idle()
        assert cloud.engine.opened == []


INVALID, ORDER = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
# What is sent after the first verdict of a split session; the first draft belongs at FIRST.
BAD_FRAMES: list[tuple[Any, str, str]] = [
    (an_open(), ORDER, "open"),
    (Draft(0, FIRST, (64,), (0.5,)), INVALID, "draft.token_ids"),
    (Draft(0, FIRST, (2**32 - 1,), (0.5,)), INVALID, "draft.token_ids"),
    (Draft(0, FIRST, (1,) * 17, (0.5,) * 17), INVALID, "draft.token_ids"),
    (Draft(0, FIRST, (1,), ()), INVALID, "draft.draft_probs"),
    (Draft(0, FIRST, (1,), (0.5, 0.5)), INVALID, "draft.draft_probs"),
    *((Draft(0, FIRST, (1,), (q,)), INVALID, "draft.draft_probs") for q in (NAN, INF, 0, -1, 1.5)),
    (Draft(0, FIRST, (1, 2), num_forced=2), INVALID, "draft.num_forced"),
    (Draft(0, FIRST, (), num_forced=1), INVALID, "draft.num_forced"),
    (Draft(0, FIRST, (1,), (0.5,), probe=1), INVALID, "draft.probe"),
    (Draft(0, FIRST), INVALID, "draft.probe"),
    (Draft(0, FIRST, (), probe=2**31), INVALID, "draft.probe"),
    (Draft(0, 0, (1,), (0.5,)), INVALID, "draft.base_position"),
    (Draft(0, 2**31, (1,), (0.5,)), INVALID, "draft.base_position"),
    (Draft(1, FIRST, (1,), (0.5,)), ORDER, "draft.epoch"),
    (Draft(0, FIRST + 1, (1,), (0.5,)), ORDER, "draft.base_position"),
    (Draft(0, 2, (1,), (0.5,)), ORDER, "draft.base_position"),
    (Draft(0, FIRST, (1,), num_forced=1), ORDER, "draft.num_forced"),
    (Draft(0, FIRST, (1,) * 16, (0.5,) * 16), ORDER, "draft.token_ids"),  # beyond max_tokens
    (pb.GenerateRequest(draft=pb.Draft(draft_probs=b"123")), INVALID, "draft.draft_probs"),
    (pb.GenerateRequest(), INVALID, "frame"),
]


@pytest.mark.parametrize(("frame", "code", "field"), BAD_FRAMES)
async def test_a_bad_frame_ends_its_session_alone(
    cloud: Cloud, frame: Any, code: str, field: str
) -> None:
    bystander, offender = cloud.stream(), cloud.stream()
    await bystander.start()
    await offender.start(an_open(mode=SPLIT))
    await offender.send(frame)
    refusal = await offender.failure()
    assert (refusal.code, refusal.fields) == (code, (field,)), refusal
    assert cloud.engine.delivered == []
    await bystander.send(Draft(0, FIRST, (1, 2)))
    assert (await bystander.verdict()).num_draft_tokens == 2
    assert cloud.engine.sessions == 1


async def test_frames_in_the_wrong_state(cloud: Cloud) -> None:
    early = cloud.stream()
    await early.send(Draft(0, FIRST, (1,)))
    refusal = await early.failure()
    assert (refusal.code, refusal.fields) == (ORDER, ("draft",))

    silent = cloud.stream()
    await silent.call.done_writing()
    refusal = await silent.failure()
    assert (refusal.code, refusal.fields) == (ORDER, ("open",))

    # After a rejection only the recovered token or a probe may begin the next epoch.
    rejected = cloud.stream()
    await rejected.start(an_open(mode=SPLIT))
    await rejected.send(Draft(0, FIRST, (63,), (0.5,)))
    assert (await rejected.verdict()).rejection is not None
    await rejected.send(Draft(1, FIRST, (1,), (0.5,)))
    refusal = await rejected.failure()
    assert (refusal.code, refusal.fields) == (ORDER, ("draft.num_forced",))


async def test_more_than_the_window_is_refused() -> None:
    async with running_cloud(ScriptedEngine(step_s=0.5)) as cloud:
        stream = cloud.stream()
        await stream.send(an_open(max_tokens=200))
        for frame in range(5):
            await stream.send(Draft(0, 3 + 16 * frame, (1,) * 16))
        refusal = await stream.failure()
        assert (refusal.code, refusal.fields) == (ORDER, ("draft.token_ids",))
        assert len(cloud.engine.delivered) == 4


# --- bounds ----------------------------------------------------------------------------------


async def test_a_full_server_says_when_to_come_back() -> None:
    async with running_cloud(max_sessions=2) as cloud:
        first, second = cloud.stream(), cloud.stream()
        await first.start()
        await second.start()
        refusal = await cloud.stream().failure()
        assert refusal.code == "RESOURCE_EXHAUSTED"
        assert refusal.retry_after_s == 1.0
        first.call.cancel()
        await _until(lambda: len(cloud.server.sessions) == 1)
        await cloud.stream().start()
        assert cloud.metric("picospec_cloud_sessions_total", outcome="no_room") == 1


@pytest.mark.parametrize("opened", [True, False])
async def test_a_silent_edge_is_given_up(opened: bool) -> None:
    async with running_cloud(session_idle_timeout_s=0.1) as cloud:
        stream = cloud.stream()
        if opened:
            await stream.start()
        assert (await stream.failure()).code == "DEADLINE_EXCEEDED"
        await cloud.until_idle()
        assert cloud.metric("picospec_cloud_sessions_total", outcome="idle") == 1


async def test_waiting_for_the_engine_is_not_silence() -> None:
    async with running_cloud(ScriptedEngine(step_s=0.3), session_idle_timeout_s=0.1) as cloud:
        stream = cloud.stream()
        await stream.start()
        # The edge's own turn is bounded all the same.
        assert (await stream.failure()).code == "DEADLINE_EXCEEDED"


async def test_an_edge_that_does_not_read_is_given_up() -> None:
    card = ScriptedEngine().card
    engine = ScriptedEngine()
    engine.card = type(card)(
        **{f: getattr(card, f) for f in card.__slots__} | {"max_model_len": 10**6}
    )
    narrow = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with running_cloud(engine, channel_options=narrow, outbound_frames_max=8) as cloud:
        stream = cloud.stream()
        await stream.send(an_open(assist=AssistPolicy.ALWAYS, max_tokens=10**5))
        await _until(
            lambda: cloud.metric("picospec_cloud_sessions_total", outcome="slow_reader") == 1
        )
        await cloud.until_idle()
        refusal = await stream.failure()
        assert refusal.code == "RESOURCE_EXHAUSTED"


# --- the engine fails, the client leaves ------------------------------------------------------


async def test_the_engines_error_reaches_the_edge() -> None:
    engine = ScriptedEngine()
    async with running_cloud(engine) as cloud:
        engine.open_error = CapacityError("no blocks", retry_after_s=2.5)
        stream = cloud.stream()
        await stream.send(an_open())
        refusal = await stream.failure()
        assert (refusal.code, refusal.retry_after_s) == ("RESOURCE_EXHAUSTED", 2.5)
        engine.open_error = None
        stream = cloud.stream()
        await stream.start()
        engine.fail(PicoSpecError("a numerical accident"))
        refusal = await stream.failure()
        assert (refusal.code, refusal.message) == ("INTERNAL", "a numerical accident")


async def test_a_bug_is_not_shown_to_the_edge(cloud: Cloud, caplog: Any) -> None:
    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    cloud.engine.deliver = broken  # type: ignore[method-assign]
    stream = cloud.stream()
    await stream.start()
    await stream.send(Draft(0, FIRST, (1,)))
    refusal = await stream.failure()
    assert (refusal.code, refusal.message) == ("INTERNAL", "Internal error")
    assert "secret detail" in caplog.text


async def test_leaving_at_any_moment_leaves_nothing_behind() -> None:
    """200 generations, of which two thirds are cancelled at a random moment."""
    rng = random.Random(7)
    async with running_cloud(ScriptedEngine(step_s=0.001)) as cloud:
        await _generation(cloud, rng, None)
        await cloud.until_idle()
        tasks_before = len(asyncio.all_tasks())
        for _ in range(25):
            moments = [rng.choice([None, rng.random() * 0.03, 0.0]) for _ in range(8)]
            await asyncio.gather(*[_generation(cloud, rng, moment) for moment in moments])
        await cloud.until_idle()
        cloud.streams.clear()
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) <= tasks_before
        assert cloud.metric("picospec_cloud_sessions_active") == 0
        ended = {
            outcome: cloud.metric("picospec_cloud_sessions_total", outcome=outcome)
            for outcome in ("length", "cancelled", "internal_error", "engine_error")
        }
        assert ended["internal_error"] == ended["engine_error"] == 0
        assert ended["length"] > 50
        assert ended["cancelled"] > 50
        # Every session was given back to the engine, opened or not.
        opened = {key for key, _ in cloud.engine.opened}
        assert opened <= set(cloud.engine.aborted)


async def _generation(cloud: Cloud, rng: random.Random, cancel_after_s: float | None) -> None:
    stream = cloud.stream()
    request = an_open(mode=rng.choice([SPLIT, COUPLED]), max_tokens=20)
    generation = greedy_generation(stream, request, toy_target, good=1)
    if cancel_after_s is None:
        await generation
        return
    task = asyncio.ensure_future(generation)
    await asyncio.sleep(cancel_after_s)
    stream.call.cancel()
    task.cancel()  # grpc leaves a write pending whose call is cancelled before it starts
    await asyncio.gather(task, return_exceptions=True)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - nothing to wait on from outside
            await asyncio.sleep(0.005)


async def _frames(stream: RawStream) -> AsyncIterator[Any]:
    while (frame := await stream.receive()) is not None:
        yield frame


def test_status_names_are_grpcs() -> None:
    from picospec.errors import GRPC_STATUS

    assert all(hasattr(grpc.StatusCode, name) for name in GRPC_STATUS.values())
