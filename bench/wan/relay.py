"""A TCP relay that behaves like a WAN, for machines where the kernel cannot emulate one.

Everything happens in one event loop; the methods are to be called there. The lines of the two
directions are shared by all connections, like an access link. What the kernel buffers at each
socket comes on top of the relay's own bound, as it does over a real network.
"""

import asyncio
import contextlib
import math
import random
import socket
import time
from collections.abc import Coroutine, Iterator
from typing import Any, Self

from bench.wan.alarm import Alarm
from bench.wan.connection import Connection, Direction, Parcel, Signal
from bench.wan.line import Line, LineConditions

HOST = "127.0.0.1"
SEGMENT_BYTES = 1448  # a TCP segment over Ethernet: what a slow line delivers at a time
BUFFER_BYTES = 1 << 20  # a connection and direction; also what can be in flight, like a window
SOCKET_BUFFER_BYTES = 1 << 18
BACKLOG = 128

Tasks = set[asyncio.Task[None]]


class WanRelay:
    """Relays connections made to `port` of loopback to `host`:`port`, as over `up` and `down`.

    `bytes_up` and `bytes_down` count the TCP payload that senders have put on the line, whether
    it has arrived or not. `seed` fixes the jitter.

    Entering it raises OSError if `listen_port` (0: any free one) is taken.
    """

    def __init__(
        self,
        host: str,
        port: int,
        up: LineConditions,
        down: LineConditions,
        seed: int = 0,
        *,
        listen_port: int = 0,
    ) -> None:
        self._target = (host, port)
        self._lines: dict[Direction, Line[Parcel]] = {
            direction: Line(link, random.Random(f"{seed} {direction.name}"))
            for direction, link in ((Direction.UP, up), (Direction.DOWN, down))
        }
        self._listen_port = listen_port
        self._connections: set[Connection] = set()
        self._accepting: Tasks = set()  # each takes a turn or two of the loop
        self._connecting: Tasks = set()
        self._listener: socket.socket | None = None
        self._end_of_refusal: asyncio.TimerHandle | None = None
        self._delivering = False
        self.port = 0
        self.bytes_up = 0
        self.bytes_down = 0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        # Bound and never listening: keeps the port ours while connections are refused.
        self._holder = _socket_on(self._listen_port)
        self.port = self._holder.getsockname()[1]
        self._alarm = Alarm(self._deliver)
        self._listen()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cut(math.inf)
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._accepting, *self._connecting, return_exceptions=True)
        self._alarm.close()
        self._holder.close()
        await asyncio.sleep(0)  # the transports close their sockets a turn after the reset

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def set(self, *, up: LineConditions | None = None, down: LineConditions | None = None) -> None:
        """Other conditions from now on, for what waits at the sender too; None: as before."""
        now_s = time.monotonic()
        for direction, link in ((Direction.UP, up), (Direction.DOWN, down)):
            if link is not None:
                self._lines[direction].set(link, now_s)
        self._deliver()

    def cut(self, refuse_s: float = 0.0) -> None:
        """Reset every connection, bytes under way included; refuse new ones for `refuse_s`.

        `math.inf`: until `restore`. Raises ValueError if it is negative.
        """
        if not refuse_s >= 0:
            raise ValueError(f"refuse_s must be at least 0, not {refuse_s}")
        self._stop_listening()  # this resets connections that were not accepted yet
        for connection in list(self._connections):
            connection.reset()
        for line in self._lines.values():
            line.clear()
        if refuse_s == 0:
            self._listen()
        elif refuse_s < math.inf:
            self._end_of_refusal = self._loop.call_later(refuse_s, self._listen)

    def black_hole(self) -> None:
        """Nothing arrives until `restore`, and nobody is told."""
        for line in self._lines.values():
            line.hold()

    def restore(self) -> None:
        """End a black hole, whose bytes are now sent again, and the refusal after a cut."""
        if self._listener is None:
            self._stop_listening()  # for its timer
            self._listen()
        now_s = time.monotonic()
        for line in self._lines.values():
            line.release(now_s)
        self._deliver()

    # -- the listener --

    def _listen(self) -> None:
        self._end_of_refusal = None
        self._listener = _socket_on(self.port)
        # Inherited by what is accepted: a slow line is to be felt by the sender.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _stop_listening(self) -> None:
        if self._end_of_refusal is not None:
            self._end_of_refusal.cancel()
            self._end_of_refusal = None
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        accepted.setblocking(False)
        connection = Connection(BUFFER_BYTES, self._send, self._connect, self._over)
        self._connections.add(connection)
        self._start(self._take(accepted, connection), self._accepting)

    async def _take(self, accepted: socket.socket, connection: Connection) -> None:
        await self._loop.connect_accepted_socket(lambda: connection.near, accepted)
        if connection in self._connections:
            connection.start()
        else:
            connection.near.reset()  # cut meanwhile

    # -- the connections --

    def _connect(self, connection: Connection) -> None:
        self._start(self._open_far(connection), self._connecting)

    async def _open_far(self, connection: Connection) -> None:
        success = False
        with contextlib.suppress(OSError):
            await self._loop.create_connection(lambda: connection.far, *self._target)
            success = True
        if connection in self._connections:
            connection.connected(success)
        else:
            connection.far.reset()  # cut meanwhile

    def _over(self, connection: Connection) -> None:
        self._connections.discard(connection)
        now_s = time.monotonic()
        for line in self._lines.values():
            line.discard(lambda parcel: parcel.connection is connection, now_s)

    def _start(self, work: Coroutine[Any, Any, None], tasks: Tasks) -> None:
        task = self._loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    # -- the lines --

    def _send(self, parcel: Parcel) -> None:
        now_s = time.monotonic()
        line = self._lines[parcel.direction]
        content = parcel.content
        if isinstance(content, bytes):
            if parcel.direction is Direction.UP:
                self.bytes_up += len(content)
            else:
                self.bytes_down += len(content)
            for part in _segments(content, line.link):
                line.push(Parcel(parcel.connection, parcel.direction, part), len(part), now_s)
        else:
            if content is Signal.RST:  # a sender that resets forgets what it had to send
                line.discard(lambda other: other.connection is parcel.connection, now_s)
            line.push(parcel, 0, now_s)
        self._deliver()

    def _deliver(self) -> None:
        """All that has arrived by now; the alarm is set for the rest."""
        if self._delivering:  # a delivery made a parcel: the loop below will see it
            return
        self._delivering = True
        try:
            delivered = True
            while delivered:
                delivered = False
                now_s = time.monotonic()
                for line in self._lines.values():
                    while (parcel := line.pop(now_s)) is not None:
                        delivered = True
                        parcel.connection.arrive(parcel.direction, parcel.content)
        finally:
            self._delivering = False
        times_s = [line.next_s for line in self._lines.values()]
        self._alarm.set(min((time_s for time_s in times_s if time_s is not None), default=None))


def _segments(data: bytes, link: LineConditions) -> Iterator[bytes]:
    """What of `data` arrives together: on a line of limited bandwidth, segment by segment."""
    size = len(data) if link.bandwidth_bps is None else SEGMENT_BYTES
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _socket_on(port: int) -> socket.socket:
    """Bound on loopback. Raises OSError if a socket listens there already."""
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setblocking(False)
        bound.bind((HOST, port))
    except BaseException:
        bound.close()
        raise
    return bound
