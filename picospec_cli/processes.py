"""Child processes that never outlive the command that started them."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from picospec_cli.console import CommandFailed, say, tail

HOST = "127.0.0.1"
STOP_GRACE_S = 20.0

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """In a child, before its program starts: have the kernel end it when the parent dies.

    SIGTERM, so that a daemon can still stop its own children. Linux only; a no-op elsewhere.
    """
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prepare_child(cores: Collection[int]) -> None:
    die_with_parent()
    if cores:
        os.sched_setaffinity(0, cores)


def divided_cores() -> tuple[set[int], set[int]]:
    """Cores for the cloud and for the edge; both empty (no limit) where there is only one.

    Two pools of threads on the same cores make each other wait at every barrier, so the edge,
    whose drafter computes with one thread, gets the last core and the cloud the others.
    """
    cores = sorted(os.sched_getaffinity(0))
    return (set(cores[:-1]), {cores[-1]}) if len(cores) > 1 else (set(), set())


def free_ports(count: int) -> list[int]:
    """Ports free at this moment; all are held until all are found, so they differ."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Daemon:
    """`python -m MODULE FLAGS` in a session of its own, so that Ctrl-C reaches only us.

    Its output goes to `log`, or with None to our own stderr. It computes on `cores`, if given.
    """

    def __init__(
        self,
        module: str,
        flags: Sequence[str],
        log: Path | None = None,
        cores: Collection[int] = (),
    ) -> None:
        self.name = module
        self._log = log
        with nullcontext(sys.stderr.fileno()) if log is None else log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=partial(_prepare_child, cores),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_alive(self) -> None:
        """Raises CommandFailed, with the end of the log, if the daemon has ended."""
        status = self._process.poll()
        if status is None:
            return
        end = ""
        if self._log is not None:
            end = f"; the end of {self._log}:\n{tail(self._log.read_text(errors='replace'))}"
        raise CommandFailed(f"{self.name} ended with status {status}{end}")

    def terminate(self) -> None:
        """Ask it to stop; `join` waits until it has."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def join(self, timeout_s: float) -> None:
        """Wait for the end, then kill what is left of its process group."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        if self._process.poll() is None:
            say(f"{self.name} did not stop within {timeout_s:.0f} s; killing it")
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def stop(daemons: Sequence[Daemon], grace_s: float = STOP_GRACE_S) -> None:
    """Stop all at once; those that take longer than `grace_s`, or a second Ctrl-C, are killed."""
    for daemon in daemons:
        daemon.terminate()
    deadline_s = time.monotonic() + grace_s
    for daemon in daemons:
        try:
            daemon.join(max(0.0, deadline_s - time.monotonic()))
        except (KeyboardInterrupt, SystemExit):
            deadline_s = 0.0
            daemon.join(0.0)
