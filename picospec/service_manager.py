"""What a service manager hears of a daemon: sd_notify(3), without a library.

A daemon says READY when it serves, STOPPING when it ends, and feeds the watchdog as long as it
is really alive. Where no manager listens, all of this does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

WATCHDOG_PERIODS = 3  # chances to feed it before it bites

logger = logging.getLogger(__name__)


class ServiceManager:
    """The manager that started this process, if it wants to hear of it."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        """`address`: of a datagram socket, "@..." in the abstract namespace; "": nobody listens.

        `watchdog_s`: silence after which the manager kills the daemon; 0: never.
        """
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._watchdog_s = watchdog_s

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> ServiceManager:
        """As systemd tells it: NOTIFY_SOCKET, and WATCHDOG_USEC where WATCHDOG_PID is ours."""
        watched = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        timeout_us = environ.get("WATCHDOG_USEC", "0")
        watchdog_s = int(timeout_us) / 1e6 if watched and timeout_us.isdigit() else 0.0
        return cls(environ.get("NOTIFY_SOCKET", ""), watchdog_s)

    def ready(self, status: str) -> None:
        """The daemon serves."""
        self._tell(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """One line for `systemctl status`."""
        self._tell(f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """The daemon has begun to end."""
        self._tell(f"STOPPING=1\nSTATUS={status}")

    async def feed_watchdog(self, problem: Callable[[], str]) -> None:
        """Run until cancelled: the watchdog hears of every turn in which `problem()` is "".

        The event loop that runs this must turn, too: whatever blocks it starves the watchdog.
        """
        while self._address and self._watchdog_s:
            reason = problem()
            if reason:
                logger.error("the watchdog is not fed: %s", reason)
                self.status(reason)
            else:
                self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / WATCHDOG_PERIODS)

    def _tell(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode(), self._address)
        except OSError as error:  # a manager that is gone must not end the daemon
            logger.warning("the service manager cannot be told: %s", error.strerror or error)
