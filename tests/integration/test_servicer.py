"""The speculation service over a real gRPC connection, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from cloud_server.engine.scripted import ScriptedEngine, toy_target
from picospec.errors import CapacityError, PicoSpecError
from picospec.protocol import codec
from picospec.protocol.messages import (
    AssistPolicy,
    Draft,
    Finish,
    FinishReason,
    Open,
    Opened,
    VerificationMode,
)
from picospec.v1 import speculation_pb2 as pb
from tests.support.builders import COUPLED, SPLIT, make_open, make_opened
from tests.support.cloud import Cloud, RawStream, greedy_generation, running_cloud

FIRST = 4  # position of the second output token: where the first draft goes


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    async with running_cloud() as running:
        yield running


async def test_get_model_describes_the_engine(cloud: Cloud) -> None:
    card = codec.decode_model(await cloud.stub.GetModel(pb.GetModelRequest(protocol_version=1)))
    assert card == cloud.engine.card


async def test_opened_tells_the_limits(cloud: Cloud) -> None:
    stream = cloud.stream()
    await stream.send(make_open())
    limits = cloud.engine.card.limits
    assert await stream.receive() == make_opened(
        max_draft_tokens=limits.max_draft_tokens, window=limits.max_window
    )


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
@pytest.mark.parametrize("good", [0, 1, 3])
async def test_output_is_the_targets_whatever_is_drafted(
    cloud: Cloud, mode: VerificationMode, good: int
) -> None:
    request = make_open(mode=mode, max_tokens=24)
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
    await stream.send(make_open(assist=AssistPolicy.ALWAYS, max_tokens=8))
    await stream.call.done_writing()  # the edge may stop sending; the verdicts still come
    frames = [frame async for frame in _frames(stream)]
    assert len(frames) == 9
    assert frames[-1].finish_reason is FinishReason.LENGTH


async def test_a_stop_token_ends_the_generation(cloud: Cloud) -> None:
    expected = [3, 1, 4]
    for _ in range(3):
        expected.append(toy_target(expected))
    stream = cloud.stream()
    await stream.start(make_open(stop_token_ids=(expected[-1],)))
    await stream.send(Draft(0, FIRST, token_ids=(expected[4], expected[5], 1)))
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
    await stream.send(Draft(0, FIRST, token_ids=(1, 2, 3)))
    await stream.verdict()
    await stream.send(Draft(1, FIRST + 1, token_ids=(5,)))
    await stream.verdict()
    await stream.send(Draft(0, FIRST + 3, token_ids=(9, 9)))  # of an epoch that is over
    await stream.send(Draft(1, FIRST + 1, token_ids=(5,)))  # again
    await stream.send(Finish())
    assert await stream.receive() is None
    await cloud.until_idle()
    assert [draft.epoch for _, draft in cloud.engine.delivered] == [0, 1]
    assert cloud.metric("picospec_cloud_stale_draft_tokens_total") >= 2


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
        await _until(lambda: len(cloud.server.calls) == 1)
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
    codes = []

    def given_up(cloud: Cloud, times: int) -> bool:
        outcome = cloud.metric("picospec_cloud_sessions_total", outcome="slow_reader")
        return outcome == times

    async with running_cloud(engine, channel_options=narrow, outbound_frames_max=8) as cloud:
        for number in range(1, 6):
            stream = cloud.stream()
            await stream.send(make_open(assist=AssistPolicy.ALWAYS, max_tokens=10**5))
            await _until(functools.partial(given_up, cloud, number))
            await cloud.until_idle()
            # gRPC loses the status now and then behind a write that was cancelled half way: such
            # an edge waits until it is tired. It must not be the rule.
            with contextlib.suppress(TimeoutError):
                codes.append((await stream.failure()).code)
                break
            stream.call.cancel()
    assert codes == ["RESOURCE_EXHAUSTED"]


# --- the engine fails, the client leaves ------------------------------------------------------


async def test_the_engines_error_reaches_the_edge() -> None:
    engine = ScriptedEngine()
    async with running_cloud(engine) as cloud:
        engine.open_error = CapacityError("no blocks", retry_after_s=2.5)
        stream = cloud.stream()
        await stream.send(make_open())
        refusal = await stream.failure()
        assert (refusal.code, refusal.retry_after_s) == ("RESOURCE_EXHAUSTED", 2.5)
        engine.open_error = None
        stream = cloud.stream()
        await stream.start()
        engine.fail(PicoSpecError("a numerical accident"))
        refusal = await stream.failure()
        assert (refusal.code, refusal.message) == ("INTERNAL", "a numerical accident")


async def test_a_bug_is_not_shown_to_the_edge(
    cloud: Cloud, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(cloud.engine, "deliver", broken)
    stream = cloud.stream()
    await stream.start()
    await stream.send(Draft(0, FIRST, token_ids=(1,)))
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
    request = make_open(mode=rng.choice([SPLIT, COUPLED]), max_tokens=20)
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
    from picospec.protocol.errors import GRPC_STATUS

    assert all(hasattr(grpc.StatusCode, name) for name in GRPC_STATUS.values())


async def test_a_call_cancelled_before_its_open_is_no_protocol_error() -> None:
    async with running_cloud() as cloud:
        streams = [cloud.stream() for _ in range(20)]
        for stream in streams:
            await stream.call.wait_for_connection()
        while len(cloud.server.calls) < len(streams):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.005)
        for stream in streams:
            stream.call.cancel()
        await cloud.until_idle()
        sessions = "picospec_cloud_sessions_total"
        assert cloud.metric(sessions, outcome="cancelled") == len(streams)
        assert cloud.metric(sessions, outcome="protocol_error") == 0


# --- room in the KV cache ----------------------------------------------------------------------


def _crowded() -> ScriptedEngine:
    return ScriptedEngine(kv_tokens=100)


def _half() -> Open:
    """Reserves 45 tokens and half of 10: half of the room there is."""
    return make_open(prompt_token_ids=[3] * 45, max_tokens=10)


async def test_without_room_a_call_waits_its_turn() -> None:
    async with running_cloud(_crowded()) as cloud:
        first, second, third, fourth = (cloud.stream() for _ in range(4))
        for stream in (first, second):
            await stream.start(_half())
        for stream in (third, fourth):
            await stream.send(_half())
            await _until(lambda: cloud.server.calls.room.num_waiting > 0)
        await _until(lambda: cloud.metric("picospec_cloud_sessions_waiting") == 2)
        assert len(cloud.engine.opened) == 2, "the engine hears of nobody who waits"
        assert cloud.metric("picospec_cloud_kv_tokens") == 100
        assert cloud.metric("picospec_cloud_kv_tokens_reserved") == 100
        await first.send(Finish())
        await _until(lambda: len(cloud.engine.opened) == 3)
        assert isinstance(await third.receive(), Opened)
        assert cloud.server.calls.room.num_waiting == 1
        second.call.cancel()
        assert isinstance(await fourth.receive(), Opened)
        for stream in (third, fourth):
            await stream.send(Finish())
        await cloud.until_idle()
        assert cloud.server.calls.room.reserved_tokens == 0


async def test_a_call_that_waits_too_long_is_refused_before_any_work() -> None:
    async with running_cloud(_crowded(), queue_timeout_s=0.1) as cloud:
        first, second, third = cloud.stream(), cloud.stream(), cloud.stream()
        await first.start(_half())
        await second.start(_half())
        await third.send(_half())
        refusal = await third.failure()
        assert (refusal.code, refusal.retry_after_s) == ("RESOURCE_EXHAUSTED", 1.0)
        assert len(cloud.engine.opened) == 2
        assert cloud.metric("picospec_cloud_sessions_total", outcome="no_room") == 1
        reasons = "picospec_cloud_sessions_without_room_total"
        assert cloud.metric(reasons, reason="queue_timeout") == 1


async def test_a_full_queue_refuses_at_once() -> None:
    async with running_cloud(_crowded(), queue_max=1) as cloud:
        streams = [cloud.stream() for _ in range(4)]
        for stream in streams[:2]:
            await stream.start(_half())
        await streams[2].send(_half())
        await _until(lambda: cloud.server.calls.room.num_waiting == 1)
        await streams[3].send(_half())
        refusal = await streams[3].failure()
        assert refusal.code == "RESOURCE_EXHAUSTED"
        reasons = "picospec_cloud_sessions_without_room_total"
        assert cloud.metric(reasons, reason="queue_full") == 1


async def test_an_edge_that_leaves_while_it_waits_leaves_nothing() -> None:
    async with running_cloud(_crowded()) as cloud:
        first, second, third = cloud.stream(), cloud.stream(), cloud.stream()
        await first.start(_half())
        await second.start(_half())
        await third.send(_half())
        await _until(lambda: cloud.server.calls.room.num_waiting == 1)
        third.call.cancel()
        await _until(lambda: len(cloud.server.calls) == 2)
        assert cloud.server.calls.room.num_waiting == 0
        assert len(cloud.engine.opened) == 2


async def test_waiting_is_not_silence() -> None:
    async with running_cloud(_crowded(), session_idle_timeout_s=0.2) as cloud:
        first, second = cloud.stream(), cloud.stream()
        await first.start(make_open(prompt_token_ids=[3] * 95, max_tokens=5))
        await second.send(_half())
        assert (await first.failure()).code == "DEADLINE_EXCEEDED"
        assert isinstance(await second.receive(), Opened)


async def test_what_the_cache_can_never_hold_is_the_callers_error() -> None:
    async with running_cloud(_crowded()) as cloud:
        stream = cloud.stream()
        await stream.send(make_open(max_tokens=98))
        refusal = await stream.failure()
        assert (refusal.code, refusal.fields) == ("INVALID_ARGUMENT", ("open.max_tokens",))
        assert cloud.engine.opened == []


async def test_at_shutdown_a_call_that_waits_is_sent_to_another_replica() -> None:
    async with running_cloud(_crowded()) as cloud:
        first, second, third = cloud.stream(), cloud.stream(), cloud.stream()
        await first.start(_half())
        await second.start(_half())
        await third.send(_half())
        await _until(lambda: cloud.server.calls.room.num_waiting == 1)
        cloud.server.calls.refuse("The server is shutting down")
        assert (await third.failure()).code == "UNAVAILABLE"
        assert len(cloud.server.calls) == 2, "those that run go on"
