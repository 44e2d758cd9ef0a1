"""The cloud's overheads: a step of the engine, and a Draft's way to it."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import openings
from bench.machine import cloud_core, pinned
from edge_agent.link import CloudLink
from picospec.protocol.messages import AssistPolicy, Draft, Verdict
from picospec_cli.model_folder import model_home

if TYPE_CHECKING:
    from cloud_server.engine.client import VLLMEngine

DRAFTS = 4
PROMPT = np.array(
    [1, 4093, 198, 4093, 314, 260, 6376, 4461, 47, 2, 198, 1, 520, 9531, 198], np.int32
)
Result = dict[str, Any]


async def measure_engine(repeats: int, num_tokens: int) -> Result:
    """Milliseconds per step outside forward and sampling, decoding alone (k = 0) and with
    four correct drafts per step (k = 4); `loop` includes vLLM's loop around the step."""
    rows: dict[str, list[dict[str, float]]] = {"k=0": [], "k=4": []}
    async with running_engine({"enforce_eager": True, "max_model_len": 1024}) as engine:
        for _ in range(repeats):
            row, text = await decode(engine, num_tokens, [])
            rows["k=0"].append(row)
            row, same = await decode(engine, num_tokens, text)
            assert same == text, "the drafts changed the text"
            rows["k=4"].append(row)
    return {name: medians(group) for name, group in rows.items()}


@asynccontextmanager
async def running_engine(arguments: dict[str, Any]) -> AsyncIterator[VLLMEngine]:
    """The target on the cloud's core, for `DRAFTS` drafts per step. `arguments` are vLLM's."""
    from cloud_server.config import EngineConfig
    from cloud_server.engine.client import VLLMEngine

    target = str(model_home() / "target")
    engine = VLLMEngine(EngineConfig(model=target, max_draft_tokens=DRAFTS, args=arguments))
    with pinned(cloud_core()):
        await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


async def decode(
    engine: VLLMEngine, num_tokens: int, drafts: list[int]
) -> tuple[dict[str, float], list[int]]:
    """One generation, by the engine alone or over `drafts`, all of which are delivered at once."""
    events: asyncio.Queue[Any] = asyncio.Queue()
    session = openings.opening(
        PROMPT, num_tokens, assist=AssistPolicy.NEVER if drafts else AssistPolicy.ALWAYS
    )
    key = session.session_id
    await engine.open(key, session, events.put_nowait)
    if drafts:
        await engine.deliver(key, Draft(0, len(PROMPT), token_ids=tuple(drafts)), time.monotonic())
    text: list[int] = []
    started_s, before = 0.0, engine.stats()
    while True:
        event = await events.get()
        if isinstance(event, Exception):
            raise event
        if not isinstance(event, Verdict):
            continue
        if not text:  # the prompt is in: what follows is decoding
            started_s, before = time.perf_counter(), engine.stats()
        text += (drafts[len(text) :][: event.num_accepted]) + list(event.token_ids)
        if event.finish_reason is not None:
            break
    wall_s, after = time.perf_counter() - started_s, engine.stats()
    steps = after.steps - before.steps
    model_s = (after.forward_s - before.forward_s) + (after.sampling_s - before.sampling_s)
    return {
        "steps": steps,
        "forward_ms": (after.forward_s - before.forward_s) / steps * 1e3,
        "sampling_ms": (after.sampling_s - before.sampling_s) / steps * 1e3,
        "step_outside_ms": (after.step_s - before.step_s - model_s) / steps * 1e3,
        "loop_outside_ms": (wall_s - model_s) / steps * 1e3,
    }, text


async def measure_delivery(link: CloudLink, num_drafts: int) -> Result:
    """Milliseconds from a Draft's arrival to the start of the step that judges it, engine idle.

    Wrong drafts one at a time in coupled mode: each is answered before the next is sent.
    """
    queued_ms: list[float] = []
    position, epoch = len(PROMPT), 0
    session = openings.opening(PROMPT, 2 * num_drafts + 8)
    async with openings.opened(link, session) as stream:
        async for verdict in openings.verdicts(stream):
            if verdict.num_draft_tokens:
                queued_ms.append(verdict.queue_us / 1e3)
            if len(queued_ms) == num_drafts:
                break
            position += verdict.num_accepted + len(verdict.token_ids)
            stream.send(Draft(epoch, position, token_ids=(7,), end_of_round=True))
            epoch += 1
    cuts, median = statistics.quantiles(queued_ms, n=20), statistics.median(queued_ms)
    return {"p5": cuts[0], "p50": median, "p95": cuts[-1], "n": len(queued_ms)}
