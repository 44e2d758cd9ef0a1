"""Clients that go away, too many of them, too slow ones, and the end of the daemon."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support.edge_api import CARD, EdgeApi, eventually, serve

LONG = [5] * 150
BODY = {"model": CARD.model_id, "prompt": "hello", "max_tokens": 150}


async def post(edge: EdgeApi, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = await edge.http.post("/v1/completions", json=body)
    return response.status_code, response.json()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_generation(stream: bool) -> None:
    async with serve(LONG, delay_s=0.02) as edge:
        host, port = edge.base_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(BODY | {"stream": stream}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await writer.drain()
        await eventually(lambda: len(edge.generator.requests) == 1)
        if stream:
            await reader.readuntil(b"data: ")
        writer.transport.abort()
        await eventually(lambda: edge.generator.closed == 1)
        await eventually(lambda: edge.requests_total("completions", "cancelled") == 1)
        assert edge.gate.active == 0


async def test_a_client_that_goes_away_before_its_body_is_whole() -> None:
    async with serve() as edge:
        host, port = edge.base_url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        await eventually(lambda: edge.gate.active == 1)
        writer.transport.abort()
        await eventually(lambda: edge.gate.active == 0)
        assert edge.generator.requests == []


async def test_no_more_requests_than_allowed() -> None:
    async with serve(LONG, delay_s=0.005, max_concurrent=2) as edge:
        running = [asyncio.ensure_future(post(edge, BODY)) for _ in range(2)]
        await eventually(lambda: edge.gate.active == 2)
        response = await edge.http.post("/v1/completions", json=BODY)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "overloaded"
        assert [status for status, _ in await asyncio.gather(*running)] == [200, 200]
        assert (await post(edge, BODY))[0] == 200


async def test_a_request_ends_in_time() -> None:
    async with serve(LONG, delay_s=0.02, timeout_s=0.3) as edge:
        status, answer = await post(edge, BODY)
        assert (status, answer["error"]["type"]) == (504, "timeout")
        response = await edge.http.post("/v1/completions", json=BODY | {"stream": True})
        assert response.status_code == 200
        last = response.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout"
        await eventually(lambda: edge.requests_total("completions", "timeout") == 2)
        assert edge.generator.closed == 2


async def test_shutdown_lets_nobody_in_and_tells_those_inside() -> None:
    async with serve(LONG, delay_s=0.02) as edge:
        whole = asyncio.ensure_future(post(edge, BODY))
        stream = asyncio.ensure_future(
            edge.http.post("/v1/completions", json=BODY | {"stream": True})
        )
        await eventually(lambda: len(edge.generator.requests) == 2)
        await asyncio.sleep(0.05)
        edge.gate.closing = True
        assert (await post(edge, BODY))[0] == 503
        assert (await edge.http.get("/health")).status_code == 503
        edge.gate.abort_all()
        status, answer = await whole
        assert (status, answer["error"]["message"]) == (503, "The server is shutting down.")
        assert "The server is shutting down." in (await stream).text
        await eventually(lambda: edge.gate.active == 0)
        assert edge.generator.closed == 2


async def test_one_request_id_is_not_two_sessions() -> None:
    async with serve(LONG, delay_s=0.002) as edge:
        headers = {"X-Request-Id": "same"}
        answers = await asyncio.gather(
            *(edge.http.post("/v1/completions", json=BODY, headers=headers) for _ in range(4))
        )
        assert all(answer.status_code == 200 for answer in answers)
        assert len({request.request_id for request in edge.generator.requests}) == 4


async def test_nothing_is_left_after_many_requests_of_which_a_third_is_cancelled() -> None:
    async with serve(LONG, delay_s=0.001, max_concurrent=64) as edge:
        before = len(asyncio.all_tasks())
        requests = [
            asyncio.ensure_future(post(edge, BODY | {"max_tokens": 1 + 5 * (index % 20)}))
            for index in range(60)
        ]
        await asyncio.sleep(0.05)
        for request in requests[::3]:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await eventually(lambda: edge.gate.active == 0)
        assert edge.generator.closed == len(edge.generator.requests)
        await edge.http.aclose()
        await eventually(lambda: len(asyncio.all_tasks()) <= before)
