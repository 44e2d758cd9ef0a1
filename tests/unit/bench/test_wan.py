"""The WAN relay between real sockets. Times are bounded below strictly, above generously."""

from __future__ import annotations

import asyncio
import random
import socket
import statistics
import time

import pytest

from bench.wan import LineConditions, WanRelay
from bench.wan.alarm import Alarm
from bench.wan.relay import BUFFER_BYTES, SOCKET_BUFFER_BYTES
from tests.support.wan_streams import HOST, connected, relayed, round_trip_s, serving, settled


async def test_a_round_trip_takes_the_rtt_and_little_more() -> None:
    async with relayed(LineConditions.symmetric(0.02)) as relay, connected(relay) as streams:
        await round_trip_s(streams)
        times_s = [await round_trip_s(streams) for _ in range(20)]
    assert min(times_s) >= 0.02
    assert statistics.median(times_s) < 0.02 * 2


async def test_each_way_has_its_own_delay() -> None:
    arrived_s: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(100):
            arrived_s.append(time.monotonic())
            writer.write(b"!")

    async with (
        serving(answer) as port,
        WanRelay(HOST, port, LineConditions(0.06), LineConditions(0.005)) as relay,
        connected(relay) as (reader, writer),
    ):
        for _ in range(2):  # the first one pays for the handshake
            sent_s = time.monotonic()
            writer.write(b"?")
            await reader.readexactly(1)
            received_s = time.monotonic()
    up_s, down_s = arrived_s[-1] - sent_s, received_s - arrived_s[-1]
    assert up_s >= 0.06
    assert 0.005 <= down_s < up_s


async def test_the_first_data_waits_for_the_handshake() -> None:
    async with relayed(LineConditions.symmetric(0.05)) as relay:
        started_s = time.monotonic()
        async with connected(relay) as streams:
            await round_trip_s(streams)
            assert 0.1 <= time.monotonic() - started_s < 0.1 * 3
            assert await round_trip_s(streams) >= 0.05


async def test_a_server_that_speaks_first_is_heard_after_two_round_trips() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async with relayed(LineConditions.symmetric(0.05), greet) as relay:
        started_s = time.monotonic()
        async with connected(relay) as (reader, _):
            assert await reader.read() == b"hello"
        assert 0.1 <= time.monotonic() - started_s < 0.1 * 3


async def test_an_absent_server_is_a_reset_after_a_round_trip() -> None:
    with socket.socket() as nobody:
        nobody.bind((HOST, 0))
        link = LineConditions.symmetric(0.05)
        async with WanRelay(HOST, nobody.getsockname()[1], link, link) as relay:
            started_s = time.monotonic()
            async with connected(relay) as (reader, _):
                with pytest.raises(ConnectionResetError):
                    await reader.read()
            assert time.monotonic() - started_s >= 0.05


async def test_jitter_keeps_the_order_of_every_byte() -> None:
    data = random.Random(3).randbytes(20_000)

    async with (
        relayed(LineConditions(0.001, jitter_s=0.01)) as relay,
        connected(relay) as (reader, writer),
    ):
        for start in range(0, len(data), 500):
            writer.write(data[start : start + 500])
            await asyncio.sleep(0.0005)
        assert await reader.readexactly(len(data)) == data
        assert (relay.bytes_up, relay.bytes_down) == (len(data), len(data))


async def test_bandwidth_is_never_exceeded_and_nearly_used() -> None:
    """A receiver may never have more than the line could carry since the first byte was sent."""
    rate_bps, num_bytes = 4e6, 100_000
    async with (
        relayed(LineConditions(bandwidth_bps=rate_bps)) as relay,
        connected(relay) as (reader, writer),
    ):
        started_s, received = time.monotonic(), 0
        writer.write(bytes(num_bytes))
        while received < num_bytes:
            received += len(await reader.read(65536))
            assert received * 8 <= rate_bps * (time.monotonic() - started_s)
        assert time.monotonic() - started_s < 3 * num_bytes * 8 / rate_bps


async def test_connections_share_the_bandwidth() -> None:
    rate_bps, num_bytes = 4e6, 50_000
    async with (
        relayed(LineConditions(bandwidth_bps=rate_bps)) as relay,
        connected(relay) as first,
        connected(relay) as second,
    ):
        started_s = time.monotonic()
        data = bytes(num_bytes)
        await asyncio.gather(round_trip_s(first, data), round_trip_s(second, data))
        assert time.monotonic() - started_s >= 2 * num_bytes * 8 / rate_bps


