"""The daemon's life: health, reflection, TLS, shutdown, the engine's death."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cloud_server import heartbeat
from cloud_server.config import CloudConfig, EngineConfig, MetricsConfig, ServerConfig
from cloud_server.engine.scripted import ScriptedEngine, toy_target
from cloud_server.heartbeat import Heartbeat
from cloud_server.server import EXIT_ENGINE, EXIT_OK, SERVICE_NAME, CloudServer, serve
from picospec.errors import ConfigError, PicoSpecError
from picospec.protocol.messages import AssistPolicy, Draft, ModelCard
from picospec.v1 import speculation_pb2 as pb
from picospec.v1 import speculation_pb2_grpc
from tests.support.cloud import (
    RawStream,
    an_open,
    failure,
    greedy_generation,
    running_cloud,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel, service: str = SERVICE_NAME) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)


async def test_health_follows_the_engine() -> None:
    async with running_cloud() as cloud:
        assert await health(cloud.channel) == await health(cloud.channel, "") == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await health(cloud.channel, "no.such.Service")
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND

        stream = cloud.stream()
        await stream.start()
        cloud.engine.die()
        lost = await stream.failure()
        assert (lost.code, lost.retry_after_s) == ("UNAVAILABLE", 1.0)
        await asyncio.wait_for(cloud.server.engine_died.wait(), 2)
        assert await health(cloud.channel) == await health(cloud.channel, "") == NOT_SERVING
        assert (await cloud.stream().failure()).code == "UNAVAILABLE"
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await cloud.stub.GetModel(pb.GetModelRequest())
        assert failure(refusal.value).code == "UNAVAILABLE"


async def test_reflection_lists_the_service() -> None:
    async with running_cloud() as cloud:
        call: Any = reflection_pb2_grpc.ServerReflectionStub(cloud.channel).ServerReflectionInfo(
            iter(
                [
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
                ]
            )
        )
        services, described = [answer async for answer in call]
        names = {service.name for service in services.list_services_response.service}
        assert names >= {SERVICE_NAME, "grpc.health.v1.Health"}
        assert described.file_descriptor_response.file_descriptor_proto


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl for a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


async def test_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with running_cloud(tls_cert=str(cert), tls_key=str(key)) as cloud:
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        address = f"localhost:{cloud.server.port}"
        async with grpc.aio.secure_channel(address, credentials) as channel:
            stub: Any = speculation_pb2_grpc.SpeculationServiceStub(channel)
            await stub.GetModel(pb.GetModelRequest(), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError):  # without TLS
            await cloud.stub.GetModel(pb.GetModelRequest(), timeout=2)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"tls_cert": "/nonexistent/cert", "tls_key": "/nonexistent/key"}, "server.tls_key"),
        ({"host": "192.0.2.1"}, "192.0.2.1"),
    ],
)
async def test_what_cannot_be_served_is_said(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        async with running_cloud(**settings):
            pass


async def test_a_port_that_is_taken_is_said() -> None:
    async with running_cloud() as cloud:
        with pytest.raises(ConfigError, match=str(cloud.server.port)):
            async with running_cloud(port=cloud.server.port):
                pass


async def test_an_engine_that_does_not_start() -> None:
    engine = ScriptedEngine()
    engine.start_error = PicoSpecError("no such model")
    with pytest.raises(PicoSpecError, match="no such model"):
        await serve(CloudConfig(), engine)


# --- shutdown --------------------------------------------------------------------------------


class Daemon:
    """`serve` in a task, and a channel to it."""

    def __init__(
        self,
        engine: ScriptedEngine,
        port: int,
        channel: grpc.aio.Channel,
        step_timeout_s: float,
    ) -> None:
        self.engine = engine
        self.channel = channel
        config = CloudConfig(
            server=ServerConfig(port=port, health_interval_s=0.02, grace_s=5.0),
            engine=EngineConfig(step_timeout_s=step_timeout_s),
            metrics=MetricsConfig(enabled=False),
        )
        self.exit_code = asyncio.create_task(serve(config, engine))

    def stream(self) -> RawStream:
        stub: Any = speculation_pb2_grpc.SpeculationServiceStub(self.channel)
        return RawStream(stub.Generate())

    async def until_not_serving(self) -> None:
        watch = health_pb2_grpc.HealthStub(self.channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        )
        async for answer in watch:
            if answer.status == NOT_SERVING:
                return


@asynccontextmanager
async def daemon(
    engine: ScriptedEngine | None = None, *, step_timeout_s: float = 60.0
) -> AsyncIterator[Daemon]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with asyncio.timeout(10):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            running = Daemon(engine or ScriptedEngine(), port, channel, step_timeout_s)
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE_NAME), wait_for_ready=True
            )
            yield running
            assert running.exit_code.done()


async def test_a_signal_lets_running_generations_finish() -> None:
    async with daemon(ScriptedEngine(step_s=0.05)) as running:
        stream = running.stream()
        generation = asyncio.create_task(
            greedy_generation(stream, an_open(max_tokens=24), toy_target, good=3)
        )
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        await running.until_not_serving()
        late = await running.stream().failure()
        assert (late.code, late.retry_after_s) == ("UNAVAILABLE", 1.0)
        assert len((await generation)[0]) == 24
        assert await running.exit_code == EXIT_OK
        assert not running.engine.healthy


async def test_a_second_signal_cuts_the_grace_short() -> None:
    async with daemon() as running:
        stream = running.stream()
        await stream.start()
        os.kill(os.getpid(), signal.SIGTERM)
        await running.until_not_serving()
        await stream.send(Draft(epoch=0, base_position=4, token_ids=(1,)))
        assert (await stream.verdict()).num_draft_tokens == 1  # still served
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await stream.failure()).code == "UNAVAILABLE"
        assert await running.exit_code == EXIT_OK


async def test_the_grace_period_ends() -> None:
    async with running_cloud(grace_s=0.1) as cloud:
        stream = cloud.stream()
        await stream.start(an_open(assist=AssistPolicy.NEVER))
        stopping = asyncio.create_task(cloud.server.stop(asyncio.Event()))
        lost = await stream.failure()
        assert (lost.code, lost.message) == ("UNAVAILABLE", "The server is shutting down")
        await stopping


async def test_the_engines_death_is_an_exit_code() -> None:
    async with daemon() as running:
        stream = running.stream()
        await stream.start()
        running.engine.die()
        assert (await stream.failure()).code == "UNAVAILABLE"
        assert await running.exit_code == EXIT_ENGINE


async def test_an_engine_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.05)
    async with daemon(step_timeout_s=1.0) as running:
        stream = running.stream()
        await stream.start()
        running.engine.hung = True
        assert (await stream.failure()).code == "UNAVAILABLE"
        assert await running.exit_code == EXIT_ENGINE


async def test_a_slow_engine_is_not_a_hung_one() -> None:
    class Slow(ScriptedEngine):
        async def ping(self) -> None:
            await asyncio.sleep(0.05)

    beating = Heartbeat(Slow(), step_timeout_s=1.0)
    task = asyncio.create_task(beating.run())
    await asyncio.sleep(0.02)
    assert beating.problem == ""
    task.cancel()


async def test_a_signal_while_the_model_loads_stops_the_start() -> None:
    class Slow(ScriptedEngine):
        async def start(self) -> ModelCard:
            await asyncio.sleep(60)
            raise AssertionError("it was not stopped")

    serving = asyncio.create_task(serve(CloudConfig(), Slow()))
    await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(serving, 5) == EXIT_OK


async def test_the_port_opens_when_the_engine_is_ready() -> None:
    engine = ScriptedEngine()
    server = CloudServer(
        CloudConfig(server=ServerConfig(port=0), metrics=MetricsConfig(enabled=False)), engine
    )
    assert server.port == 0
    await server.start()
    assert engine.healthy
    assert server.port > 0
    await server.stop(asyncio.Event())
