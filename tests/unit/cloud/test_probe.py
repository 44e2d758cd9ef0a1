"""The health probe that a container runs, against a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cloud_server import probe
from tests.support.cloud import running_cloud
from tests.support.machine import free_port


async def probed(*arguments: str) -> int:
    return await asyncio.to_thread(probe.main, [*arguments, "--timeout-s", "5"])


async def test_a_server_that_serves_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_cloud() as cloud:
        assert await probed(f"127.0.0.1:{cloud.server.port}") == 0
    assert "SERVING" in capsys.readouterr().out


async def test_a_server_that_ends_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_cloud() as cloud:
        await cloud.server.health.enter_graceful_shutdown()
        assert await probed(f"127.0.0.1:{cloud.server.port}") == 1
    assert "NOT_SERVING" in capsys.readouterr().out


async def test_nobody_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert await probed(f"127.0.0.1:{free_port()}") == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


async def test_an_authority_that_cannot_be_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await probed("127.0.0.1:1", "--tls-ca", str(tmp_path / "absent.pem")) == 1
    assert "absent.pem: No such file" in capsys.readouterr().err
