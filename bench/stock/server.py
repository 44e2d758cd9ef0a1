"""The baseline: stock vLLM as a server, `python -m bench.stock.server MODEL PORT [KEY=VALUE ...]`.

vLLM's own AsyncLLM, scheduler, worker and sampler, without speculation, with the settings that
the cloud daemon has (EQUAL_SETTINGS). Tokens are streamed as they come, one JSON line each, over
TCP:

    -> {"prompt_token_ids": [1, 2], "max_tokens": 8, "temperature": 0.0, "seed": 1}
    <- {"token_ids": [17]}
    ...
    <- {"finish_reason": "length"}

End-of-sequence tokens are ignored. The first line on a connection describes the engine.
"""

import asyncio
import json
import os
import sys
from contextlib import aclosing
from typing import Any

# Both engines get them, so that nothing but the hooks and the drafts differs. Without a prefix
# cache every generation pays for its prompt.
EQUAL_SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 28,
    "enable_prefix_caching": False,
}


def build_engine(model: str, overrides: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """AsyncLLM and a description of it. The engine runs in a process of its own."""
    # As the cloud daemon does it (cloud_server/engine/model.py): the compiler's cache that works
    # on CPU, and no third process between engine and worker.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(model=model, **{**EQUAL_SETTINGS, **overrides})
    config = arguments.create_engine_config()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    description = {
        "vllm": vllm.__version__,
        "eager": config.model_config.enforce_eager,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "executor": str(config.parallel_config.distributed_executor_backend),
    }
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True), description


class StockServer:
    """Answers one request after the other on each connection."""

    def __init__(self, engine: Any, description: dict[str, Any]) -> None:
        self._engine = engine
        self._description = description
        self._num_requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _write(writer, self._description)
            while line := await reader.readline():
                await self._answer(json.loads(line), writer)
        except ConnectionError:
            pass  # the client is gone
        finally:
            writer.close()

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._num_requests += 1
        sampling = SamplingParams(
            temperature=request["temperature"],
            seed=request["seed"],
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": request["prompt_token_ids"]}
        reason = None
        outputs = self._engine.generate(prompt, sampling, str(self._num_requests))
        async with aclosing(outputs):  # closed early, the engine drops the request
            async for output in outputs:
                [completion] = output.outputs
                reason = completion.finish_reason
                for token_id in completion.token_ids:  # one per step; more only when we were late
                    _write(writer, {"token_ids": [token_id]})
                if writer.is_closing():
                    return
        _write(writer, {"finish_reason": reason})
        await writer.drain()


def _write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


async def _run(model: str, port: int, overrides: dict[str, Any]) -> None:
    engine, description = build_engine(model, overrides)
    stock = StockServer(engine, description)
    try:
        async with await asyncio.start_server(stock.serve, "127.0.0.1", port) as server:
            await server.serve_forever()
    finally:
        engine.shutdown()


def main(argv: list[str]) -> None:
    model, port, *settings = argv
    pairs = (setting.split("=", 1) for setting in settings)
    asyncio.run(_run(model, int(port), {key: json.loads(value) for key, value in pairs}))


if __name__ == "__main__":
    main(sys.argv[1:])
