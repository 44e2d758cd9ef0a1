"""Both daemons as processes of their own, as an operator runs them: started, watched, stopped.

Each writes its log, as JSON, to a file that tests read and that pytest shows on failure. Nothing
outlives the test run: a daemon that does not end, or that leaves a child behind, is killed and
fails the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

from picospec_cli.console import tail
from picospec_cli.processes import die_with_parent
from tests.support.machine import cloud_core, edge_core, pinned
from tests.support.relay import Relay

API_KEY = "an-api-key-that-no-log-may-show"
CLOUD_TOKEN = "a-cloud-token-that-no-log-may-show"

START_TIMEOUT_S = 300.0  # other work may share the machine
STOP_TIMEOUT_S = 60.0
PATIENCE_S = 600.0  # of one daemon with the other
POLL_INTERVAL_S = 0.05
TAIL_LINES = 60


class DaemonFailed(AssertionError):
    """A daemon ended, or did not do what was waited for; quotes the end of its log."""


def child_of(pid: int, module: str) -> psutil.Process:
    """The process below `pid` that runs `module`."""
    children = psutil.Process(pid).children(recursive=True)
    [found] = [child for child in children if module in " ".join(child.cmdline())]
    return found


class Daemon:
    """`python -m MODULE FLAGS` on one core, logging to `log`."""

    def __init__(
        self,
        name: str,
        module: str,
        flags: list[str],
        log: Path,
        core: int,
        secrets: Mapping[str, str],
    ) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output, pinned(core):
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--log.format", "json", *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **secrets},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def records(self) -> list[dict[str, Any]]:
        """The log so far; lines that a library wrote in its own form are left out."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"time"')]

    def tail(self) -> str:
        return tail(self.log.read_text(errors="replace"), TAIL_LINES)

    def announcement(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """The first record whose message begins like `pattern`; waits for it.

        The pattern's named groups are added to the record. Raises DaemonFailed.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            running = self.running  # before the look: its last words count
            for record in self.records():
                if found := re.match(pattern, record["message"]):
                    return record | found.groupdict()
            if not running:
                raise DaemonFailed(f"{self.name} ended; the end of its log:\n{self.tail()}")
            if time.monotonic() > deadline_s:
                raise DaemonFailed(f"{self.name}: no {pattern!r} within {timeout_s:.0f} s")
            time.sleep(POLL_INTERVAL_S)

    def family(self) -> list[psutil.Process]:
        """The daemon and the processes it started."""
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    def child(self, module: str) -> psutil.Process:
        """The child that runs `module`."""
        return child_of(self._process.pid, module)

    def stop(self) -> None:
        """SIGTERM, and the end that must follow. Raises DaemonFailed if it is not clean."""
        if not self.running:
            raise DaemonFailed(f"{self.name} had ended; the end of its log:\n{self.tail()}")
        family = self.family()
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            left = end_all(family)
        if self._process.wait() != 0 or left:
            raise DaemonFailed(
                f"{self.name} ended with status {self._process.returncode} and left {left}; "
                f"the end of its log:\n{self.tail()}"
            )


def end_all(processes: list[psutil.Process], grace_s: float = 10.0) -> list[psutil.Process]:
    """Those that did not end by themselves within `grace_s`; they are killed."""
    deadline_s = time.monotonic() + grace_s
    while (left := [process for process in processes if _runs(process)]) and (
        time.monotonic() < deadline_s
    ):
        time.sleep(POLL_INTERVAL_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return left


def _runs(process: psutil.Process) -> bool:
    """A zombie is over; whose child it is now may take its time to say so."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


class Metrics:
    """One scrape."""

    def __init__(self, url: str) -> None:
        response = httpx.get(url, timeout=30)
        response.raise_for_status()
        self._samples = [
            sample
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        ]

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self._samples}

    def __call__(self, name: str, **labels: str) -> float:
        """The sum over the samples called `name` that have `labels`. Raises KeyError."""
        values = [
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not values and not labels:
            raise KeyError(name)
        return sum(values)


@dataclass(frozen=True, slots=True)
class Cloud:
    daemon: Daemon
    model: str
    port: int
    metrics_url: str

    def metrics(self) -> Metrics:
        return Metrics(self.metrics_url)


@dataclass(frozen=True, slots=True)
class Edge:
    daemon: Daemon
    model: str
    url: str
    relay: Relay  # between this edge and the cloud

    def metrics(self) -> Metrics:
        return Metrics(f"{self.url}/metrics")

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        response = httpx.get(f"{self.url}/health", timeout=30)
        return response.status_code, response.json()

    def is_healthy(self) -> bool:
        return self.health()[0] == 200

    def client(self, api_key: str = API_KEY) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_S
        )


