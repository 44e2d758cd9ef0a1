"""Framing between the event loop and the worker: a 4-byte little-endian length, a pickle.

Pickle is sound here because both ends are our own processes joined by an inherited
socketpair that no one else can reach. Never point it at anything else.
"""

import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16


def encode(message: object) -> bytes:
    payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


class Decoder:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def is_within(self) -> bool:
        """Whether the rest of a message is still to come."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[Any]:
        """Take received bytes; the messages completed by them, in order."""
        self._buffer += data
        messages, start = [], 0
        while len(self._buffer) >= start + _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(self._buffer, start)[0]
            if len(self._buffer) < end:
                break
            messages.append(pickle.loads(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return messages


class WorkerChannel:
    """The worker's end: blocking, except where asked not to."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._decoder = Decoder()

    def send(self, message: object) -> None:
        """Raises OSError when the parent is gone."""
        self._socket.sendall(encode(message))

    def receive(self, *, block: bool) -> list[Any]:
        """What has arrived; at least one message if `block`. Raises EOFError at the end.

        A message that has begun is waited for: it is being written, and a whole distribution is
        more than a socket holds, so between two tokens it would come bit by bit.
        """
        messages: list[Any] = []
        while True:
            wait = (block and not messages) or self._decoder.is_within
            try:
                data = self._socket.recv(_READ_BYTES, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            if not data:
                raise EOFError
            messages += self._decoder.feed(data)
