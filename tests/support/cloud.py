"""The cloud server over a scripted engine, and a raw client that may send anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from cloud_server.config import CloudConfig, MetricsConfig, ServerConfig
from cloud_server.engine.scripted import ScriptedEngine, Target
from cloud_server.server import CloudServer
from picospec.protocol import codec
from picospec.protocol.messages import (
    CloudFrame,
    Draft,
    EdgeFrame,
    FinishReason,
    Open,
    Opened,
    Verdict,
    VerificationMode,
)
from picospec.v1 import speculation_pb2 as pb
from picospec.v1 import speculation_pb2_grpc
from tests.support.builders import make_open

RECEIVE_TIMEOUT_S = 5.0


an_open = make_open


@dataclass(slots=True)
class RawStream:
    """One Generate call without any of the edge's manners."""

    call: grpc.aio.StreamStreamCall[Any, Any]

    async def send(self, frame: EdgeFrame | pb.GenerateRequest) -> None:
        message = (
            frame if isinstance(frame, pb.GenerateRequest) else codec.EdgeEncoder().encode(frame)
        )
        await self.call.write(message)

    async def receive(self, timeout_s: float = RECEIVE_TIMEOUT_S) -> CloudFrame | None:
        """The next frame; None at a clean end. Raises grpc.aio.AioRpcError, TimeoutError."""
        async with asyncio.timeout(timeout_s):
            message = await self.call.read()
        if message is grpc.aio.EOF:
            if await self.call.code() is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    await self.call.code(),
                    await self.call.initial_metadata(),
                    await self.call.trailing_metadata(),
                    await self.call.details(),
                )
            return None
        assert isinstance(message, pb.GenerateResponse)
        return codec.decode_cloud(message)

    async def verdict(self) -> Verdict:
        frame = await self.receive()
        assert isinstance(frame, Verdict), frame
        return frame

    async def start(self, request: Open | None = None) -> Verdict:
        """Send the Open; returns the first verdict."""
        await self.send(make_open() if request is None else request)
        assert isinstance(await self.receive(), Opened)
        return await self.verdict()

    async def failure(self) -> Failure:
        """How the call fails; frames before that are skipped."""
        try:
            while await self.receive() is not None:
                pass
        except grpc.aio.AioRpcError as error:
            return failure(error)
        raise AssertionError("the call ended well")


@dataclass(frozen=True, slots=True)
class Failure:
    """A status with its details opened."""

    code: str
    message: str
    fields: tuple[str, ...] = ()
    retry_after_s: float | None = None


def failure(error: grpc.aio.AioRpcError) -> Failure:
    fields: tuple[str, ...] = ()
    retry_after_s = None
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(request):
                fields = tuple(violation.field for violation in request.field_violations)
            if detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return Failure(
        error.code().name, error.details() or "", fields=fields, retry_after_s=retry_after_s
    )


@dataclass(slots=True)
class Cloud:
    """A running server and a channel to it."""

    server: CloudServer
    engine: ScriptedEngine
    channel: grpc.aio.Channel
    streams: list[RawStream] = field(default_factory=list)

    @property
    def stub(self) -> Any:
        return speculation_pb2_grpc.SpeculationServiceStub(self.channel)

    def stream(self, **arguments: Any) -> RawStream:
        stream = RawStream(self.stub.Generate(**arguments))
        self.streams.append(stream)  # a call that nobody holds is cancelled
        return stream

    async def until_idle(self) -> None:
        """Until no session is left, in the servicer nor in the engine."""
        async with asyncio.timeout(5):
            await self.server.calls.drained()
        assert self.engine.sessions == 0

    def metric(self, name: str, **labels: str) -> float:
        if name.startswith("vllm:"):
            labels |= {"model_name": self.engine.card.model_id, "engine": "0"}
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def running_cloud(
    engine: ScriptedEngine | None = None,
    channel_options: list[tuple[str, Any]] | None = None,
    metrics: MetricsConfig | None = None,
    **server: Any,
) -> AsyncIterator[Cloud]:
    """A server on a free port with `server` settings; stopped, not drained, at the end."""
    engine = engine or ScriptedEngine()
    settings = ServerConfig(**{"port": 0, "health_interval_s": 0.02, "grace_s": 0.0} | server)
    config = CloudConfig(server=settings, metrics=metrics or MetricsConfig(enabled=False))
    cloud_server = CloudServer(config, engine)
    await cloud_server.start()
    address = f"127.0.0.1:{cloud_server.port}"
    try:
        async with grpc.aio.insecure_channel(address, options=channel_options) as channel:
            yield Cloud(cloud_server, engine, channel=channel)
    finally:
        await cloud_server.stop(asyncio.Event())
        await engine.shutdown()


async def greedy_generation(
    stream: RawStream, request: Open, target: Target, *, good: int
) -> tuple[list[int], int]:
    """A whole generation by a lock-step edge; returns the output and the number of verdicts.

    Each round drafts 3 tokens of which the first `good` are the target's.
    """
    split = request.mode is VerificationMode.SPLIT
    tokens = request.prompt_token_ids.tolist()
    length_max = len(tokens) + request.max_tokens
    verdict = await stream.start(request)
    tokens += verdict.token_ids
    epoch, num_verdicts = 0, 1
    while verdict.finish_reason is None:
        head = [] if verdict.rejection is None else [int(verdict.rejection.token_ids[0])]
        base = len(tokens)
        tokens += head
        drafts: list[int] = []
        for index in range(min(3, length_max - len(tokens))):
            token_id = target([*tokens, *drafts])
            drafts.append(token_id if index < good else token_id % 63 + 1)
        probs = (1.0,) * len(drafts) if split else ()
        await stream.send(
            Draft(
                epoch,
                base,
                token_ids=(*head, *drafts),
                draft_probs=probs,
                num_forced=len(head),
                end_of_round=True,
            )
        )
        verdict = await stream.verdict()
        num_verdicts += 1
        tokens += [*drafts[: verdict.num_accepted], *verdict.token_ids]
        epoch += verdict.num_accepted < len(drafts)
    assert verdict.finish_reason is FinishReason.LENGTH
    assert await stream.receive() is None
    return tokens[len(request.prompt_token_ids) :], num_verdicts
