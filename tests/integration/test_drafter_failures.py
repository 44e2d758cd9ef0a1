"""Whatever befalls the drafter, answers go on at the cloud's pace, and the edge says why.

The whole edge daemon with a real drafting worker, whose drafter does as a script says; the cloud's
engine is scripted, so every answer is known to the token.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_server.engine.scripted import ScriptedEngine
from edge_agent import server as edge_server
from edge_agent.drafting.messages import DrafterSpec
from edge_agent.drafting.scripted import SCRIPT_FILE
from tests.integration.test_edge_daemon import (
    CARD,
    Edge,
    edge,
    expected,
    on_uvloop,
    prompt_of,
    ready,
    recite,
)
from tests.support.chat import user_says
from tests.support.cloud import running_cloud
from tests.support.daemons import child_of

NUM_TOKENS = 60
STEP_S = 0.005
MODES = ("split", "coupled", "auto")


@asynccontextmanager
async def scripted_edge(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, **failures: Any
) -> AsyncIterator[Edge]:
    script = {"logits_width": CARD.logits_width, "seed": 1, "token_s": 0.002, **failures}
    (folder / SCRIPT_FILE).write_text(json.dumps(script))
    monkeypatch.setattr(edge_server, "DrafterSpec", lambda *_: DrafterSpec("scripted", str(folder)))
    flags = (
        *("--speculation.mode", mode, "--speculation.assist", "auto"),
        *("--drafter.turn_timeout_s", "2"),
    )
    async with (
        running_cloud(ScriptedEngine(recite, card=CARD, step_s=STEP_S)) as cloud,
        edge(folder, cloud.server.port, *flags) as running,
    ):
        await ready(running.client)
        yield running


async def ask(running: Edge, at_token: int = 0, disturb: Callable[[], None] | None = None) -> None:
    """A whole answer, which must be the target's, and in the time that the cloud needs."""
    prompt, text = prompt_of("say it"), ""
    async with asyncio.timeout(10):
        stream = await running.client.chat.completions.create(
            model=CARD.model_id,
            messages=user_says("say it"),
            temperature=0,
            max_tokens=NUM_TOKENS,
            stream=True,
        )
        num_chunks = 0
        async for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            num_chunks += 1
            if num_chunks == at_token + 1 and disturb is not None:
                disturb()
    assert text == expected(prompt, NUM_TOKENS)


async def status_of(running: Edge) -> tuple[str, str]:
    """What /health says, and why."""
    async with httpx.AsyncClient() as http:
        body = (await http.get(f"http://127.0.0.1:{running.server.port}/health")).json()
    return body["status"], body["problem"] or ""


async def troubled_s(running: Edge) -> float:
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://127.0.0.1:{running.server.port}/metrics")).text
    [value] = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "picospec_edge_drafter_troubled_seconds_total"
    ]
    return value


async def until_status(running: Edge, status: str, reason: str = "") -> None:
    async with asyncio.timeout(15):
        while True:
            found, problem = await status_of(running)
            if found == status and reason in problem:
                return
            await asyncio.sleep(0.02)


def worker_pid() -> int:
    """The drafting worker's: it is a child of this process."""
    pid: int = child_of(os.getpid(), "edge_agent.drafting.worker_main").pid
    return pid


async def strike(running: Edge, number: signal.Signals) -> tuple[float, int]:
    """Send a signal to the worker in the middle of an answer; the seconds of trouble that there
    were before, and which worker it was."""
    await until_status(running, "ok")
    before_s, pid = await troubled_s(running), worker_pid()
    await ask(running, 5, lambda: os.kill(pid, number))
    return before_s, pid


@pytest.mark.parametrize("mode", MODES)
@on_uvloop
async def test_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    async with scripted_edge(tmp_path, monkeypatch, mode) as running:
        before_s, pid = await strike(running, signal.SIGKILL)
        await until_status(running, "ok")
        assert worker_pid() != pid
        assert await troubled_s(running) > before_s
        await ask(running)


@pytest.mark.parametrize("mode", MODES)
@on_uvloop
async def test_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    async with scripted_edge(tmp_path, monkeypatch, mode) as running:
        before_s, pid = await strike(running, signal.SIGSTOP)
        await until_status(running, "degraded", "The drafter answers nothing")
        await ask(running)
        await until_status(running, "ok")  # it was replaced
        assert worker_pid() != pid
        assert await troubled_s(running) > before_s + 0.4
        await ask(running)


@pytest.mark.parametrize("mode", ["split", "coupled"])
@on_uvloop
async def test_logits_that_are_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    first = prompt_of("say it")[0]
    async with scripted_edge(tmp_path, monkeypatch, mode, nan_behind=first) as running:
        await until_status(running, "ok")
        before_s = await troubled_s(running)
        await ask(running)
        await until_status(running, "degraded", "NumericalError")
        await ask(running)
        await asyncio.sleep(0.2)
        assert await troubled_s(running) > before_s + 0.2


@pytest.mark.parametrize(
    ("failure", "reason"), [("no memory", "98304 bytes"), ("killed", "it died loading")]
)
@on_uvloop
async def test_no_memory_to_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, reason: str
) -> None:
    async with scripted_edge(tmp_path, monkeypatch, "auto", load=failure) as running:
        await until_status(running, "degraded", reason)
        before_s = await troubled_s(running)
        await ask(running)
        assert (await status_of(running))[0] == "degraded"
        assert await troubled_s(running) > before_s + NUM_TOKENS * STEP_S / 2
