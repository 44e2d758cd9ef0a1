"""The link against a small gRPC server: both directions, every failure, and nothing left over."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloud_server.status import abort, to_status
from edge_agent.link import CloudLink
from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    ConfigError,
    PicoSpecError,
    RemoteOrderError,
    RemoteProtocolError,
)
from picospec.protocol import codec
from picospec.protocol.messages import (
    Draft,
    Finish,
    FinishReason,
    Open,
    Verdict,
)
from picospec.protocol.outbox import MAX_FRAMES
from picospec.v1 import speculation_pb2 as pb
from picospec.v1 import speculation_pb2_grpc
from tests.support.builders import SAMPLED, SPLIT, make_card, make_open, make_opened

CARD = make_card(logits_width=32, max_model_len=128, modes=(SPLIT,))
OPEN = make_open(
    session_id="r-1",
    prompt_token_ids=(1, 2),
    sampling=SAMPLED,
    mode=SPLIT,
    max_tokens=8,
)
Serve = Callable[[Any], Awaitable[None]]


def retry_info(seconds: float) -> bytes:
    """A status's details with that hint."""
    return bytes(to_status(CapacityError("full", seconds)).SerializeToString())


class TinyCloud(speculation_pb2_grpc.SpeculationServiceServicer):
    """Serves each stream by `serve(context)`; by default it opens, answers one draft, ends."""

    def __init__(self) -> None:
        self.serve: Serve = self._answer
        self.metadata: dict[str, str] = {}
        self.received: list[Any] = []
        self.active = 0
        self.idle = asyncio.Event()

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        self.metadata = dict(context.invocation_metadata())
        return codec.encode_model(CARD)

    async def Generate(self, request_iterator: Any, context: Any) -> None:
        self.metadata = dict(context.invocation_metadata())
        self.active += 1
        try:
            await self.serve(context)
        finally:
            self.active -= 1
            self.idle.set()

    async def _answer(self, context: Any) -> None:
        decoder = codec.EdgeDecoder()
        while (message := await context.read()) is not grpc.aio.EOF:
            frame = decoder.decode(message)
            self.received.append(frame)
            match frame:
                case Open():
                    await context.write(codec.encode_cloud(make_opened(first_position=2)))
                case Draft():
                    verdict = Verdict(0, 2, num_accepted=1, finish_reason=FinishReason.STOP)
                    await context.write(codec.encode_cloud(verdict))
                    return


@pytest.fixture
def cloud() -> TinyCloud:
    return TinyCloud()


@pytest.fixture
async def server(cloud: TinyCloud) -> AsyncIterator[str]:
    server = grpc.aio.server()
    speculation_pb2_grpc.add_SpeculationServiceServicer_to_server(cloud, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def link(server: str) -> AsyncIterator[CloudLink]:
    link = CloudLink(server, token="sesame", connect_timeout_s=2.0)
    yield link
    await link.close()


async def test_the_model_card_and_the_credentials(link: CloudLink, cloud: TinyCloud) -> None:
    assert await link.get_model() == CARD
    assert cloud.metadata["authorization"] == "Bearer sesame"
    assert link.reachable


async def test_a_stream_carries_frames_both_ways(link: CloudLink, cloud: TinyCloud) -> None:
    stream = link.open_stream("r-1")
    stream.send(OPEN)
    opened = await stream.receive()
    assert opened == make_opened(first_position=2)
    draft = Draft(0, 2, token_ids=(5,), draft_probs=(0.5,))
    stream.send(draft)
    verdict = await stream.receive()
    assert verdict == Verdict(0, 2, num_accepted=1, finish_reason=FinishReason.STOP)
    assert await stream.receive() is None
    assert cloud.metadata["x-request-id"] == "r-1"
    assert cloud.received[1:] == [draft]
    encoder = codec.EdgeEncoder()
    assert stream.bytes_up == len(encoder.to_bytes(OPEN)) + len(encoder.to_bytes(draft))
    assert stream.bytes_down > 0
    await stream.aclose()


@pytest.mark.parametrize(
    ("code", "error_type"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, RemoteProtocolError),
        (grpc.StatusCode.FAILED_PRECONDITION, RemoteOrderError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CapacityError),
        (grpc.StatusCode.UNAVAILABLE, CloudUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, CloudUnavailable),
        (grpc.StatusCode.INTERNAL, CloudUnavailable),
        (grpc.StatusCode.UNAUTHENTICATED, ConfigError),
    ],
)
async def test_statuses_become_our_errors(
    link: CloudLink,
    cloud: TinyCloud,
    code: grpc.StatusCode,
    error_type: type[PicoSpecError],
) -> None:
    async def refuse(context: Any) -> None:
        await context.abort(code, "because")

    cloud.serve = refuse
    stream = link.open_stream("r-1")
    stream.send(OPEN)
    with pytest.raises(error_type, match="because") as caught:
        await stream.receive()
    assert type(caught.value) is error_type
    await stream.aclose()


@pytest.mark.parametrize("refusal", [CapacityError("full", 7.5), CloudUnavailable("away", 7.5)])
async def test_the_cloud_says_when_to_come_back(
    link: CloudLink, cloud: TinyCloud, refusal: CapacityError | CloudUnavailable
) -> None:
    cloud.serve = lambda context: abort(context, refusal)
    stream = link.open_stream("r-1")
    stream.send(OPEN)
    with pytest.raises((CapacityError, CloudUnavailable)) as caught:
        await stream.receive()
    assert type(caught.value) is type(refusal)
    assert caught.value.retry_after_s == 7.5
    await stream.aclose()


