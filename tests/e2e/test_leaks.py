"""Generations that end in every way leave nothing behind, in either daemon."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import openai

from tests.support.chat import user_says
from tests.support.daemons import Cloud, Edge, until

NUM_GENERATIONS = 200
CONCURRENCY = 8
SEED = 5

EDGE_GAUGES = (
    "picospec_edge_active_generations",
    "picospec_edge_asyncio_tasks",
    "picospec_edge_open_streams",
    "picospec_edge_drafter_contexts",
)
CLOUD_GAUGES = (
    "picospec_cloud_asyncio_tasks",
    "picospec_cloud_sessions_active",
    "picospec_cloud_sessions_held",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)


def held(cloud: Cloud, edges: dict[str, Edge]) -> dict[str, float]:
    """What both daemons hold at present: their gauges, and their processes' open files."""
    metrics = cloud.metrics()
    values = {name: metrics(name) for name in CLOUD_GAUGES}
    for mode, edge in edges.items():
        metrics = edge.metrics()
        values |= {f"{mode} {name}": metrics(name) for name in EDGE_GAUGES}
    for daemon in (cloud.daemon, *(edge.daemon for edge in edges.values())):
        for index, process in enumerate(daemon.family()):
            values[f"{daemon.name} process {index} files"] = process.num_fds()
    return values


async def generate(edge: Edge, client: openai.AsyncOpenAI, rng: random.Random) -> str:
    """One generation; a third goes away at a random moment. Returns how it ended."""
    stream = rng.random() < 0.5
    leaves_after_s = rng.uniform(0.0, 1.0) if rng.random() < 1 / 3 else None
    request: dict[str, Any] = {
        "model": edge.model,
        "messages": user_says(f"Count to {rng.randint(3, 99)}."),
        "temperature": rng.choice([0, 1]),
        "seed": rng.randrange(2**32),
        "max_tokens": rng.randint(1, 6) if leaves_after_s is None else 64,
    }

    async def run() -> None:
        create = client.chat.completions.create
        if not stream:
            await create(**request)
            return
        async with await create(**request, stream=True) as answer:
            async for _ in answer:
                pass

    try:
        await asyncio.wait_for(run(), leaves_after_s)
    except TimeoutError:
        return "left"
    return "answered"


async def test_two_hundred_generations_leave_nothing_behind(
    cloud: Cloud, edges: dict[str, Edge]
) -> None:
    rng = random.Random(SEED)
    warm_up = random.Random(0)
    for edge in edges.values():
        async with edge.client() as client:
            await asyncio.gather(*(generate(edge, client, warm_up) for _ in range(CONCURRENCY)))
    at_start = until(lambda: _settled(cloud, edges))
    assert at_start["vllm:kv_cache_usage_perc"] == 0

    outcomes: list[str] = []
    pending = iter(range(NUM_GENERATIONS))

    async def worker(edge: Edge) -> None:
        async with edge.client() as client:
            for _ in pending:
                outcomes.append(await generate(edge, client, rng))

    workers = [edge for edge in edges.values() for _ in range(CONCURRENCY // len(edges))]
    await asyncio.gather(*map(worker, workers))
    assert len(outcomes) == NUM_GENERATIONS
    assert outcomes.count("left") > NUM_GENERATIONS / 5

    def leaked() -> dict[str, tuple[float, float]]:
        now = held(cloud, edges)
        return {name: (at_start[name], now[name]) for name in now if now[name] > at_start[name]}

    leaks = leaked()
    for _ in range(600):
        if not (leaks := leaked()):
            break
        await asyncio.sleep(0.1)
    assert not leaks, "what was held at the start, and is now"
    ended = cloud.metrics()
    assert ended("picospec_cloud_sessions_total", outcome="cancelled") > 0
    assert ended("picospec_cloud_sessions_total", outcome="protocol_error") == 0
    assert ended("picospec_cloud_sessions_total", outcome="internal_error") == 0


def _settled(cloud: Cloud, edges: dict[str, Edge]) -> dict[str, float] | None:
    """What is held when nothing runs: three looks in a row see the same."""
    looks = [held(cloud, edges) for _ in range(3)]
    idle = all(look["vllm:kv_cache_usage_perc"] == 0 for look in looks)
    return looks[0] if idle and looks[0] == looks[1] == looks[2] else None
