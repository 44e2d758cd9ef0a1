"""The test bed: every process that a suite needs, started once and used by all conditions.

core of the cloud   cloud daemon (our hooks in vLLM); stock vLLM. One computes at a time, the
                    other sleeps in a blocking read.
core of the edge    this process (pipeline, client), one drafter for each draft model, and a
                    relay in front of either server, through which all tokens travel.
"""

import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import cloud_core, cpu_time_s, edge_core, pinned
from bench.metering import MeteredLink
from bench.scenarios import Condition
from bench.stock.client import StockClient
from bench.stock.server import EQUAL_SETTINGS
from bench.wan.process import NO_BYTES, Counts, WanProcess
from edge_agent.control import Control
from edge_agent.drafting.messages import DrafterSpec
from edge_agent.drafting.process import DraftingProcess
from edge_agent.link import CloudLink
from edge_agent.tokenizer import Tokenizer
from picospec.errors import CloudUnavailable
from picospec.performance.costs import VerifyCost
from picospec.protocol.messages import ModelCard
from picospec_cli.pairs import DEFAULT, TARGET, Pair
from picospec_cli.processes import Daemon, free_ports, stop

START_TIMEOUT_S = 600.0  # compiling takes minutes the first time
LINK_TIMEOUT_S = 300.0  # a whole distribution may be ahead of us on a slow link
POLL_INTERVAL_S = 0.5
ROUND_TRIPS = 5
IDLE_SETTLE_S = 2.0
IDLE_WINDOW_S = 2.0
IDLE_SHARE_MAX = 0.05


@dataclass
class Bed:
    """What a generation runs on; `link` and `stock` go through the relays."""

    link: MeteredLink
    cloud: CloudLink
    card: ModelCard
    stock: StockClient
    cloud_relay: WanProcess
    stock_relay: WanProcess
    drafting: dict[str, DraftingProcess]
    tokenizer: Tokenizer
    settings: dict[str, Any]  # what the results say about both engines
    cloud_pid: int  # of the daemons, each the leader of its session
    stock_pid: int
    controls: dict[Condition, Control] = field(default_factory=dict)
    round_trip_ms: float = 0.0  # measured when the link was set
    verify_ms: VerifyCost | None = None  # once it is measured
    _fence: Counts = NO_BYTES  # what one `drained` itself puts on the line

    async def set_link(self, rtt_ms: float, kbit_s: float | None) -> None:
        """Of both relays. To be called between generations."""
        for relay in (self.cloud_relay, self.stock_relay):
            await relay.set(rtt_ms, kbit_s)
        self._fence = NO_BYTES
        await self.drained()
        before = await self.cloud_relay.counts()
        self._fence = await self.drained() - before
        self.round_trip_ms = await self._round_trip_ms()

    async def reconnect(self) -> None:
        """To stock vLLM, after a generation that failed. The old one is aborted."""
        self.stock.close()
        self.stock = await StockClient.connect(self.stock_relay.port)

    async def _round_trip_ms(self) -> float:
        times_ms = []
        for _ in range(ROUND_TRIPS):
            started_s = time.perf_counter()
            await self.cloud.get_model()
            times_ms.append((time.perf_counter() - started_s) * 1e3)
        return statistics.median(times_ms)

    async def drained(self) -> Counts:
        """The cloud's line, once all that was sent so far has arrived.

        The line is first in, first out: a question's answer comes after all that was before it.
        What the question costs is not counted.
        """
        await self.cloud.get_model()
        return await self.cloud_relay.counts() - self._fence


