"""Cuts, refusals and black holes of the WAN relay."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time

import pytest
import uvloop

from bench.wan import LineConditions
from tests.support.relay import Relay
from tests.support.wan_streams import HOST, connected, relayed, round_trip_s, until


async def test_a_cut_resets_and_what_is_under_way_is_lost() -> None:
    received: list[bytes] = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionResetError):
            while data := await reader.read(100):
                received.append(data)
        writer.close()

    async with relayed(LineConditions(0.2), collect) as relay:
        async with connected(relay) as (reader, writer):
            writer.write(b"first")
            await until(lambda: received == [b"first"])
            writer.write(b"second")
            await until(lambda: relay.bytes_up == len(b"firstsecond"))
            relay.cut()
            with pytest.raises(ConnectionResetError):
                await reader.read()
        async with connected(relay) as (_, writer):
            writer.write(b"third")
            await until(lambda: len(received) == 2)
    assert received == [b"first", b"third"]


async def test_a_cut_reaches_connections_that_were_not_accepted_yet() -> None:
    async with relayed(LineConditions()) as relay:
        with socket.create_connection((HOST, relay.port), timeout=5) as client:
            relay.cut()
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(client.recv, 1)


def test_the_relay_works_on_uvloop() -> None:
    async def outage() -> None:
        async with asyncio.timeout(30):
            await conversation()

    async def conversation() -> None:
        async with relayed(LineConditions.symmetric(0.01)) as relay:
            async with connected(relay) as streams:
                await round_trip_s(streams)
                assert await round_trip_s(streams, bytes(3 << 20)) >= 0.01
                relay.cut(0.01)
                with pytest.raises(ConnectionResetError):
                    await streams[0].read()
            await asyncio.sleep(0.05)
            async with connected(relay) as streams:
                assert await round_trip_s(streams) >= 0.01

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(outage())


async def test_refused_as_long_as_asked_on_the_same_port() -> None:
    async with relayed(LineConditions()) as relay:
        started_s = time.monotonic()
        relay.cut(refuse_s=0.1)
        refusals = 0
        while True:
            try:
                async with connected(relay) as streams:
                    await round_trip_s(streams)
                break
            except ConnectionRefusedError:
                refusals += 1
                await asyncio.sleep(0.005)
        assert refusals
        assert 0.1 <= time.monotonic() - started_s < 5


async def test_a_refusal_without_end_ends_with_restore() -> None:
    async with relayed(LineConditions()) as relay:
        relay.cut(math.inf)
        relay.cut(math.inf)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(HOST, relay.port)
        relay.restore()
        relay.restore()
        async with connected(relay) as streams:
            await round_trip_s(streams)
        with pytest.raises(ValueError, match="refuse_s"):
            relay.cut(-1.0)


async def test_a_black_hole_holds_everything_and_tells_nobody() -> None:
    async with relayed(LineConditions.symmetric(0.01)) as relay, connected(relay) as streams:
        reader, writer = streams
        await round_trip_s(streams)
        relay.black_hole()
        writer.write(b"lost?")
        async with connected(relay) as late:  # its handshake is held as well
            late[1].write(b"late")
            reading = asyncio.create_task(reader.readexactly(5))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(reading), 0.1)
            restored_s = time.monotonic()
            relay.restore()
            assert await reading == b"lost?"
            assert time.monotonic() - restored_s >= 0.01
            assert await late[0].readexactly(4) == b"late"


def test_the_relay_in_a_thread_is_cut_and_mended() -> None:
    with socket.create_server((HOST, 0)) as server:
        threading.Thread(target=echo_twice, args=(server,), daemon=True).start()
        with Relay(server.getsockname()[1]) as relay:
            address = (HOST, relay.port)
            with socket.create_connection(address, timeout=5) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                relay.cut()
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, timeout=5)
            relay.mend()
            relay.mend()
            with socket.create_connection(address, timeout=5) as client:
                client.sendall(b"y")
                assert client.recv(1) == b"y"


def echo_twice(server: socket.socket) -> None:
    for _ in range(2):
        with contextlib.suppress(OSError):
            accepted, _ = server.accept()
            with accepted:
                while data := accepted.recv(100):
                    accepted.sendall(data)
