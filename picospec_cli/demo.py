"""`picospec demo`: both daemons on this machine, and a chat through them.

The cloud server and the edge agent run as processes of their own and talk over loopback, as they
would over a network. Everything stops when the chat ends.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picospec_cli import prepare
from picospec_cli.chat import Conversation, add_answer_arguments, answer_parameters
from picospec_cli.chat_client import ChatClient, configured_api_key
from picospec_cli.console import CommandFailed, is_interactive, say, step
from picospec_cli.pairs import DEFAULT, PAIRS, TARGET
from picospec_cli.processes import HOST, Daemon, divided_cores, free_ports, stop

PROMPT = "Why is the sky blue? Answer in three sentences."
SERVE_PORTS = (8080, 50051, 9400)

_POLL_INTERVAL_S = 0.25
_REPORT_INTERVAL_S = 15.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started: models, mode, ports and further flags of the daemons."""

    target: Path
    draft: Path
    mode: str
    edge_port: int
    cloud_port: int
    metrics_port: int
    edge_flags: Sequence[str] = ()
    cloud_flags: Sequence[str] = ()

    def cloud_arguments(self) -> list[str]:
        return [
            *("--engine.model", str(self.target)),
            *("--server.host", HOST),
            *("--server.port", str(self.cloud_port)),
            *("--metrics.port", str(self.metrics_port)),
            *("--server.grace_s", "5"),
            *self.cloud_flags,
        ]

    def edge_arguments(self) -> list[str]:
        return [
            *("--server.host", HOST),
            *("--server.port", str(self.edge_port)),
            *("--server.shutdown_grace_s", "5"),
            *("--cloud.address", f"{HOST}:{self.cloud_port}"),
            *("--cloud.poll_interval_s", "0.5"),
            *("--drafter.backend", "onnx"),
            *("--drafter.model", str(self.draft)),
            *("--speculation.mode", self.mode),
            *self.edge_flags,
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_answer_arguments(parser)
    prepare.add_pair_argument(parser)
    parser.add_argument("--mode", choices=("auto", "split", "coupled"), default="auto")
    parser.add_argument(
        "--draft", choices=tuple(DEFAULT.drafts), help="which of the pair's (default: the first)"
    )
    parser.add_argument("--serve", action="store_true", help="run the daemons until Ctrl-C")
    parser.add_argument("--start-timeout-s", type=float, default=600.0, metavar="S")
    for daemon in ("cloud", "edge"):
        parser.add_argument(
            f"--{daemon}-flag", action="append", default=[], metavar="--KEY=VALUE",
            help=f"a further flag of the {daemon} daemon (repeatable)",
        )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    pair = PAIRS[arguments.pair]
    draft = arguments.draft or pair.default_draft
    prepare.prepare_pair(pair, [draft])
    edge_port, cloud_port, metrics_port = SERVE_PORTS if arguments.serve else free_ports(3)
    plan = Plan(
        target=pair.home / TARGET,
        draft=pair.home / draft,
        mode=arguments.mode,
        edge_port=edge_port,
        cloud_port=cloud_port,
        metrics_port=metrics_port,
        edge_flags=arguments.edge_flag,
        cloud_flags=[
            *(f"--engine.args.{name}={value}" for name, value in pair.engine_args.items()),
            *arguments.cloud_flag,
        ],
    )
    if arguments.serve:
        serve(plan, arguments.start_timeout_s)
        return 0
    prompt = arguments.prompt
    if prompt is None and not is_interactive():
        prompt = PROMPT
    logs = Path(tempfile.mkdtemp(prefix="picospec-demo-"))
    try:
        daemons, client = start(plan, arguments.start_timeout_s, logs)
        try:
            if prompt is not None:
                say(f"> {prompt}")
            Conversation(client, answer_parameters(arguments)).hold(prompt)
        except CommandFailed:
            for daemon in daemons:  # one that has ended says more
                daemon.check_alive()
            raise
        finally:
            with step("stopping both daemons"):
                stop(daemons)
    except CommandFailed:
        say(f"the daemons' logs are kept in {logs}")
        raise
    except BaseException:
        shutil.rmtree(logs, ignore_errors=True)
        raise
    shutil.rmtree(logs)
    return 0


def serve(plan: Plan, timeout_s: float) -> None:
    """Both daemons in the foreground, until Ctrl-C or until one of them ends."""
    daemons, client = start(plan, timeout_s, logs=None)
    try:
        say(f"OpenAI API at {client.url}/v1 (Ctrl-C stops both daemons)")
        while True:
            time.sleep(_POLL_INTERVAL_S)
            for daemon in daemons:
                daemon.check_alive()
    finally:
        stop(daemons)


def start(plan: Plan, timeout_s: float, logs: Path | None) -> tuple[list[Daemon], ChatClient]:
    """Start both daemons and wait until the edge can answer. Raises CommandFailed.

    Whatever goes wrong, nothing is left running.
    """
    daemons: list[Daemon] = []
    try:
        cloud_cores, edge_cores = divided_cores()
        for module, flags, cores in (
            ("cloud_server", plan.cloud_arguments(), cloud_cores),
            ("edge_agent", plan.edge_arguments(), edge_cores),
        ):
            log = logs / f"{module}.log" if logs else None
            daemons.append(Daemon(module, flags, log, cores))
        client = ChatClient(f"http://{HOST}:{plan.edge_port}", api_key=configured_api_key())
        with step("starting the cloud server (vLLM loads the target) and the edge agent"):
            _wait_until_ready(daemons, client, timeout_s)
    except BaseException:
        stop(daemons)
        raise
    return daemons, client


def _wait_until_ready(daemons: Sequence[Daemon], client: ChatClient, timeout_s: float) -> None:
    started_s = time.monotonic()
    reported_s = started_s
    while True:
        for daemon in daemons:
            daemon.check_alive()
        health = client.health()
        if health.get("status") == "ok":
            return
        now_s = time.monotonic()
        problem = _why_not_ready(health)
        if now_s - started_s > timeout_s:
            raise CommandFailed(f"not ready after {timeout_s:.0f} s: {problem}")
        if now_s - reported_s > _REPORT_INTERVAL_S:
            reported_s = now_s
            say(f"  {now_s - started_s:.0f} s: {problem}")
        time.sleep(_POLL_INTERVAL_S)


def _why_not_ready(health: dict[str, Any]) -> str:
    if not health:
        return "the edge agent does not listen yet"
    if not health.get("cloud", {}).get("reachable"):
        return "the cloud server is loading the target (compiling it, the first time)"
    return str(health.get("problem"))
