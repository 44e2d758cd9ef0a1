"""One relayed TCP connection: two sockets, and the handshake, data and ends between them.

The far socket is connected when the SYN has crossed. The client may speak when the SYN-ACK is
back, the server when the ACK has come: data flows one round trip after the connect, as over a
WAN. Only the connect itself is quicker: the kernel of this machine completes it at once.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import cast

LINGER_NOT = struct.pack("ii", 1, 0)  # close with a reset


class Direction(Enum):
    UP = auto()
    DOWN = auto()

    @property
    def other(self) -> Direction:
        return Direction.DOWN if self is Direction.UP else Direction.UP


class Signal(Enum):
    """What crosses the line beside data, and takes no bandwidth."""

    SYN = auto()
    SYN_ACK = auto()
    ACK = auto()
    FIN = auto()
    RST = auto()


@dataclass(frozen=True, slots=True)
class Parcel:
    connection: Connection
    direction: Direction
    content: bytes | Signal


class _End(asyncio.Protocol):
    """One of the two sockets. Says what it hears, and hears as it is told to `listen`.

    On uvloop it may hear a little before: there a new transport cannot be paused.
    """

    def __init__(
        self, buffer_bytes: int, hear: Callable[[bytes | Signal], None], drained: Callable[[], None]
    ) -> None:
        self._buffer_bytes = buffer_bytes
        self._hear = hear
        self._drained = drained
        self._transport: asyncio.Transport | None = None
        self._heard_all = False
        # What the relay holds of the direction that starts here.
        self.under_way_bytes = 0
        self.is_open = False  # the handshake has come so far
        self.early: list[bytes | Signal] = []  # heard before
        self.finished = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type
        self.listen(False)
        self._transport.set_write_buffer_limits(self._buffer_bytes)
        handle = self._transport.get_extra_info("socket")
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._hear(data)

    def eof_received(self) -> bool:
        self._heard_all = True
        self._hear(Signal.FIN)
        return True  # the other way stays open

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if exc is not None:
            self._hear(Signal.RST)

    def resume_writing(self) -> None:
        self._drained()

    @property
    def unsent_bytes(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def listen(self, reading: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._heard_all or reading == self._transport.is_reading():
            return
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def finish(self) -> None:
        """No more is written."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def close(self) -> None:
        """After what is still to be written."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            handle = self._transport.get_extra_info("socket")
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
            self._transport.abort()


class Connection:
    """`near` is the client's socket, `far` the server's.

    The relay holds at most `buffer_bytes` a direction, and the one read that exceeds them: then
    the sender is no longer read. `send` puts a parcel on its line, and `arrive` is called when it
    is over; `connect` opens the far socket and later calls `connected`; `over` is called once.
    """

    def __init__(
        self,
        buffer_bytes: int,
        send: Callable[[Parcel], None],
        connect: Callable[[Connection], None],
        over: Callable[[Connection], None],
    ) -> None:
        self._buffer_bytes = buffer_bytes
        self._send = send
        self._connect = connect
        self._over = over
        self._is_over = False
        self.near = self._end(Direction.UP)
        self.far = self._end(Direction.DOWN)
        self._ends = {Direction.UP: self.near, Direction.DOWN: self.far}  # by where they start

    def start(self) -> None:
        """The client has connected."""
        self._dispatch(Direction.UP, Signal.SYN)

    def connected(self, success: bool) -> None:
        """The server has taken the far socket, or nobody has."""
        self._dispatch(Direction.DOWN, Signal.SYN_ACK if success else Signal.RST)

    def arrive(self, direction: Direction, content: bytes | Signal) -> None:
        """`content` has crossed the line."""
        if self._is_over:
            return
        source, sink = self._ends[direction], self._ends[direction.other]
        if isinstance(content, bytes):
            source.under_way_bytes -= len(content)
            sink.write(content)
            self._admit(direction)
        elif content is Signal.SYN:
            self._connect(self)
        elif content is Signal.SYN_ACK:
            self._dispatch(Direction.UP, Signal.ACK)
            self._open(Direction.UP)
        elif content is Signal.ACK:
            self._open(Direction.DOWN)
        elif content is Signal.FIN:
            sink.finish()
            source.finished = True
            if sink.finished:
                self._end_with(_End.close)
        else:
            self.reset()

    def reset(self) -> None:
        """Both sockets, now."""
        self._end_with(_End.reset)

    def _end(self, direction: Direction) -> _End:
        """The socket from which `direction` starts, and to which the other one goes."""
        return _End(
            self._buffer_bytes // 2,
            lambda content: self._heard(direction, content),
            lambda: self._admit(direction.other),
        )

    def _end_with(self, part: Callable[[_End], None]) -> None:
        if not self._is_over:
            self._is_over = True
            part(self.near)
            part(self.far)
            self._over(self)

    def _heard(self, direction: Direction, content: bytes | Signal) -> None:
        source = self._ends[direction]
        if source.is_open:
            self._dispatch(direction, content)
        else:
            source.early.append(content)
            source.listen(False)

    def _dispatch(self, direction: Direction, content: bytes | Signal) -> None:
        if self._is_over:
            return
        if isinstance(content, bytes):
            self._ends[direction].under_way_bytes += len(content)
        self._send(Parcel(self, direction, content))
        self._admit(direction)

    def _open(self, direction: Direction) -> None:
        source = self._ends[direction]
        source.is_open = True
        early, source.early = source.early, []
        for content in early:
            self._dispatch(direction, content)
        self._admit(direction)

    def _admit(self, direction: Direction) -> None:
        """Read on, or no more, by what is held."""
        source = self._ends[direction]
        if not source.is_open:
            return
        held_bytes = source.under_way_bytes + self._ends[direction.other].unsent_bytes
        if held_bytes > self._buffer_bytes:
            source.listen(False)
        elif held_bytes <= self._buffer_bytes // 2:
            source.listen(True)
