"""The scheduler's way to the gRPC process: a Unix socket of our own beside vLLM's.

A report goes out the moment something is decided, between two steps as well as after one; vLLM's
outputs come with steps only, and an empty step for their sake would empty vLLM's batch. On one
core a message costs what it wakes: here one event loop, no thread of a messaging library.
"""

import asyncio
import pickle
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cloud_server.engine.envelope import EngineReport

_LENGTH = struct.Struct("!I")  # of the pickled report that follows


class ReportSender:
    """The scheduler's end.

    It waits while the reader's buffers are full: the reader is an event loop of ours on the same
    host that never waits for the engine.
    """

    def __init__(self, name: str) -> None:
        """`name` is the receiver's. Raises OSError if it does not listen."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(socket_path(name))

    def send(self, report: EngineReport) -> None:
        """Raises OSError if the reader has gone; then this process ends, too."""
        payload = pickle.dumps(report, pickle.HIGHEST_PROTOCOL)
        self._socket.sendall(_LENGTH.pack(len(payload)) + payload)


class ReportReceiver:
    """The gRPC process's end, in a folder that only this user can enter."""

    def __init__(self, take: Callable[[EngineReport], None]) -> None:
        self._take = take
        self._folder = tempfile.TemporaryDirectory(prefix="picospec-engine-")
        self.name = Path(self._folder.name).name
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """From now on a sender may connect."""
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _Reader(self._take), socket_path(self.name)
        )

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._folder.cleanup()


class ReportParser:
    """Makes reports of bytes, however they are cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[EngineReport]:
        """The reports that `data` completes."""
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
            if len(buffer) < end:
                return
            report: EngineReport = pickle.loads(buffer[_LENGTH.size : end])
            del buffer[:end]
            yield report


class _Reader(asyncio.Protocol):
    def __init__(self, take: Callable[[EngineReport], None]) -> None:
        self._take = take
        self._parser = ReportParser()

    def data_received(self, data: bytes) -> None:
        for report in self._parser.feed(data):
            self._take(report)


def socket_path(name: str) -> str:
    """Of the receiver called `name`."""
    return str(Path(tempfile.gettempdir()) / name / "reports")
