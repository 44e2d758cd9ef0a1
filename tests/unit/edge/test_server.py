"""The daemon's life: start without a cloud, serve, and end in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_agent import config as edge_config
from edge_agent import server as server_module
from edge_agent.config import EdgeConfig
from edge_agent.generation import ScriptedGenerator
from edge_agent.server import EdgeServer
from picospec.errors import ConfigError
from picospec.protocol.messages import ModelCard
from tests.support.edge_api import CARD, eventually
from tests.support.tiny_tokenizer import TEMPLATE, tokenizer_json

CHAT = {"model": CARD.model_id, "messages": [{"role": "user", "content": "hello"}]}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return [
        "--server.port", "0", "--drafter.backend", "ngram", "--drafter.tokenizer", str(tmp_path),
        "--cloud.address", f"127.0.0.1:{closed_port()}", "--cloud.connect_timeout_s", "1",
    ]  # fmt: skip


@asynccontextmanager
async def running(config: EdgeConfig) -> AsyncIterator[tuple[EdgeServer, httpx.AsyncClient, Any]]:
    server = EdgeServer(config)
    life = asyncio.ensure_future(server.run())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
        try:
            yield server, http, life
        finally:
            server.stop()
            server.stop()
            await asyncio.wait_for(life, 10)


async def answers(http: httpx.AsyncClient) -> httpx.Response:
    for _ in range(100):
        try:
            return await http.get("/health", timeout=10)
        except httpx.TransportError:
            await asyncio.sleep(0.05)
    raise AssertionError("the daemon does not answer")


async def test_it_starts_without_a_cloud_and_says_so(flags: list[str]) -> None:
    async with running(edge_config.read(flags, {})) as (_, http, _life):
        health = await answers(http)
        assert health.status_code == 503
        assert health.json()["cloud"] == {"reachable": False, "model": None}
        assert health.json()["status"] == "unavailable"
        response = await http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert response.json()["error"]["type"] == "service_unavailable"


class FakeLink:
    """A cloud that serves CARD."""

    card: ModelCard = CARD

    def __init__(self, *args: Any, **options: Any) -> None: ...

    async def get_model(self) -> ModelCard:
        return self.card

    async def close(self) -> None: ...


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedGenerator:
    generator = ScriptedGenerator([5] * 100, delay_s=0.01)
    monkeypatch.setattr(server_module, "CloudLink", FakeLink)
    monkeypatch.setattr(server_module, "SpeculativeGenerator", lambda *args, **kw: generator)
    return generator


async def started(http: httpx.AsyncClient, generator: ScriptedGenerator) -> asyncio.Future[Any]:
    await answers(http)
    request = asyncio.ensure_future(
        http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 100}, timeout=20)
    )
    await eventually(lambda: len(generator.requests) == 1)
    return request


async def test_running_answers_end_before_the_daemon(
    flags: list[str], scripted: ScriptedGenerator
) -> None:
    async with running(edge_config.read(flags, {})) as (server, http, life):
        request = await started(http, scripted)
        server.stop()
        assert (await request).status_code == 200
        await asyncio.wait_for(asyncio.shield(life), 5)
        with pytest.raises(httpx.TransportError):
            await http.get("/health")


@pytest.mark.parametrize("second_signal", [False, True])
async def test_the_grace_is_bounded_and_a_second_signal_ends_it(
    flags: list[str], scripted: ScriptedGenerator, second_signal: bool
) -> None:
    scripted.delay_s = 1.0
    grace_s = 60 if second_signal else 0.2
    config = edge_config.read([*flags, "--server.shutdown_grace_s", str(grace_s)], {})
    async with running(config) as (server, http, life):
        request = await started(http, scripted)
        server.stop()
        if second_signal:
            server.stop()
        response = await request
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "The server is shutting down."
        await asyncio.wait_for(asyncio.shield(life), 5)
        assert scripted.closed == 1


async def test_a_wrong_pair_is_refused(
    flags: list[str], scripted: ScriptedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeLink, "card", replace(CARD, tokenizer_fingerprint="ab" * 32))
    async with running(edge_config.read(flags, {})) as (_, http, _life):
        health = await answers(http)
        assert health.json()["cloud"] == {"reachable": True, "model": CARD.model_id}
        response = await http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 503
        assert "tokenizer.json" in response.json()["error"]["message"]
        assert response.json()["error"]["code"] == "model_mismatch"


async def test_a_taken_port_is_a_configuration_error(flags: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = edge_config.read([*flags, "--server.port", str(port)], {})
        with pytest.raises(ConfigError, match=str(port)):
            EdgeServer(config)


async def edge_command(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge_agent", *arguments,
        stderr=asyncio.subprocess.PIPE, env=os.environ | {"PICOSPEC_EDGE_CLOUD_TOKEN": "hush"},
    )  # fmt: skip


async def test_the_command_ends_in_order_at_a_signal(flags: list[str]) -> None:
    process = await edge_command(*flags, "--log.format", "json")
    assert process.stderr is not None
    log = b""
    async with asyncio.timeout(30):
        while b"listening on" not in log:
            line = await process.stderr.readline()
            assert line, log
            log += line
        process.send_signal(signal.SIGTERM)
        log += await process.stderr.read()
        assert await process.wait() == 0, log
    assert b"configuration" in log
    assert b"hush" not in log


async def test_the_command_refuses_a_wrong_configuration(flags: list[str]) -> None:
    process = await edge_command(*flags, "--server.port", "99999")
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"server.port = " in errors
    missing = await edge_command(*flags, "--drafter.tokenizer", "/nowhere")
    _, errors = await missing.communicate()
    assert missing.returncode == 1
    assert b"drafter.tokenizer" in errors
