"""The scheduler's way to the gRPC process: a socket of our own beside vLLM's.

A report goes out the moment something is decided, between two steps as well as after one; vLLM's
outputs come with steps only, and an empty step for their sake would empty vLLM's batch.
"""

import pickle
import tempfile
from pathlib import Path

import zmq
import zmq.asyncio

from cloud_server.engine.envelope import EngineReport


class ReportSender:
    """The scheduler's end. Never blocks: the reader is a process of ours on the same host."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def send(self, report: EngineReport) -> None:
        self._socket.send(pickle.dumps(report, pickle.HIGHEST_PROTOCOL), zmq.NOBLOCK)


class ReportReceiver:
    """The gRPC process's end, in a folder that only this user can enter."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="picospec-engine-")
        self.address = f"ipc://{Path(self._folder.name) / 'reports'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(self.address)

    async def receive(self) -> EngineReport:
        report: EngineReport = pickle.loads(await self._socket.recv())
        return report

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._folder.cleanup()
