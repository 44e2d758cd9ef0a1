"""The edge daemon: builds its parts, serves, and ends in order.

Start: tokenizer, drafter process, HTTP. The drafter is not waited for, unless the settings have the
cloud wait for drafts: without one answers come at the cloud's pace, and /health says "degraded" and
why. The cloud is not waited for either: while it cannot be reached, or serves a model that the
drafter does not belong to, requests get 503 and /health says why.

End, at the first SIGTERM or SIGINT:
1. nobody new is let in, and the listening socket closes;
2. running answers may go on for `server.shutdown_grace_s`;
3. those still running are told and ended;
4. drafter process and link close.
A second signal skips step 2.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from edge_agent.api.admission import Admission
from edge_agent.api.host import Health
from edge_agent.api.routes import create_app
from edge_agent.config import EdgeConfig, ServerConfig
from edge_agent.control import DRAFT_LENGTH_MAX, AutoControl, Control, FixedControl
from edge_agent.drafting.messages import DrafterSpec
from edge_agent.drafting.process import DraftingProcess
from edge_agent.estimates import Estimates
from edge_agent.estimates_file import EstimatesFile, drafter_identity, place
from edge_agent.generation import Generator
from edge_agent.link import CloudLink
from edge_agent.metrics import DrafterState, EdgeMetrics
from edge_agent.model_watch import ModelWatch
from edge_agent.pipeline import SpeculationPolicy, SpeculativeGenerator
from edge_agent.tokenizer import Tokenizer
from picospec.errors import ConfigError, ModelMismatch
from picospec.protocol.messages import AssistPolicy, ModelCard, VerificationMode
from picospec.service_manager import ServiceManager
from picospec.waiting import first_of

logger = logging.getLogger(__name__)

# Those that a setting allows; an `auto` edge needs the first.
MODES = {
    "auto": (VerificationMode.COUPLED, VerificationMode.SPLIT),
    "split": (VerificationMode.SPLIT,),
    "coupled": (VerificationMode.COUPLED,),
}
_LAST_WORDS_S = 3.0  # for answers that were told to end
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EdgeHost:
    """What stands behind the API (api.host.Host)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator,
        watch: ModelWatch,
        drafting: DraftingProcess,
        *,
        cloud_goes_on: bool,
    ) -> None:
        """`cloud_goes_on`: without the drafter, too."""
        self._cloud_goes_on = cloud_goes_on
        self.tokenizer = tokenizer
        self.generator = generator
        self._watch = watch
        self._drafting = drafting

    def card(self) -> ModelCard:
        return self._watch.card()

    def health(self) -> Health:
        drafter = drafter_state(self._drafting)
        problem = self._watch.problem or ("" if self._cloud_goes_on else drafter.problem)
        return Health(self._watch.reachable, self._watch.model_id, drafter, problem)


def drafter_state(drafting: DraftingProcess) -> DrafterState:
    return DrafterState(
        drafting.alive,
        drafting.restarts,
        drafting.open_contexts,
        drafting.trouble,
        drafting.troubled_s,
    )


def check_card(card: ModelCard, tokenizer: Tokenizer, policy: SpeculationPolicy) -> None:
    """Raises ModelMismatch unless this edge can speculate for that cloud."""
    tokenizer.check_pair(card)
    if policy.mode not in card.modes:
        served = ", ".join(known.value for known in card.modes)
        raise ModelMismatch(f"speculation.mode is {policy.mode.value!r}; the cloud serves {served}")
    dense = policy.mode is VerificationMode.SPLIT and not policy.split_rejection
    if dense and card.limits.max_sparse_k < card.logits_width:
        raise ModelMismatch(
            "speculation.split_rejection is false, for which the cloud's engine.max_sparse_k "
            f"({card.limits.max_sparse_k}) must be at least its logits width ({card.logits_width})"
        )


