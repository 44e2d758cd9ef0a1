"""`python -m bench.wan`: the relay as a process that takes commands."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.wan.__main__ import Conditions, _parse
from bench.wan.line import LineConditions

ROOT = Path(__file__).resolve().parents[3]
HOST = "127.0.0.1"
TIMEOUT_S = 30.0


@pytest.fixture
def echo_port() -> Iterator[int]:
    with socket.create_server((HOST, 0)) as server:

        def serve() -> None:
            while True:
                try:
                    accepted, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(accepted,), daemon=True).start()

        def answer(accepted: socket.socket) -> None:
            with accepted:
                try:
                    while data := accepted.recv(65536):
                        accepted.sendall(data)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def start(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.wan", *flags],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Process:
    """The relay in front of `port`, and one connection through it."""

    def __init__(self, port: int, *flags: str) -> None:
        self._process = start("--target", f"{HOST}:{port}", *flags)
        self.port: int = self.answer()["port"]
        self.client = self.connect()

    def connect(self) -> socket.socket:
        return socket.create_connection((HOST, self.port), timeout=TIMEOUT_S)

    def tell(self, command: Any) -> None:
        assert self._process.stdin is not None
        text = command if isinstance(command, str) else json.dumps(command)
        print(text, file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def counts(self) -> Any:
        """Also says that the commands before it have been obeyed."""
        self.tell({"counts": True})
        return self.answer()

    def round_trip_s(self, num_bytes: int = 4) -> float:
        started_s, received = time.monotonic(), 0
        self.client.sendall(bytes(num_bytes))
        while received < num_bytes:
            data = self.client.recv(65536)
            assert data
            received += len(data)
        return time.monotonic() - started_s

    def end(self) -> str:
        """The rest of what it says. Its input ends, and so does it."""
        self.client.close()
        out, err = self._process.communicate(timeout=TIMEOUT_S)
        assert self._process.returncode == 0, err
        assert err == ""
        return out

    def kill(self) -> None:
        self.client.close()
        self._process.kill()
        self._process.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def relay(echo_port: int) -> Iterator[Process]:
    process = Process(echo_port, "--rtt-ms", "20")
    yield process
    process.kill()


def test_its_delay_and_its_counts(relay: Process) -> None:
    assert min(relay.round_trip_s() for _ in range(5)) >= 0.02
    assert relay.counts() == {"bytes_up": 20, "bytes_down": 20}
    assert relay.end() == ""


def test_conditions_change_by_command(relay: Process) -> None:
    relay.round_trip_s()
    relay.tell({"rtt_ms": 80, "jitter_ms": 1})
    relay.counts()
    assert relay.round_trip_s() >= 0.08
    relay.tell({"rtt_ms": 0, "jitter_ms": 0, "kbit_s": 80})
    relay.counts()
    assert relay.round_trip_s(1000) >= 0.1
    relay.tell({"kbit_s": None})
    relay.counts()
    assert min(relay.round_trip_s(1000) for _ in range(20)) < 0.1


def test_cut_by_command(relay: Process) -> None:
    relay.round_trip_s()
    relay.tell({"cut": 60})
    with pytest.raises(ConnectionResetError):
        relay.client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        relay.connect()
    relay.tell({"black_hole": False})
    relay.counts()
    relay.client.close()
    relay.client = relay.connect()
    relay.round_trip_s()


def test_black_hole_by_command(relay: Process) -> None:
    relay.round_trip_s()
    relay.tell({"black_hole": True})
    relay.counts()
    relay.client.sendall(b"x")
    relay.client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        relay.client.recv(1)
    relay.client.settimeout(TIMEOUT_S)
    relay.tell({"black_hole": False})
    assert relay.client.recv(1) == b"x"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no json", "Expecting value"),
        ([1], "JSON object"),
        ({}, "at least one key"),
        ({"rtt": 5}, "unknown command 'rtt'"),
        ({"rtt_ms": "5"}, "rtt_ms cannot be '5'"),
        ({"rtt_ms": True}, "rtt_ms cannot be True"),
        ({"rtt_ms": None}, "rtt_ms cannot be None"),
        ({"black_hole": 1}, "black_hole cannot be 1"),
        ({"cut": -1}, "cut must be"),
        ({"cut": float("nan")}, "cut must be"),
    ],
)
def test_commands_that_are_refused(command: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _parse(command if isinstance(command, str) else json.dumps(command))


def test_a_refused_command_changes_nothing(relay: Process) -> None:
    relay.round_trip_s()
    relay.tell({"rtt_ms": -5, "cut": 1})
    assert "delay_s" in relay.answer()["error"]
    relay.tell("nonsense")
    assert "error" in relay.answer()
    assert relay.round_trip_s() >= 0.02


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--target", "nowhere", "--rtt-ms", "5"], "HOST:PORT"),
        (["--target", "h:70000", "--rtt-ms", "5"], "HOST:PORT"),
        (["--target", "h:7"], "--rtt-ms"),
        (["--target", "h:7", "--rtt-ms", "-1"], "delay_s"),
        (["--target", "h:7", "--rtt-ms", "1", "--kbit-s", "0"], "bandwidth_bps"),
        (["--target", "h:7", "--rtt-ms", "1", "--port", "99999"], "0-65535"),
    ],
)
def test_bad_arguments_are_named(flags: list[str], reason: str) -> None:
    process = start(*flags)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert reason in err
    assert "Traceback" not in err


def test_units() -> None:
    assert Conditions(50, 5, kbit_s=100).link() == LineConditions(
        0.025, 0.005, bandwidth_bps=100_000
    )
    assert Conditions().link() == LineConditions()
