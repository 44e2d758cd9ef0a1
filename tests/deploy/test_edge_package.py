"""The Debian package of the edge agent, from installation to purge, under a real systemd.

The tests run in order: each finds the machine as the one before left it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from tests.deploy.conftest import Site
from tests.support.chat_over_http import EdgeClient
from tests.support.daemons import API_KEY, CLOUD_TOKEN, Cloud, until
from tests.support.machine import free_port
from tests.support.nspawn import Machine

UNIT = "picospec-edge"
DYNAMIC_UIDS = range(61184, 65520)  # systemd.exec(5), DynamicUser=
FAST = """[Service]
WatchdogSec=5
TimeoutAbortSec=2
RestartSec=1
"""


@pytest.fixture(scope="module")
def machine(site: Site) -> Machine:
    return site.machine


@pytest.fixture(scope="module")
def before(machine: Machine) -> set[str]:
    """What the machine has of PicoSpec before the package comes: a cloud server's unit, perhaps."""
    return paths(machine.root)


@pytest.fixture(scope="module")
def edge(site: Site, outside_cloud: Cloud, before: set[str]) -> EdgeClient:
    """The package, installed, configured as docs/deployment.md says, and started."""
    machine, port = site.machine, free_port()
    install(machine, site.package)
    config = machine.root / "etc/picospec/edge.toml"
    config.write_text(
        config.read_text()
        .replace("port = 8080", f"port = {port}")
        .replace("127.0.0.1:50051", f"127.0.0.1:{outside_cloud.port}")
        .replace("/var/lib/picospec-edge/draft", "/srv/models/draft-int4")
    )
    machine.write("/etc/picospec/edge.credentials/SERVER_API_KEY", API_KEY)
    machine.write("/etc/picospec/edge.credentials/CLOUD_TOKEN", CLOUD_TOKEN)
    machine.drop_in(UNIT, FAST)
    machine.start(UNIT)
    client = EdgeClient(f"http://127.0.0.1:{port}", API_KEY)
    until(client.is_healthy)
    return client


def install(machine: Machine, package: Path) -> str:
    target = machine.root / "root" / package.name
    target.write_bytes(package.read_bytes())
    try:
        return machine.run("apt-get", "install", "--yes", f"/root/{package.name}")
    finally:
        target.unlink()


def paths(root: Path) -> set[str]:
    """All that is called picospec where packages and services leave things."""
    folders = ("etc", "lib", "opt", "usr", "var/lib", "var/cache", "root")
    found = (path for folder in folders for path in (root / folder).rglob("*"))
    names = {path.relative_to(root).as_posix() for path in found}
    return {name for name in names if "picospec" in name}


def come_back(edge: EdgeClient, machine: Machine) -> None:
    machine.wait_active(UNIT)
    until(edge.is_healthy)
    assert edge.ask()


def test_it_is_active_as_a_user_of_its_own(edge: EdgeClient, machine: Machine) -> None:
    assert machine.show(UNIT, "ActiveState") == "active"
    status = Path(f"/proc/{machine.main_pid(UNIT)}/status").read_text()
    [uids] = [line.split()[1:] for line in status.splitlines() if line.startswith("Uid:")]
    assert {int(uid) for uid in uids} <= set(DYNAMIC_UIDS)
    assert "listening on http://" in machine.show(UNIT, "StatusText")


def test_a_chat_is_answered_from_a_cloud_server_outside(edge: EdgeClient) -> None:
    assert edge.ask() == edge.ask() != ""


def test_the_api_key_comes_from_its_credential(edge: EdgeClient, machine: Machine) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        EdgeClient(edge.url, "another").ask()
    journal = machine.journal(UNIT)
    assert API_KEY not in journal
    assert CLOUD_TOKEN not in journal


def test_a_killed_drafter_is_replaced(edge: EdgeClient, machine: Machine) -> None:
    daemon = machine.main_pid(UNIT)
    os.kill(machine.child(UNIT, "worker_main"), signal.SIGKILL)
    until(lambda: "died" in machine.journal(UNIT))
    until(edge.is_healthy)
    assert edge.ask()
    assert machine.main_pid(UNIT) == daemon


def test_a_killed_daemon_is_restarted(edge: EdgeClient, machine: Machine) -> None:
    daemon = machine.main_pid(UNIT)
    os.kill(daemon, signal.SIGKILL)
    until(lambda: machine.main_pid(UNIT) not in (0, daemon))
    come_back(edge, machine)


def test_the_watchdog_kills_an_event_loop_that_does_not_turn(
    edge: EdgeClient, machine: Machine
) -> None:
    daemon = machine.main_pid(UNIT)
    os.kill(daemon, signal.SIGSTOP)
    until(lambda: machine.main_pid(UNIT) not in (0, daemon))
    assert "watchdog" in machine.journal(UNIT).lower()
    come_back(edge, machine)


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


def test_a_wrong_configuration_is_said_once(edge: EdgeClient, machine: Machine) -> None:
    config = machine.root / "etc/picospec/edge.toml"
    right = config.read_text()
    config.write_text(right.replace("threads = 1", "threads = 0"))
    machine.run("systemctl", "start", UNIT, check=False)
    until(lambda: machine.show(UNIT, "ActiveState") == "failed")
    assert machine.journal(UNIT).count("drafter.threads = 0 is not allowed") == 1
    config.write_text(right)
    machine.start(UNIT)
    come_back(edge, machine)


def test_an_upgrade_keeps_the_changed_configuration(
    edge: EdgeClient, machine: Machine, site: Site, tmp_path: Path
) -> None:
    daemon = machine.main_pid(UNIT)
    before = (machine.root / "etc/picospec/edge.toml").read_text()
    install(machine, newer(site.package, tmp_path))
    assert machine.run("dpkg-query", "--show", "--showformat=${Version}", UNIT) == "0.1.0+next"
    assert (machine.root / "etc/picospec/edge.toml").read_text() == before
    until(lambda: machine.main_pid(UNIT) not in (0, daemon))
    come_back(edge, machine)


def newer(package: Path, folder: Path) -> Path:
    """The same package under a later version."""
    subprocess.run(["dpkg-deb", "--raw-extract", package, folder / "tree"], check=True)
    control = folder / "tree/DEBIAN/control"
    control.write_text(control.read_text().replace("Version: 0.1.0", "Version: 0.1.0+next"))
    made = folder / "picospec-edge_next.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--build", folder / "tree", made], check=True)
    return made


def test_purging_leaves_nothing(edge: EdgeClient, machine: Machine, before: set[str]) -> None:
    assert paths(machine.root) - before
    machine.run("apt-get", "purge", "--yes", UNIT)
    assert paths(machine.root) == before
    listed = machine.run("systemctl", "list-unit-files", f"{UNIT}*", check=False)
    assert "0 unit files listed" in listed
