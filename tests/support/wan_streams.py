"""Streams through a WAN relay to a server in the same event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from bench.wan import LineConditions, WanRelay

HOST = "127.0.0.1"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """The port of a server that runs `handler` for each connection."""
    server = await asyncio.start_server(handler, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@contextlib.asynccontextmanager
async def relayed(link: LineConditions, handler: Handler = echo) -> AsyncIterator[WanRelay]:
    async with serving(handler) as port, WanRelay(HOST, port, link, link, seed=1) as relay:
        yield relay


@contextlib.asynccontextmanager
async def connected(relay: WanRelay) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(HOST, relay.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def round_trip_s(streams: Streams, data: bytes = b"ping") -> float:
    reader, writer = streams
    started_s = time.monotonic()
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    return time.monotonic() - started_s


async def until(condition: Callable[[], bool]) -> None:
    """Looks every millisecond. Raises AssertionError after 10 s."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen in time")


async def settled(value: Callable[[], int]) -> int:
    """What `value` is when it has not changed for 0.2 s."""
    last, since_s = -1, time.monotonic()
    while time.monotonic() - since_s < 0.2:
        if (now := value()) != last:
            last, since_s = now, time.monotonic()
        await asyncio.sleep(0.01)
    return last