async def test_conditions_change_live() -> None:
    async with relayed(LineConditions()) as relay, connected(relay) as streams:
        await round_trip_s(streams)
        relay.set(up=LineConditions(0.05))
        assert await round_trip_s(streams) >= 0.05
        relay.set(down=LineConditions(0.05))
        assert await round_trip_s(streams) >= 0.1
        relay.set(up=LineConditions(bandwidth_bps=8000), down=LineConditions())
        assert await round_trip_s(streams, bytes(100)) >= 0.1
        streams[1].write(bytes(10_000))  # 10 s
        await asyncio.sleep(0.01)
        relay.set(up=LineConditions())
        assert len(await asyncio.wait_for(streams[0].readexactly(10_000), 5)) == 10_000


async def test_a_half_closed_connection_is_answered() -> None:
    async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])
        writer.close()

    async with (
        relayed(LineConditions.symmetric(0.01), answer_at_the_end) as relay,
        connected(relay) as (reader, writer),
    ):
        writer.write(b"abc")
        writer.write_eof()
        assert await reader.read() == b"cba"
        assert relay.num_connections == 0


async def test_a_reset_crosses_after_the_delay() -> None:
    heard: asyncio.Queue[float] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(1) == b"x"
        with pytest.raises(ConnectionResetError):
            await reader.read()
        heard.put_nowait(time.monotonic())
        writer.close()

    async with relayed(LineConditions.symmetric(0.06), listen) as relay:
        async with connected(relay) as (_, writer):
            writer.write(b"x")
            await asyncio.sleep(0.1)
            handle = writer.get_extra_info("socket")
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        reset_s = time.monotonic()
        assert await asyncio.wait_for(heard.get(), 5) - reset_s >= 0.03
        assert relay.num_connections == 0


async def test_a_stuck_line_stops_the_sender() -> None:
    """The relay holds its buffer and one more read, however much is written."""
    async with relayed(LineConditions()) as relay, connected(relay) as streams:
        await round_trip_s(streams)
        relay.black_hole()
        before = relay.bytes_up
        data = random.Random(5).randbytes(16 << 20)
        streams[1].write(data)
        held = await settled(lambda: relay.bytes_up - before)
        assert BUFFER_BYTES < held <= BUFFER_BYTES + SOCKET_BUFFER_BYTES
        relay.restore()
        assert await asyncio.wait_for(streams[0].readexactly(len(data)), 60) == data


async def test_a_receiver_that_does_not_read_stops_the_sender() -> None:
    """Nothing is lost, and the relay holds no more than its buffer beside the kernel's."""
    go_on = asyncio.Event()
    total = 32 << 20

    async def read_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        writer.write(str(len(await reader.read(-1))).encode())
        writer.close()

    async with (
        relayed(LineConditions(0.001), read_late) as relay,
        connected(relay) as (reader, writer),
    ):
        writer.write(bytes(total))
        writer.write_eof()
        assert await settled(lambda: relay.bytes_up) < total
        go_on.set()
        assert int(await asyncio.wait_for(reader.read(), 60)) == total


async def test_nothing_is_left_open() -> None:
    before = len(asyncio.all_tasks())
    async with relayed(LineConditions.symmetric(10.0)) as relay:
        async with connected(relay) as (_, writer):
            writer.write(b"x")
            await asyncio.sleep(0.01)
        port = relay.port
    assert len(asyncio.all_tasks()) <= before + 1  # the server's handler may be ending
    with socket.socket() as again:
        again.bind((HOST, port))


async def test_a_taken_port_is_refused() -> None:
    async with relayed(LineConditions()) as relay:
        with pytest.raises(OSError, match="in use"):
            await WanRelay(
                HOST, 1, LineConditions(), LineConditions(), listen_port=relay.port
            ).__aenter__()


async def test_an_alarm_is_never_early_and_can_be_put_off() -> None:
    rung: asyncio.Queue[float] = asyncio.Queue()
    alarm = Alarm(lambda: rung.put_nowait(time.monotonic()))
    try:
        for delay_s in (0.0, 1e-5, 1.1e-3, 0.01):
            when_s = time.monotonic() + delay_s
            alarm.set(when_s)
            assert await asyncio.wait_for(rung.get(), 5) >= when_s
        alarm.set(0.0)
        await asyncio.wait_for(rung.get(), 5)
        alarm.set(time.monotonic() + 0.01)
        alarm.set(None)
        await asyncio.sleep(0.03)
        assert rung.empty()
    finally:
        alarm.close()
