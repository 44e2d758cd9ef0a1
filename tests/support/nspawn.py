"""A machine with a real systemd: a Debian root, booted by systemd-nspawn.

It shares the host's network, so both sides reach each other on loopback. Needs root, mmdebstrap and
systemd-nspawn.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

from tests.support.daemons import until

SUITE = "bookworm"
# vLLM's CPU build needs libnuma1, and a compiler with Python's headers.
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,python3-dev,g++,ca-certificates,libnuma1"
BOOT_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 180.0


def make_root(root: Path, packages: str = PACKAGES) -> None:
    """A Debian root, in 20 s or so. Raises CalledProcessError."""
    # mmdebstrap takes over the machine's own package sources and proxies.
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=apt", f"--include={packages}", SUITE, str(root)],
        check=True,
    )
    (root / "var/log/journal").mkdir(exist_ok=True)


class Machine:
    """A booted root. `binds` maps folders of the host to where they are read in it."""

    def __init__(self, root: Path, binds: Mapping[Path, str]) -> None:
        self.root = root
        self._binds = binds
        self._leader = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [
                "systemd-nspawn", "--quiet", "--directory", str(self.root), "--boot",
                "--keep-unit", "--register=no", "--console=pipe",
                *(f"--bind-ro={source}:{target}" for source, target in self._binds.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=(self.root.parent / "console.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._leader = until(self._find_leader, BOOT_TIMEOUT_S)
            until(self._is_up, BOOT_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._leader:
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("systemctl", "poweroff")
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.kill()
            self._process.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """What `command` prints in the machine. Raises CalledProcessError, with the output."""
        done = subprocess.run(
            ["nsenter", "--all", f"--target={self._leader}", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"},
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}")
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit)

    def main_pid(self, unit: str) -> int:
        """Of the unit's main process, as the host numbers it; 0 if there is none."""
        inside = int(self.show(unit, "MainPID") or 0)
        for process in psutil.Process(self._leader).children(recursive=True):
            with contextlib.suppress(OSError):
                if inside and _innermost_pid(process.pid) == inside:
                    return int(process.pid)
        return 0

    def child(self, unit: str, what: str) -> int:
        """The process below the unit's main process that has `what` in its command line or name."""
        for process in psutil.Process(self.main_pid(unit)).children(recursive=True):
            if what in " ".join(process.cmdline()) or what in process.name():
                return int(process.pid)
        raise AssertionError(f"{unit} has no process {what}")

    def start(self, unit: str) -> None:
        """Raises AssertionError with the unit's journal if it does not start."""
        said = self.run("systemctl", "start", unit, check=False)
        if said:
            raise AssertionError(f"{said}\n{self.journal(unit)}")

    def wait_active(self, unit: str, timeout_s: float = 120.0) -> None:
        """Until the unit is active, or AssertionError with its journal."""
        deadline_s = time.monotonic() + timeout_s
        while self.show(unit, "ActiveState") != "active":
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{unit} is not active\n{self.journal(unit)}")
            time.sleep(0.2)

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}")

    def drop_in(self, unit: str, text: str) -> None:
        """Settings of a unit that the next boot does not know."""
        folder = f"/run/systemd/system/{unit}.service.d"
        self.run("sh", "-c", 'mkdir -p "$1" && printf %s "$2" >"$1/test.conf"', "sh", folder, text)
        self.run("systemctl", "daemon-reload")

    def write(self, path: str, text: str) -> None:
        """A file in the machine, with its folders."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def _find_leader(self) -> int:
        if self._process.poll() is not None:
            console = (self.root.parent / "console.log").read_text(errors="replace")
            raise AssertionError(f"systemd-nspawn ended: {console}")
        children = psutil.Process(self._process.pid).children()
        return children[0].pid if children else 0

    def _is_up(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False)
        return state in ("running", "degraded")


def missing_tools() -> list[str]:
    """What this host lacks for a `Machine`."""
    tools = [tool for tool in ("mmdebstrap", "systemd-nspawn", "nsenter") if not shutil.which(tool)]
    return tools + ([] if os.geteuid() == 0 else ["root"])


def _innermost_pid(pid: int) -> int:
    """How a process's own namespace numbers it. Raises OSError when it is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[-1]) for line in lines if line.startswith("NSpid:"))