class Daemons:
    """Starts daemons, and stops all of them at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[Daemon] = []
        self._relays: list[Relay] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        failures: list[Exception] = []
        for daemon in reversed(self.running):  # edges before their cloud
            try:
                daemon.stop()
            except DaemonFailed as failure:
                failures.append(failure)
        for relay in self._relays:
            relay.__exit__()
        if failures:
            raise ExceptionGroup("daemons did not end well", failures)

    def start_cloud(self, name: str, model: Path, *flags: str) -> Cloud:
        """Returns when it serves, after 20 s or so. Raises DaemonFailed."""
        daemon = self._start(
            name,
            "cloud_server",
            [
                *("--server.port", "0", "--metrics.port", "0"),
                *("--server.grace_s", "5", "--server.health_interval_s", "0.1"),
                *("--server.session_idle_timeout_s", str(PATIENCE_S)),
                *("--engine.model", str(model), "--engine.args.enforce_eager", "true"),
                *("--engine.args.dtype", "float32", "--engine.args.max_model_len", "2048"),
                *flags,
            ],
            cloud_core(),
            {"PICOSPEC_CLOUD_SERVER_AUTH_TOKEN": CLOUD_TOKEN},
        )
        serving = daemon.announcement(r"serving (?P<model>\S+) on \S+:(?P<port>\d+)")
        return Cloud(
            daemon,
            serving["model"],
            port=int(serving["port"]),
            metrics_url=f"http://127.0.0.1:{serving['metrics_port']}/metrics",
        )

    def start_edge(self, name: str, cloud: Cloud, *flags: str) -> Edge:
        """Returns when it listens. Its cloud is reached over a relay. Raises DaemonFailed."""
        return self.start_edge_at(name, cloud.port, cloud.model, *flags)

    def start_edge_at(self, name: str, cloud_port: int, model: str, *flags: str) -> Edge:
        """`start_edge` for a cloud that is not one of these daemons."""
        relay = Relay(cloud_port)
        relay.__enter__()
        self._relays.append(relay)
        daemon = self._start(
            name,
            "edge_agent",
            [
                *("--server.port", "0", "--server.shutdown_grace_s", "5"),
                *("--cloud.address", f"127.0.0.1:{relay.port}", "--cloud.poll_interval_s", "0.2"),
                *("--cloud.connect_timeout_s", str(PATIENCE_S)),
                *("--speculation.estimates_file", "off"),  # each test begins without
                *flags,
            ],
            edge_core(),
            {"PICOSPEC_EDGE_SERVER_API_KEY": API_KEY, "PICOSPEC_EDGE_CLOUD_TOKEN": CLOUD_TOKEN},
        )
        listening = daemon.announcement(r"listening on (?P<url>\S+)")
        return Edge(daemon, model, url=listening["url"], relay=relay)

    def stop(self, daemon: Daemon) -> None:
        """Before the end. Raises DaemonFailed."""
        self.running.remove(daemon)
        daemon.stop()

    def tails(self) -> Iterator[tuple[str, str]]:
        """What pytest shows beside a failure: title and text."""
        for daemon in self.running:
            yield f"the end of {daemon.log}", daemon.tail()

    def _start(
        self, name: str, module: str, flags: list[str], core: int, secrets: Mapping[str, str]
    ) -> Daemon:
        daemon = Daemon(name, module, flags, self.folder / f"{name}.log", core, secrets)
        self.running.append(daemon)
        return daemon


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """The first true value of `condition`. Raises AssertionError with its last one."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"still {value!r} after {timeout_s:.0f} s")
        time.sleep(POLL_INTERVAL_S)
    return value