class EdgeServer:
    """The daemon's life, from its configuration to its end."""

    def __init__(self, config: EdgeConfig) -> None:
        """Reads the tokenizer and binds the port. Raises ConfigError."""
        self._config = config
        self._tokenizer = Tokenizer.load(config.tokenizer_folder)
        self._socket = bind(config.server)
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._manager = ServiceManager.from_environ(os.environ)

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    def stop(self) -> None:
        """The first call ends the daemon in order, the second at once."""
        if self._stopping.is_set():
            self._forced.set()
        self._stopping.set()

    async def run(self) -> None:
        """Until stopped. Raises DrafterFailed if the drafter cannot be loaded and is needed."""
        config = self._config
        drafter = config.drafter
        self._manager.status("loading the drafter")
        async with contextlib.AsyncExitStack() as stack:
            spec = DrafterSpec(
                drafter.backend, drafter.model, drafter.threads, drafter.cpu, drafter.cache_bytes
            )
            drafting = DraftingProcess(
                spec,
                drafter.max_contexts,
                turn_timeout_s=drafter.turn_timeout_s,
            )
            stack.push_async_callback(drafting.stop)
            stack.enter_context(self._handling_signals())
            policy = policy_of(config)
            goes_on = policy.assist in (AssistPolicy.ALWAYS, AssistPolicy.AUTO)
            if goes_on:
                drafting.begin()
            else:
                await self._unless_stopped(drafting.start())
            if self._stopping.is_set():
                return
            cloud = config.cloud
            link = CloudLink(
                cloud.address,
                token=cloud.token or None,
                tls_ca=cloud.tls_ca or None,
                connect_timeout_s=cloud.connect_timeout_s,
            )
            stack.push_async_callback(link.close)
            metrics = EdgeMetrics(lambda: drafter_state(drafting), lambda: link.open_streams)
            estimates = Estimates()
            file = EstimatesFile(estimates_place(config), estimates, drafter_identity(spec))
            stack.callback(file.write)

            def check(card: ModelCard) -> None:
                check_card(card, self._tokenizer, policy)
                file.served(card)

            watch = ModelWatch(
                link.get_model,
                check,
                timeout_s=cloud.connect_timeout_s,
                poll_interval_s=cloud.poll_interval_s,
                on_reachable=metrics.cloud_reachable,
            )
            generator = SpeculativeGenerator(
                link,
                drafting,
                watch.card,
                policy,
                metrics,
                control_of(config, estimates, lambda: not drafting.trouble),
            )
            host = EdgeHost(self._tokenizer, generator, watch, drafting, cloud_goes_on=goes_on)
            for work in (
                watch.run(),
                file.keep(),
                self._manager.feed_watchdog(lambda: drafting.problem),
            ):
                stack.callback(asyncio.create_task(work).cancel)
            await self._serve(host, metrics)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Loading a model takes seconds in which a signal may come."""
        task = asyncio.ensure_future(work)
        await first_of(asyncio.shield(task), self._stopping.wait())
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    async def _serve(self, host: EdgeHost, metrics: EdgeMetrics) -> None:
        server = self._config.server
        gate = Admission(server.max_concurrent_requests, server.request_timeout_s, server.api_key)
        app = create_app(host, gate, metrics, max_body_bytes=server.max_body_bytes)
        http = _HTTPServer(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=30,
                # Idle connections, health checks and scrapes come on top of the requests.
                limit_concurrency=4 * server.max_concurrent_requests + 64,
            )
        )
        serving = asyncio.create_task(http.serve([self._socket]), name="http")
        logger.info("listening on http://%s:%d", server.host, self.port)
        self._manager.ready(f"listening on http://{server.host}:{self.port}")
        await first_of(asyncio.shield(serving), self._stopping.wait())
        gate.closing = True
        http.should_exit = True
        self._manager.stopping(f"ending; {gate.active} answers may go on")
        if gate.active:
            logger.info("ending; %d answers may go on", gate.active)
        grace_s = server.shutdown_grace_s
        await first_of(gate.drained(), self._forced.wait(), timeout_s=grace_s)
        gate.abort_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await gate.drained()
        http.force_exit = True
        await serving
        logger.info("ended")


class _HTTPServer(uvicorn.Server):
    """uvicorn without its signal handlers: the daemon has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(server: ServerConfig) -> socket.socket:
    """The listening socket. Raises ConfigError when address or port cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"server.host = {server.host!r}, server.port = {server.port} cannot be listened on: "
            f"{error.strerror or error}"
        ) from None


def policy_of(config: EdgeConfig) -> SpeculationPolicy:
    speculation = config.speculation
    settings = speculation.model_dump(exclude={"mode", "estimates_file"})
    if speculation.mode == "auto":
        settings["draft_length"] = DRAFT_LENGTH_MAX
    return SpeculationPolicy(
        **settings,
        mode=MODES[speculation.mode][0],
        resume_attempts=config.cloud.resume_attempts,
        resume_timeout_s=config.cloud.resume_timeout_s,
    )


def estimates_place(config: EdgeConfig) -> Path | None:
    """Of the file that keeps them; None where nothing is estimated, or kept."""
    speculation = config.speculation
    return place(speculation.estimates_file) if speculation.mode == "auto" else None


def control_of(
    config: EdgeConfig,
    estimates: Estimates | None = None,
    drafter_works: Callable[[], bool] = lambda: True,
) -> Control:
    """The edge's; `estimates` are what is known already."""
    if config.speculation.mode != "auto":
        return FixedControl(policy_of(config))
    return AutoControl(estimates or Estimates(), MODES["auto"], drafter_works)
