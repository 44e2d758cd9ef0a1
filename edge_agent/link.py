"""The link to the cloud: one gRPC channel, one stream for each generation.

The rules of this file:
1. `send` never blocks: frames wait in a bounded outbox; when it overflows the stream is lost.
2. Every wait has an end: connecting, a question's answer, a connection that fell silent
   (keepalive).
3. `aclose` frees the stream at once, here and in the cloud.
4. gRPC's failures leave as ours (`picospec/protocol/errors.py`); those that are CloudUnavailable
   may be resumed on a new stream.

`Link` and `Stream` are the seam to the pipeline, `ScriptedLink` the double.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

# The drafter is restarted while gRPC runs, whose fork handlers crash the child now and then.
# Read when gRPC is imported; without them fork and exec is safe.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from picospec import PROTOCOL_VERSION
from picospec.errors import CloudUnavailable, ConfigError, PicoSpecError
from picospec.protocol import codec, validation
from picospec.protocol.errors import error_of_status
from picospec.protocol.messages import CloudFrame, EdgeFrame, ModelCard
from picospec.protocol.outbox import Outbox, OutboxFull

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
KEEPALIVE_TIME_S = 10.0  # of silence, then a ping; the cloud allows one in 5 s
KEEPALIVE_TIMEOUT_S = 5.0
RECONNECT_BACKOFF_MAX_S = 2.0
# HTTP/2's usual 64 KiB hold a whole distribution back for two round trips.
RECEIVE_WINDOW_BYTES = 1024 * 1024

_STATUS_DETAILS = "grpc-status-details-bin"

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.lookahead_bytes", RECEIVE_WINDOW_BYTES),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", int(RECONNECT_BACKOFF_MAX_S * 1000)),
    ("grpc.enable_retries", 0),  # a generation resumes by itself, with what it knows
    ("grpc.use_local_subchannel_pool", 1),
)


class Stream(Protocol):
    """One generation's stream."""

    @property
    def bytes_up(self) -> int: ...  # gRPC message payloads

    @property
    def bytes_down(self) -> int: ...

    def send(self, frame: EdgeFrame) -> None:
        """Queue a frame. Never blocks or raises; failures come out of `receive`."""

    async def receive(self) -> CloudFrame | None:
        """The next frame; None when the cloud has ended the stream well.

        Raises CloudUnavailable (the stream is lost), CapacityError, RemoteProtocolError,
        ConfigError.
        """

    async def aclose(self) -> None:
        """Cancel the stream; idempotent."""


class Link(Protocol):
    """Opens streams."""

    def open_stream(self, request_id: str) -> Stream:
        """Never blocks; a cloud that cannot be reached shows in `receive`."""


class CloudLink:
    """A channel to one cloud server. To be made and used on a running event loop."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls_ca: str | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        """`tls_ca`: PEM file of the authority to trust; without it there is no TLS.

        Raises ConfigError if the file cannot be read.
        """
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._channel = _channel(address, tls_ca)
        self._get_model: Any = self._channel.unary_unary(codec.GET_MODEL_METHOD)
        self._generate: Any = self._channel.stream_stream(codec.GENERATE_METHOD)
        self._streams: set[LinkStream] = set()

    @property
    def open_streams(self) -> int:
        """Streams that were opened and not closed yet."""
        return len(self._streams)

    @property
    def reachable(self) -> bool:
        """Whether the connection stands at this moment."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def get_model(self) -> ModelCard:
        """Ask what is served. Raises as `Stream.receive` does."""
        try:
            payload = await self._get_model(
                codec.model_request_to_bytes(PROTOCOL_VERSION),
                metadata=self._metadata,
                timeout=self._connect_timeout_s,
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self._address) from error
        card = codec.model_from_bytes(payload)
        validation.check_card(card)
        return card

    def open_stream(self, request_id: str) -> LinkStream:
        call = self._generate(metadata=(*self._metadata, ("x-request-id", request_id)))
        stream = LinkStream(call, self._address, self._connect_timeout_s, self._streams.discard)
        self._streams.add(stream)
        return stream

    async def close(self) -> None:
        """Close the channel; streams still open are cancelled."""
        await self._channel.close()


