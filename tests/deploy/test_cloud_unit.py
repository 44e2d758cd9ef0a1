"""The cloud server's systemd unit with the default target, under a real systemd.

The tests run in order: each finds the machine as the one before left it.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from tests.deploy.conftest import Site
from tests.deploy.test_edge_package import DYNAMIC_UIDS
from tests.support.chat_over_http import EdgeClient
from tests.support.daemons import API_KEY, CLOUD_TOKEN, Daemons, until
from tests.support.machine import free_port
from tests.support.nspawn import Machine

ROOT = Path(__file__).resolve().parents[2]
UNIT = "picospec-cloud"
LOAD_TIMEOUT_S = 480.0  # with the default settings vLLM compiles the model
OURS = ("picospec", "edge_agent", "cloud_server", "picospec_cli")
FAST = """[Service]
WatchdogSec=5
TimeoutAbortSec=2
RestartSec=1
# The packages that vLLM needs, as pip would have installed them.
Environment=PYTHONPATH=/opt/site-packages
"""
CONFIG = """
[server]
port = {port}
grace_s = 60.0

[engine]
model = "/srv/models/target"

[metrics]
port = {metrics_port}
"""


@pytest.fixture(scope="module")
def machine(site: Site) -> Machine:
    return site.machine


@pytest.fixture(scope="module")
def edge(site: Site, daemons: Daemons) -> EdgeClient:
    """The unit, installed as docs/deployment.md says, and an edge agent outside that uses it."""
    machine, port = site.machine, free_port()
    machine.run("python3", "-m", "venv", "--without-pip", "/opt/picospec")
    library = machine.root / "opt/picospec/lib/python3.11/site-packages"
    for package in OURS:
        shutil.copytree(ROOT / package, library / package, dirs_exist_ok=True)
    command = machine.root / "opt/picospec/bin/picospec-cloud"
    command.write_text(
        "#!/opt/picospec/bin/python3\nimport sys\n"
        "from cloud_server.__main__ import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    command.chmod(0o755)
    shutil.copy(ROOT / "deploy/systemd/picospec-cloud.service", machine.root / "etc/systemd/system")
    config = CONFIG.format(port=port, metrics_port=free_port())
    machine.write("/etc/picospec/cloud.toml", config)
    machine.write("/etc/picospec/cloud.credentials/SERVER_AUTH_TOKEN", CLOUD_TOKEN)
    machine.drop_in(UNIT, FAST)
    machine.run("systemctl", "start", "--no-block", UNIT)
    machine.wait_active(UNIT, LOAD_TIMEOUT_S)
    outside = daemons.start_edge_at(
        "edge-of-the-unit", port, "target", "--drafter.model", str(site.models / "draft-int4")
    )
    until(outside.is_healthy)
    return EdgeClient(outside.url, API_KEY)


def come_back(edge: EdgeClient, machine: Machine, daemon: int) -> None:
    """After the daemon that was `daemon` has gone."""
    until(lambda: machine.main_pid(UNIT) not in (0, daemon))
    machine.wait_active(UNIT, LOAD_TIMEOUT_S)
    until(edge.is_healthy)
    assert edge.ask()


def test_it_is_active_as_a_user_of_its_own(edge: EdgeClient, machine: Machine) -> None:
    status = Path(f"/proc/{machine.main_pid(UNIT)}/status").read_text()
    [uids] = [line.split()[1:] for line in status.splitlines() if line.startswith("Uid:")]
    assert {int(uid) for uid in uids} <= set(DYNAMIC_UIDS)
    assert machine.show(UNIT, "StatusText").startswith("serving ")


def test_a_chat_is_answered_through_an_edge_outside(edge: EdgeClient, machine: Machine) -> None:
    assert edge.ask() == edge.ask() != ""
    assert CLOUD_TOKEN not in machine.journal(UNIT)


def test_a_killed_engine_ends_the_daemon_which_is_restarted(
    edge: EdgeClient, machine: Machine
) -> None:
    daemon = machine.main_pid(UNIT)
    os.kill(machine.child(UNIT, "EngineCore"), signal.SIGKILL)
    come_back(edge, machine, daemon)


def test_a_killed_daemon_is_restarted_and_leaves_no_engine(
    edge: EdgeClient, machine: Machine
) -> None:
    daemon, engine = machine.main_pid(UNIT), machine.child(UNIT, "EngineCore")
    os.kill(daemon, signal.SIGKILL)
    come_back(edge, machine, daemon)
    assert not Path(f"/proc/{engine}").exists()


def test_the_watchdog_kills_an_event_loop_that_does_not_turn(
    edge: EdgeClient, machine: Machine
) -> None:
    daemon = machine.main_pid(UNIT)
    os.kill(daemon, signal.SIGSTOP)
    come_back(edge, machine, daemon)
    assert "watchdog" in machine.journal(UNIT).lower()


def test_stopping_lets_a_running_answer_finish(edge: EdgeClient, machine: Machine) -> None:
    chunks = edge.stream(max_tokens=96)
    next(chunks)
    stopping = threading.Thread(target=machine.run, args=("systemctl", "stop", UNIT))
    stopping.start()
    until(lambda: machine.show(UNIT, "ActiveState") == "deactivating")
    rest = list(chunks)
    assert rest[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert len(rest) > 4
    stopping.join()
    assert machine.show(UNIT, "Result") == "success"
