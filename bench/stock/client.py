"""The client of the baseline (server.py): tokens as they arrive."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, Self


class StockClient:
    """One connection to the stock server, for one generation at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.description: dict[str, Any] = {}
        self.bytes_up = 0
        self.bytes_down = 0

    @classmethod
    async def connect(cls, port: int) -> Self:
        """Raises OSError while the server is not there, EOFError behind a relay."""
        self = cls(*await asyncio.open_connection("127.0.0.1", port))
        try:
            self.description = await self._read()
        except BaseException:
            self._writer.close()
            raise
        return self

    async def generate(
        self, prompt_token_ids: list[int], max_tokens: int, temperature: float, seed: int
    ) -> AsyncGenerator[tuple[int, ...]]:
        """Token ids, as soon as they are there."""
        request = {
            "prompt_token_ids": prompt_token_ids,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        line = json.dumps(request).encode() + b"\n"
        self.bytes_up += len(line)
        self._writer.write(line)
        while "finish_reason" not in (message := await self._read()):
            yield tuple(message["token_ids"])

    def close(self) -> None:
        self._writer.close()

    async def _read(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line:
            raise EOFError("stock vLLM closed the connection")
        self.bytes_down += len(line)
        message: dict[str, Any] = json.loads(line)
        return message
