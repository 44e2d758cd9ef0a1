"""The cloud daemon's life: startup, serve, shutdown.

The port opens when the engine is ready, so that whoever can connect is served. After that the
standard health service says SERVING until the engine dies or a shutdown begins.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cloud_server.admission import AdmittedCalls
from cloud_server.auth import interceptor
from cloud_server.config import CloudConfig, ServerConfig
from cloud_server.engine.interface import VerificationEngine
from cloud_server.heartbeat import Heartbeat
from cloud_server.metrics import CloudMetrics, MetricsServer
from cloud_server.servicer import SpeculationServicer
from cloud_server.status import STATUS_TIMEOUT_S
from cloud_server.tls import server_credentials
from picospec.errors import CloudUnavailable, ConfigError
from picospec.service_manager import ServiceManager
from picospec.v1 import speculation_pb2, speculation_pb2_grpc
from picospec.waiting import first_of

logger = logging.getLogger(__name__)

SERVICE_NAME = speculation_pb2.DESCRIPTOR.services_by_name["SpeculationService"].full_name
PROGRESS_INTERVAL_S = 10.0
ENGINE_SHUTDOWN_TIMEOUT_S = 30.0
# Calls beyond the sessions: health, reflection, GetModel, and refusals on their way out.
OTHER_CALLS_MAX = 256

EXIT_OK = 0
EXIT_ENGINE = 1


class CloudServer:
    """The gRPC server, the metrics server and the engine, started and stopped together."""

    def __init__(self, config: CloudConfig, engine: VerificationEngine) -> None:
        self._config = config
        self._engine = engine
        self.engine_died = asyncio.Event()
        self.port = 0

    async def start(self) -> None:
        """Load the engine, then open the ports. Raises PicoSpecError, ConfigError among them."""
        config = self._config
        credentials = server_credentials(config.server)
        async with _progress(f"loading {config.engine.model}"):
            card = await self._engine.start()
        self.heartbeat = Heartbeat(self._engine, config.engine.step_timeout_s)
        self.calls = AdmittedCalls(config.server, self._engine.kv_cache_size)
        self.model_id = card.model_id
        self.metrics = CloudMetrics(card)
        self.servicer = SpeculationServicer(self._engine, card, self.calls, self.metrics)
        self.health = health.aio.HealthServicer()
        self._grpc = grpc.aio.server(
            interceptors=[interceptor(config.server.auth_token)],
            options=_options(config.server),
            maximum_concurrent_rpcs=config.server.max_sessions + OTHER_CALLS_MAX,
        )
        speculation_pb2_grpc.add_SpeculationServiceServicer_to_server(self.servicer, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        reflection.enable_server_reflection(
            [SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc
        )
        self.port = self._bind(credentials)
        try:
            self.metrics_server = MetricsServer(config.metrics, self.metrics)
        except OSError as error:
            raise ConfigError(
                f"metrics.port = {config.metrics.port}: {error.strerror or error}"
            ) from None
        await self.health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        await self._grpc.start()
        self._watch = asyncio.create_task(self._watch_engine(), name="watch-engine")
        self._beating = asyncio.create_task(self.heartbeat.run(), name="heartbeat")
        logger.info(
            "serving %s on %s:%d", card.model_id, config.server.host, self.port,
            extra={"metrics_port": self.metrics_server.port, "max_model_len": card.max_model_len},
        )  # fmt: skip

    async def stop(self, hurry: asyncio.Event) -> None:
        """Finish what runs, within the grace period; at once when `hurry` is set."""
        # Load balancers look away, and no new generation starts.
        await self.health.enter_graceful_shutdown()
        self.calls.refuse("The server is shutting down")
        # Running generations get the grace period, unless nothing can serve them.
        if not self.engine_died.is_set():
            await first_of(
                self.calls.drained(), hurry.wait(), self.engine_died.wait(),
                timeout_s=self._config.server.grace_s,
            )  # fmt: skip
        # The rest is ended, and told that another replica may serve it.
        self.calls.end_all("shutdown", CloudUnavailable("The server is shutting down"))
        await first_of(self.calls.drained(), timeout_s=STATUS_TIMEOUT_S)
        await self._grpc.stop(grace=0.5)
        for task in (self._watch, self._beating):
            task.cancel()
        await asyncio.gather(self._watch, self._beating, return_exceptions=True)
        await asyncio.to_thread(self.metrics_server.close)

    async def _watch_engine(self) -> None:
        """Feeds the gauges, and ends everything when the engine is dead, or hangs."""
        while self._engine.healthy and not self.heartbeat.problem:
            self.metrics.engine(self._engine.stats(), healthy=True)
            self.metrics.room(self.calls.room)
            self.metrics.asyncio_tasks(len(asyncio.all_tasks()))
            await asyncio.sleep(self._config.server.health_interval_s)
        logger.error("%s", self.heartbeat.problem or "the engine died")
        self.metrics.engine(self._engine.stats(), healthy=False)
        self.calls.refuse("The engine died")
        self.calls.end_all("engine_error", CloudUnavailable("The engine died"))
        for service in ("", SERVICE_NAME):
            await self.health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        self.engine_died.set()

    def _bind(self, credentials: grpc.ServerCredentials | None) -> int:
        server = self._config.server
        host = f"[{server.host}]" if ":" in server.host else server.host
        address = f"{host}:{server.port}"
        try:
            if credentials is None:
                return int(self._grpc.add_insecure_port(address))
            return int(self._grpc.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from None


async def serve(config: CloudConfig, engine: VerificationEngine) -> int:
    """Run until a signal or the engine's death; returns the exit code.

    The first SIGTERM or SIGINT begins a graceful shutdown, the second cuts its grace short, the
    third has the signal's own effect. Raises PicoSpecError if the start fails.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if not stop.is_set():
            stop.set()
            return
        hurry.set()
        _default_signals(loop)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = CloudServer(config, engine)
    manager = ServiceManager.from_environ(os.environ)
    manager.status(f"loading {config.engine.model}")
    feeding: asyncio.Task[None] | None = None
    try:
        if not await _start_unless(server, stop):
            _default_signals(loop)
            return EXIT_OK
        manager.ready(f"serving {server.model_id} on {config.server.host}:{server.port}")
        feeding = asyncio.create_task(manager.feed_watchdog(lambda: server.heartbeat.problem))
        await first_of(stop.wait(), server.engine_died.wait())
        # Ctrl-C reaches the engine's process as well: its death after a signal is no failure.
        exit_code = EXIT_OK if stop.is_set() else EXIT_ENGINE
        logger.info("shutting down", extra={"sessions": len(server.calls)})
        manager.stopping(f"ending; {len(server.calls)} generations may go on")
        await server.stop(hurry)
        return exit_code
    finally:
        await first_of(engine.shutdown(), timeout_s=ENGINE_SHUTDOWN_TIMEOUT_S)
        if feeding is not None:
            feeding.cancel()
        logger.info("stopped")


async def _start_unless(server: CloudServer, stop: asyncio.Event) -> bool:
    """Start `server`; False if a signal came first."""
    starting = asyncio.create_task(server.start())
    await first_of(asyncio.shield(starting), stop.wait())
    if starting.done():
        await starting
        return True
    # The loader may sit in a thread that waits for the engine's process: end that, not the wait.
    starting.cancel()
    for child in multiprocessing.active_children():
        child.terminate()
    await asyncio.gather(starting, return_exceptions=True)
    return False


def _default_signals(loop: asyncio.AbstractEventLoop) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)


@asynccontextmanager
async def _progress(what: str) -> AsyncIterator[None]:
    """Log that `what` goes on, every now and then, and how long it took."""
    started = time.monotonic()

    async def announce() -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            logger.info("still %s (%.0f s)", what, time.monotonic() - started)

    logger.info("%s", what)
    announcing = asyncio.create_task(announce())
    try:
        yield
    finally:
        announcing.cancel()
    logger.info("done %s in %.1f s", what, time.monotonic() - started)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", int(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Edges may probe as often as we do: over a mobile link both sides want to know.
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.http2.max_ping_strikes", 4),
        # Two servers on one port would share its connections unnoticed.
        ("grpc.so_reuseport", 0),
    ]
