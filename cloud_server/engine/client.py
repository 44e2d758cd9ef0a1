"""The real verification engine: vLLM's engine core in a process of its own.

This process holds vLLM's asynchronous core client and nothing else of vLLM's front end: sessions
are opened, fed and aborted with the core's own ADD and ABORT messages, in order, without replies;
what the scheduler decides comes back as `Prefilled` and `Verdict` (reports.py). The engine sleeps
while it waits for drafts; this process, which has a clock to wait by, wakes it when they are late.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time

from vllm.sampling_params import SamplingParams as VLLMSamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from cloud_server.config import EngineConfig
from cloud_server.engine.deliveries import Deliveries
from cloud_server.engine.envelope import Delivery, EngineReport, Wake, wrap
from cloud_server.engine.interface import EngineSink, EngineStats, KVCacheSize
from cloud_server.engine.model import build_vllm_config, kv_cache_size, model_card
from cloud_server.engine.reports import ReportReceiver
from picospec.errors import CloudUnavailable, ConfigError, PicoSpecError
from picospec.protocol.messages import Draft, ModelCard, Open, Verdict

VERDICT_LAG_S = 5.0  # between vLLM's word that a request has ended and our verdict on it

logger = logging.getLogger(__name__)


class VLLMEngine:
    """`VerificationEngine` over vLLM (cloud_server/engine/interface.py)."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._client: AsyncMPClient | None = None
        self._card: ModelCard | None = None
        self.kv_cache_size = KVCacheSize(0)
        self._sinks: dict[str, EngineSink] = {}
        self._stats = EngineStats()
        self._reports: ReportReceiver | None = None
        self._pump: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None  # to wake the engine
        self._deliveries = Deliveries(self._tell)
        self._dead = False

    async def start(self) -> ModelCard:
        """Start the engine's process and wait for it (bounded by vLLM's own start-up limit).

        Raises ConfigError for a configuration that vLLM refuses, PicoSpecError if the engine
        does not come up.
        """
        self._reports = ReportReceiver(self._dispatch)
        await self._reports.listen()
        vllm_config = await asyncio.to_thread(build_vllm_config, self._config, self._reports.name)
        self._card = await asyncio.to_thread(model_card, self._config, vllm_config)
        try:
            client = await asyncio.to_thread(
                EngineCoreClient.make_async_mp_client,
                vllm_config,
                Executor.get_class(vllm_config),
                log_stats=True,
            )
        except ConfigError:
            raise
        except Exception as error:  # whatever vLLM raises for a failed start
            raise PicoSpecError(f"the engine did not start: {error}") from error
        self._client = client
        self.kv_cache_size = kv_cache_size(vllm_config)
        # vLLM may have shortened the length to what the KV cache holds, but for one block.
        self._card = dataclasses.replace(
            self._card,
            max_model_len=min(
                vllm_config.model_config.max_model_len, self.kv_cache_size.num_tokens
            ),
        )
        self._pump = asyncio.create_task(self._read_outputs(), name="engine-outputs")
        return self._card

    async def open(self, session_key: str, request: Open, sink: EngineSink) -> None:
        client = self._alive()
        self._sinks[session_key] = sink
        output = request.output_token_ids.tolist()
        await client.add_request_async(
            EngineCoreRequest(
                request_id=session_key,
                prompt_token_ids=request.prompt_token_ids.tolist() + output,
                mm_features=None,
                sampling_params=VLLMSamplingParams(
                    temperature=0.0,  # vLLM never samples here: see worker.VerificationRunner
                    max_tokens=request.max_tokens - len(output),
                    stop_token_ids=list(request.stop_token_ids),
                    detokenize=False,
                    extra_args=wrap(request),
                ),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )

    async def deliver(self, session_key: str, draft: Draft, arrived_s: float) -> None:
        self._alive()
        if session_key not in self._sinks:
            return
        # An Open is sent at once, so it is always ahead of its session's drafts.
        self._deliveries.add(Delivery(session_key, draft, arrived_s))

    async def _tell(self, message: list[Delivery] | Wake) -> None:
        """A request that is none: what counts is in its envelope. Of no use to a dead engine."""
        if self._client is None or self._dead:
            return
        request = EngineCoreRequest(
            request_id="deliveries",
            prompt_token_ids=[0],  # not looked at
            mm_features=None,
            sampling_params=VLLMSamplingParams(max_tokens=1, extra_args=wrap(message)),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        with contextlib.suppress(EngineDeadError):  # `_read_outputs` ends the sessions
            await self._client.add_request_async(request)

    async def abort(self, session_key: str) -> None:
        if self._sinks.pop(session_key, None) is None or self._client is None or self._dead:
            return
        await self._client.abort_requests_async([session_key])

    async def ping(self) -> None:
        try:
            await self._alive().is_sleeping_async()
        except EngineDeadError:
            raise CloudUnavailable("the engine is not running") from None

    def stats(self) -> EngineStats:
        return self._stats

    async def profile(self, *, start: bool) -> None:
        """Start or stop the profiler of `engine.args.profiler_config`; vLLM raises without one."""
        await self._alive().profile_async(start)

    @property
    def healthy(self) -> bool:
        return self._client is not None and not self._dead

    async def shutdown(self) -> None:
        self._set_alarm(0.0)
        self._deliveries.close()
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        if self._client is not None:
            await asyncio.to_thread(self._client.shutdown)
            self._client = None
        if self._reports is not None:
            self._reports.close()
            self._reports = None

    def _alive(self) -> AsyncMPClient:
        if self._client is None or self._dead:
            raise CloudUnavailable("the engine is not running")
        return self._client

    async def _read_outputs(self) -> None:
        """vLLM's own outputs: they tell when the engine is dead."""
        assert self._client is not None
        try:
            while True:
                outputs = await self._client.get_output_async()
                for output in outputs.outputs:
                    if output.finish_reason is not None:
                        asyncio.get_running_loop().call_later(
                            VERDICT_LAG_S, self._end_without_verdict, output.request_id
                        )
        except asyncio.CancelledError:
            raise
        except Exception:  # EngineDeadError or a broken socket: no output will come
            logger.exception("the engine died")
            self._dead = True
            sinks, self._sinks = self._sinks, {}
            for sink in sinks.values():
                sink(CloudUnavailable("the engine died"))

    def _dispatch(self, report: EngineReport) -> None:
        self._stats = report.stats
        self._set_alarm(report.wake_s)
        self._deliveries.step_ends(report.step_ends_s)
        for session_key, events in report.events.items():
            sink = self._sinks.get(session_key)
            if sink is None:
                continue
            for event in events:
                if isinstance(event, PicoSpecError) or (
                    isinstance(event, Verdict) and event.finish_reason is not None
                ):
                    self._sinks.pop(session_key, None)
                sink(event)

    def _end_without_verdict(self, session_key: str) -> None:
        """A session that vLLM has ended by itself."""
        sink = self._sinks.pop(session_key, None)
        if sink is not None:
            sink(PicoSpecError("the engine ended the session without a verdict"))

    def _set_alarm(self, wake_s: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if wake_s:
            delay_s = max(0.0, wake_s - time.monotonic())
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(delay_s, self._wake, Wake(wake_s))

    def _wake(self, wake: Wake) -> None:
        if self.healthy:
            self._waking = asyncio.create_task(self._tell(wake), name="wake-engine")