class LinkStream:
    """A `Stream` over gRPC. A writer task drains the queue of frames."""

    def __init__(
        self,
        call: Any,
        address: str,
        connect_timeout_s: float,
        on_closed: Callable[[LinkStream], None] = lambda stream: None,
    ) -> None:
        self.bytes_up = 0
        self.bytes_down = 0
        self._call = call
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._on_closed = on_closed
        self._connected = False
        self._overflowed = False
        self._outbox = Outbox()
        self._has_pending = asyncio.Event()
        self._writer = asyncio.create_task(self._write(), name="link-writer")

    def send(self, frame: EdgeFrame) -> None:
        try:
            self._outbox.put(frame)
        except OutboxFull:
            self._overflowed = True
            self._call.cancel()
            return
        self._has_pending.set()

    async def receive(self) -> CloudFrame | None:
        try:
            if not self._connected:
                await self._connect()
            payload = await self._call.read()
            if payload is not grpc.aio.EOF:
                self.bytes_down += len(payload)
                return codec.cloud_from_bytes(payload)
            code = await self._call.code()
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self._address) from error
        except asyncio.CancelledError:
            if not self._overflowed:
                raise
            raise CloudUnavailable(f"The cloud at {self._address} takes no more frames") from None
        if code is grpc.StatusCode.OK:
            return None
        raise error_of_status(
            code.name,
            await self._call.details() or "",
            self._address,
            retry_after_s=_retry_after_s(await self._call.trailing_metadata()),
        )

    async def aclose(self) -> None:
        self._call.cancel()
        self._writer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._writer
        self._on_closed(self)

    async def _connect(self) -> None:
        """Wait until the stream stands. Raises CloudUnavailable when that takes too long."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._call.wait_for_connection()
        except TimeoutError:
            raise CloudUnavailable(
                f"No connection to the cloud at {self._address} within "
                f"{self._connect_timeout_s:g} s"
            ) from None
        self._connected = True

    async def _write(self) -> None:
        # Whatever fails here fails the call, and `receive` says so.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                while not self._outbox:
                    self._has_pending.clear()
                    await self._has_pending.wait()
                payload = self._outbox.take()
                await self._call.write(payload)
                self.bytes_up += len(payload)


def error_of(error: grpc.aio.AioRpcError, address: str) -> PicoSpecError:
    """The failure of a call as ours."""
    return error_of_status(
        error.code().name,
        error.details() or "",
        address,
        retry_after_s=_retry_after_s(error.trailing_metadata()),
    )


def _retry_after_s(metadata: Iterable[tuple[str, Any]] | None) -> float | None:
    """The hint in a status's details (google.rpc.RetryInfo); None without a readable one."""
    try:
        for key, value in metadata or ():
            if key != _STATUS_DETAILS:
                continue
            for detail in status_pb2.Status.FromString(value).details:
                retry = error_details_pb2.RetryInfo()
                if detail.Unpack(retry):
                    return float(retry.retry_delay.ToNanoseconds() / 1e9)
    except DecodeError:
        pass  # the status itself is told all the same
    return None


def _channel(address: str, tls_ca: str | None) -> grpc.aio.Channel:
    if tls_ca is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    try:
        authority = Path(tls_ca).read_bytes()
    except OSError as error:
        raise ConfigError(f"cloud.tls_ca = {tls_ca!r} cannot be read: {error.strerror}") from error
    return grpc.aio.secure_channel(
        address, grpc.ssl_channel_credentials(authority), options=_OPTIONS
    )


class ScriptedLink:
    """A double: every stream's frames are answered by `answer(stream, frame)`, if given.

    The answerer calls `stream.feed`; tests may do so themselves.
    """

    def __init__(self, answer: Callable[[ScriptedStream, EdgeFrame], None] | None = None) -> None:
        self.streams: list[ScriptedStream] = []
        self._answer = answer

    def open_stream(self, request_id: str) -> ScriptedStream:
        stream = ScriptedStream(self._answer, request_id)
        self.streams.append(stream)
        return stream


class ScriptedStream:
    """A stream in memory."""

    def __init__(
        self, answer: Callable[[ScriptedStream, EdgeFrame], None] | None, request_id: str
    ) -> None:
        self.request_id = request_id
        self.sent: list[EdgeFrame] = []
        self.bytes_up = 0
        self.bytes_down = 0
        self.closed = False
        self._answer = answer
        self._encoder = codec.EdgeEncoder()
        self._inbound: asyncio.Queue[CloudFrame | PicoSpecError | None] = asyncio.Queue()

    def feed(self, *frames: CloudFrame | PicoSpecError | None) -> None:
        """What `receive` returns or raises next."""
        for frame in frames:
            self._inbound.put_nowait(frame)

    def send(self, frame: EdgeFrame) -> None:
        self.sent.append(frame)
        self.bytes_up += len(self._encoder.to_bytes(frame))
        if self._answer is not None and not self.closed:
            self._answer(self, frame)

    async def receive(self) -> CloudFrame | None:
        frame = await self._inbound.get()
        if isinstance(frame, PicoSpecError):
            raise frame
        return frame

    async def aclose(self) -> None:
        self.closed = True
