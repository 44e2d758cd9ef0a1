"""More generations than the KV cache holds, over gRPC: the real engine prefills nobody twice.

Sixteen sessions of 512 prompt tokens, a cache for eleven, each asking for one token in turn. With
all of them let in, each prefill took the cache from the session that would speak next.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import pytest_asyncio

from cloud_server.config import CloudConfig, EngineConfig, MetricsConfig, ServerConfig
from cloud_server.server import CloudServer
from picospec.protocol.messages import Draft, Opened
from picospec.v1 import speculation_pb2_grpc
from tests.integration.conftest import TINY_KV_BYTES_PER_BLOCK
from tests.support.builders import make_open
from tests.support.cloud import RawStream
from tests.support.machine import cloud_core, pinned
from tests.support.tiny import VOCAB_SIZE

if TYPE_CHECKING:
    from cloud_server.engine.client import VLLMEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

NUM_SESSIONS, NUM_IN = 16, 11
PROMPT_TOKENS, MAX_TOKENS = 512, 10
BLOCKS_EACH = 17  # of 32 tokens


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(tiny_model: Path) -> AsyncIterator[VLLMEngine]:
    from cloud_server.engine.client import VLLMEngine

    engine = VLLMEngine(
        EngineConfig(
            model=str(tiny_model),
            min_step_tokens=1,  # no padding: it would be counted as well
            args={
                "max_model_len": 1024,
                "enforce_eager": True,
                "max_num_seqs": 32,
                # One block is vLLM's own.
                "kv_cache_memory_bytes": (NUM_IN * BLOCKS_EACH + 1) * TINY_KV_BYTES_PER_BLOCK,
            },
        )
    )
    yield engine
    await engine.shutdown()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server(engine: VLLMEngine) -> AsyncIterator[CloudServer]:
    server = CloudServer(
        CloudConfig(
            server=ServerConfig(port=0, grace_s=0.0, health_interval_s=0.02, queue_timeout_s=120.0),
            metrics=MetricsConfig(enabled=False),
        ),
        engine,
    )
    with pinned(cloud_core()):
        await server.start()
    yield server
    await server.stop(asyncio.Event())


async def test_a_crowd_forwards_its_prompts_once(engine: VLLMEngine, server: CloudServer) -> None:
    room = server.calls.room
    assert room.num_tokens == NUM_IN * BLOCKS_EACH * 32
    crowded, turn = asyncio.Event(), asyncio.Lock()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = speculation_pb2_grpc.SpeculationServiceStub(channel)

        async def edge(prompt: list[int]) -> int:
            """A whole generation, token by token; returns how many were committed."""
            stream = RawStream(stub.Generate())
            await stream.send(
                make_open(prompt_token_ids=prompt, max_tokens=MAX_TOKENS, stop_token_ids=())
            )
            assert isinstance(await stream.receive(timeout_s=120.0), Opened)
            verdict = await stream.verdict()
            num_tokens = len(verdict.token_ids)
            await crowded.wait()
            while verdict.finish_reason is None:
                async with turn:
                    await stream.send(Draft(0, PROMPT_TOKENS + num_tokens, probe=1))
                    verdict = await stream.verdict()
                num_tokens += len(verdict.token_ids)
            assert await stream.receive() is None
            return num_tokens

        rng = np.random.default_rng(5)
        prompts = rng.integers(0, VOCAB_SIZE, (NUM_SESSIONS, PROMPT_TOKENS)).tolist()
        edges = [asyncio.create_task(edge(prompt)) for prompt in prompts]
        for _ in range(6000):
            if room.num_waiting == NUM_SESSIONS - NUM_IN:
                crowded.set()
                break
            await asyncio.sleep(0.01)
        assert crowded.is_set()
        num_committed = sum(await asyncio.gather(*edges))

    stats = engine.stats()
    assert num_committed == NUM_SESSIONS * MAX_TOKENS
    assert stats.evicted_sessions == stats.preempted_sessions == 0
    assert stats.forwarded_tokens <= NUM_SESSIONS * PROMPT_TOKENS + 2 * num_committed
    await asyncio.wait_for(server.calls.drained(), 5)
    assert room.reserved_tokens == 0