@asynccontextmanager
async def laid_out(
    drafts: Sequence[str],
    logs: Path,
    *,
    eager: bool,
    settings: Mapping[str, Any] = EQUAL_SETTINGS,
    pair: Pair = DEFAULT,
) -> AsyncIterator[Bed]:
    """Start everything; stop everything, whatever happens. `settings` are both engines'.

    Raises CommandFailed with the end of its log if a server does not come up. Meanwhile this
    thread computes on the edge's core.
    """
    settings = {**settings, "enforce_eager": eager}
    async with contextlib.AsyncExitStack() as stack:
        cloud_port, stock_port = free_ports(2)
        target = pair.home / TARGET
        cloud_flags = _cloud_flags(target, cloud_port, settings)
        cloud_daemon = daemon(stack, "cloud_server", cloud_flags, logs)
        stock_arguments = [str(target), str(stock_port)]
        stock_arguments += [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        stock_daemon = daemon(stack, "bench.stock.server", stock_arguments, logs)
        stack.enter_context(pinned(edge_core()))  # the cloud's processes have their core by now
        drafting = {
            draft: await stack.enter_async_context(drafter(draft, pair)) for draft in drafts
        }
        stock_relay, cloud_relay = [await _relay(stack, port) for port in (stock_port, cloud_port)]
        cloud = CloudLink(f"127.0.0.1:{cloud_relay.port}", connect_timeout_s=LINK_TIMEOUT_S)
        stack.push_async_callback(cloud.close)
        await _listening(stock_port, stock_daemon)
        await _listening(cloud_port, cloud_daemon)
        stock = await StockClient.connect(stock_relay.port)
        await _check_idle((cloud_daemon, stock_daemon))
        bed = Bed(
            link=MeteredLink(cloud),
            cloud=cloud,
            card=await served(cloud, cloud_daemon),
            stock=stock,
            cloud_relay=cloud_relay,
            stock_relay=stock_relay,
            drafting=drafting,
            tokenizer=Tokenizer.load(target),
            settings={"both": settings, "stock": stock.description},
            cloud_pid=cloud_daemon.pid,
            stock_pid=stock_daemon.pid,
        )
        stack.callback(lambda: bed.stock.close())  # which may be another by then
        yield bed


def _cloud_flags(target: Path, port: int, settings: dict[str, Any]) -> list[str]:
    flags = {
        "server.port": port,
        "server.grace_s": 1,
        # A whole distribution on a slow link looks like silence.
        "server.session_idle_timeout_s": LINK_TIMEOUT_S,
        "server.keepalive_time_s": LINK_TIMEOUT_S,
        "metrics.enabled": "false",
        "engine.model": target,
        "engine.max_sparse_k": 1 << 16,  # the whole distribution may travel
        **{f"engine.args.{name}": _flag(value) for name, value in settings.items()},
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def daemon(
    stack: contextlib.AsyncExitStack, module: str, arguments: Sequence[str], logs: Path
) -> Daemon:
    """A server on the cloud's core, stopped with `stack`."""
    started = Daemon(module, arguments, logs / f"{module}.log", {cloud_core()})
    stack.push_async_callback(asyncio.to_thread, stop, [started])
    return started


def drafter_spec(draft: str, pair: Pair = DEFAULT) -> DrafterSpec:
    """One of the pair's draft models or "ngram", on the edge's core."""
    if draft == "ngram":
        return DrafterSpec("ngram", "", cpu=edge_core())
    folder = pair.home / f"draft-{draft}"
    return DrafterSpec("onnx", str(folder), threads=1, cpu=edge_core())


@asynccontextmanager
async def drafter(draft: str, pair: Pair = DEFAULT) -> AsyncIterator[DraftingProcess]:
    drafting = DraftingProcess(drafter_spec(draft, pair))
    await drafting.start()
    try:
        yield drafting
    finally:
        await drafting.stop()


async def _relay(stack: contextlib.AsyncExitStack, port: int) -> WanProcess:
    relay = await WanProcess.start(port)
    stack.push_async_callback(relay.stop)
    return relay


async def _listening(port: int, daemon: Daemon) -> None:
    """Wait until `daemon` takes connections; raises CommandFailed if it ends before."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                daemon.check_alive()
                await asyncio.sleep(POLL_INTERVAL_S)
            else:
                writer.close()
                return


async def served(cloud: CloudLink, daemon: Daemon) -> ModelCard:
    """Wait until `daemon` serves its model; raises CommandFailed if it ends before."""
    while True:
        try:
            return await cloud.get_model()
        except CloudUnavailable:
            daemon.check_alive()
            await asyncio.sleep(POLL_INTERVAL_S)


async def _check_idle(daemons: Sequence[Daemon]) -> None:
    """Raises RuntimeError if a server that waits computes: it would slow the other one."""
    await asyncio.sleep(IDLE_SETTLE_S)
    before_s = [cpu_time_s(daemon.pid) for daemon in daemons]
    await asyncio.sleep(IDLE_WINDOW_S)
    for daemon, then_s in zip(daemons, before_s, strict=True):
        share = (cpu_time_s(daemon.pid) - then_s) / IDLE_WINDOW_S
        if share > IDLE_SHARE_MAX:
            raise RuntimeError(f"{daemon.name} uses {share:.0%} of a core while it waits")
