"""The edge's API on a real uvicorn server at a free port, before a scripted host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import uvicorn

from edge_agent.api.admission import Admission
from edge_agent.api.host import ScriptedHost
from edge_agent.api.routes import create_app
from edge_agent.generation import ScriptedGenerator
from edge_agent.metrics import EdgeMetrics
from picospec.protocol.messages import Limits
from tests.support.builders import make_card_for
from tests.support.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CARD = make_card_for(
    TOKENIZER, padding=8, max_model_len=200, limits=Limits(max_stop_token_ids=4, max_logit_bias=3)
)
EOS = 2


@dataclass
class EdgeApi:
    """A running API and everything behind it."""

    base_url: str
    host: ScriptedHost
    generator: ScriptedGenerator
    gate: Admission
    metrics: EdgeMetrics
    http: httpx.AsyncClient

    def requests_total(self, endpoint: str, outcome: str) -> float:
        name, labels = "picospec_edge_requests_total", f'endpoint="{endpoint}",outcome="{outcome}"'
        for line in self.metrics.exposition().decode().splitlines():
            if line.startswith(f"{name}{{{labels}}}"):
                return float(line.split()[-1])
        return 0.0


@asynccontextmanager
async def serve(
    text: str | list[int] = "hello world",
    *,
    max_concurrent: int = 8,
    timeout_s: float = 30.0,
    api_key: str = "",
    max_body_bytes: int = 64 << 10,
    delay_s: float = 0.0,
) -> AsyncIterator[EdgeApi]:
    """Every generation answers `text` and the end of sequence."""
    token_ids = text if isinstance(text, list) else [*TOKENIZER.encode(text).tolist(), EOS]
    generator = ScriptedGenerator(token_ids, delay_s=delay_s)
    host = ScriptedHost(TOKENIZER, generator, model=CARD)
    gate = Admission(max_concurrent, timeout_s, api_key)
    metrics = EdgeMetrics(lambda: host.drafter)
    app = create_app(host, gate, metrics, max_body_bytes=max_body_bytes)
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    base_url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=base_url, timeout=10) as http:
            yield EdgeApi(
                base_url, host, generator=generator, gate=gate, metrics=metrics, http=http
            )
    finally:
        server.force_exit = True
        await server.shutdown()


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Returns once `condition` holds; what follows an answer's last byte takes a moment."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.005)
