"""sd_notify(3) against a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from picospec.service_manager import ServiceManager


@pytest.fixture
def manager_socket(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def test_ready_status_and_stopping_are_told(manager_socket: socket.socket) -> None:
    manager = ServiceManager.from_environ({"NOTIFY_SOCKET": manager_socket.getsockname()})
    manager.ready("serving on port 8080")
    manager.status("2 answers")
    manager.stopping("ending")
    assert [manager_socket.recv(1024) for _ in range(3)] == [
        b"READY=1\nSTATUS=serving on port 8080",
        b"STATUS=2 answers",
        b"STOPPING=1\nSTATUS=ending",
    ]


def test_an_abstract_socket_is_reached() -> None:
    name = f"picospec-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(5)
        ServiceManager(f"@{name}").status("here")
        assert sock.recv(1024) == b"STATUS=here"


def test_without_a_manager_nothing_happens() -> None:
    manager = ServiceManager.from_environ({})
    manager.ready("serving")
    asyncio.run(manager.feed_watchdog(lambda: ""))  # ends at once: nobody waits for it


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    ServiceManager(str(tmp_path / "nobody")).ready("serving")


def test_the_watchdog_is_fed_while_there_is_no_problem(manager_socket: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": manager_socket.getsockname(), "WATCHDOG_USEC": "30000"}
    problems = iter(["", "", "the drafter hangs"])

    async def feed() -> None:
        with pytest.raises(RuntimeError):  # what StopIteration becomes inside a coroutine
            await ServiceManager.from_environ(environ).feed_watchdog(lambda: next(problems))

    asyncio.run(feed())
    assert [manager_socket.recv(1024) for _ in range(3)] == [
        b"WATCHDOG=1",
        b"WATCHDOG=1",
        b"STATUS=the drafter hangs",
    ]


def test_a_watchdog_meant_for_another_process_is_left_alone(
    manager_socket: socket.socket,
) -> None:
    manager = ServiceManager.from_environ(
        {
            "NOTIFY_SOCKET": manager_socket.getsockname(),
            "WATCHDOG_USEC": "30000",
            "WATCHDOG_PID": "1",
        }
    )
    asyncio.run(manager.feed_watchdog(lambda: ""))
    manager_socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager_socket.recv(1024)