@pytest.mark.parametrize(
    ("details", "retry_after_s"), [(b"\xff\xff\xff", 1.0), (retry_info(1e8), 3600.0)]
)
async def test_a_hint_that_makes_no_sense_is_bounded(
    link: CloudLink, cloud: TinyCloud, details: bytes, retry_after_s: float
) -> None:
    async def refuse(context: Any) -> None:
        metadata = (("grpc-status-details-bin", details),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", metadata)

    cloud.serve = refuse
    stream = link.open_stream("r-1")
    stream.send(OPEN)
    with pytest.raises(CapacityError) as caught:
        await stream.receive()
    assert caught.value.retry_after_s == retry_after_s
    await stream.aclose()


async def test_closing_a_stream_frees_it_in_the_cloud(link: CloudLink, cloud: TinyCloud) -> None:
    tasks = asyncio.all_tasks()
    stream = link.open_stream("r-1")
    stream.send(OPEN)
    await stream.receive()
    assert cloud.active == 1
    stream.send(Finish())
    await stream.aclose()
    await stream.aclose()
    async with asyncio.timeout(2):
        await cloud.idle.wait()
    assert cloud.active == 0
    assert not {task for task in asyncio.all_tasks() - tasks if "link" in task.get_name()}


async def test_a_cloud_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        link = CloudLink(f"127.0.0.1:{unused.getsockname()[1]}", connect_timeout_s=0.5)
        with pytest.raises(CloudUnavailable):
            await link.get_model()
        stream = link.open_stream("r-1")
        stream.send(OPEN)
        with pytest.raises(CloudUnavailable):
            await stream.receive()
        await stream.aclose()
        assert not link.reachable
        await link.close()


async def test_a_cloud_that_says_nothing_at_all() -> None:
    """It accepts the connection and is silent: connecting must not take for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = CloudLink(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout_s=0.3)
        stream = link.open_stream("r-1")
        stream.send(OPEN)
        async with asyncio.timeout(2):
            with pytest.raises(CloudUnavailable):
                await stream.receive()
            with pytest.raises(CloudUnavailable):
                await link.get_model()
        await stream.aclose()
        await link.close()


async def test_a_stream_lost_on_the_way(cloud: TinyCloud) -> None:
    server = grpc.aio.server()
    speculation_pb2_grpc.add_SpeculationServiceServicer_to_server(cloud, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = CloudLink(f"127.0.0.1:{port}")
    stream = link.open_stream("r-1")
    stream.send(OPEN)
    await stream.receive()
    await server.stop(0)
    with pytest.raises(CloudUnavailable):
        await stream.receive()
    await stream.aclose()
    await link.close()


async def test_a_new_epoch_overtakes_what_waits_of_older_ones(
    link: CloudLink, cloud: TinyCloud
) -> None:
    """Of a chain that was given up only the first frame goes out, so that epochs have no gap."""
    arrived = asyncio.Event()

    async def listen(context: Any) -> None:
        decoder = codec.EdgeDecoder()
        while len(cloud.received) < 5:
            cloud.received.append(decoder.decode(await context.read()))
        arrived.set()
        await asyncio.Event().wait()

    cloud.serve = listen
    stream = link.open_stream("r-1")
    first = Draft(0, 2, token_ids=(1,), draft_probs=(0.5,))
    last = Draft(2, 4, token_ids=(7,), draft_probs=(0.5,))
    stream.send(OPEN)
    stream.send(first)
    stream.send(Draft(0, 3, token_ids=(2,), draft_probs=(0.5,)))
    stream.send(Draft(1, 2, token_ids=(4,), draft_probs=(0.5,)))
    stream.send(Draft(1, 3, token_ids=(5,), draft_probs=(0.5,)))
    stream.send(Draft(2, 3, token_ids=(6,), draft_probs=(0.5,)))
    stream.send(last)
    async with asyncio.timeout(5):
        await arrived.wait()
    assert cloud.received[1:] == [
        first,
        Draft(1, 2, token_ids=(4,), draft_probs=(0.5,)),
        Draft(2, 3, token_ids=(6,), draft_probs=(0.5,)),
        last,
    ]
    await stream.aclose()


async def test_a_cloud_that_takes_no_frames(link: CloudLink, cloud: TinyCloud) -> None:
    """The queue is bounded: the stream is lost, and memory is not."""

    async def take_nothing(context: Any) -> None:
        await asyncio.Event().wait()

    cloud.serve = take_nothing
    stream = link.open_stream("r-1")
    big = Draft(0, 2, token_ids=tuple(range(20_000)))
    for _ in range(MAX_FRAMES + 2):
        stream.send(big)
    async with asyncio.timeout(2):
        with pytest.raises(CloudUnavailable):
            await stream.receive()
    await stream.aclose()


async def test_garbage_from_the_cloud() -> None:
    async def generate(request_iterator: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"\xff\xff"

    handler: Any = grpc.stream_stream_rpc_method_handler(generate)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "picospec.v1.SpeculationService", {"Generate": handler}
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = CloudLink(f"127.0.0.1:{port}")
    stream = link.open_stream("r-1")
    with pytest.raises(RemoteProtocolError):
        await stream.receive()
    await stream.aclose()
    await link.close()
    await server.stop(0)


async def test_an_authority_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tls_ca"):
        CloudLink("127.0.0.1:1", tls_ca=str(tmp_path / "none.pem"))
