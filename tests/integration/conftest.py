"""Engines are slow to start, so the whole session shares one of each kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from cloud_server.config import CloudConfig, EngineConfig, MetricsConfig, ServerConfig
from cloud_server.server import CloudServer
from tests.support.machine import cloud_core, model_folder, pinned
from tests.support.reference import Reference
from tests.support.tiny import build_tiny_llama

if TYPE_CHECKING:  # importing vLLM takes long, and not every test needs it
    from cloud_server.engine.client import VLLMEngine

TINY_MAX_MODEL_LEN = 256
TINY_KV_BLOCKS = 128  # of 32 tokens
TINY_KV_BYTES_PER_BLOCK = 32 * 2 * 2 * 64 * 4  # tokens, layers, K and V, hidden size, float32


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tiny_engine(tiny_model: Path) -> AsyncIterator[VLLMEngine]:
    from cloud_server.engine.client import VLLMEngine

    engine = VLLMEngine(
        EngineConfig(
            model=str(tiny_model),
            min_step_tokens=3,  # so that padding is in every step of few tokens
            args={
                "max_model_len": TINY_MAX_MODEL_LEN,
                "enforce_eager": True,
                "max_num_seqs": 64,
                "kv_cache_memory_bytes": TINY_KV_BLOCKS * TINY_KV_BYTES_PER_BLOCK,
            },
        )
    )
    with pinned(cloud_core()):  # one thread: so small a model only waits for a second one
        await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cloud_address() -> AsyncIterator[str]:
    """A cloud server on loopback, with the real target."""
    from cloud_server.engine.client import VLLMEngine

    engine = VLLMEngine(
        EngineConfig(
            model=str(model_folder("target")),
            max_sparse_k=1 << 16,
            args={"max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 16},
        )
    )
    server = CloudServer(
        CloudConfig(server=ServerConfig(port=0), metrics=MetricsConfig(enabled=False)), engine
    )
    with pinned(cloud_core()):
        await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop(asyncio.Event())
        await engine.shutdown()
