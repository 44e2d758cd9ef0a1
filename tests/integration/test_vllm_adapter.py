"""Every vLLM internal that `cloud_server/engine/` leans on, pinned.

After a version bump run this first: it starts no engine, and each failure names what changed and
which of our files stands on it. Line numbers in the texts are of vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from vllm.config import SpeculativeConfig
from vllm.config import vllm as vllm_config_module
from vllm.platforms import cpu as cpu_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import ModelRunnerOutput, SamplerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode import custom_class_proposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from cloud_server.engine.envelope import EngineReport
from cloud_server.engine.interface import EngineStats, Prefilled
from cloud_server.engine.reports import ReportReceiver, ReportSender
from cloud_server.engine.scheduler import VerificationScheduler
from cloud_server.engine.worker import VerificationRunner, VerificationWorker
from picospec.errors import NumericalError
from tests.support.builders import make_verdict

pytestmark = pytest.mark.engine


def source(thing: Any) -> str:
    """Its source with white space folded, so that a new line break is no change."""
    return " ".join(inspect.getsource(thing).split())


def takes(function: Callable[..., Any], *names: str) -> bool:
    """Whether `function` can be called with the arguments `names`, positions as given."""
    return list(inspect.signature(function).parameters)[: len(names)] == list(names)


# Our classes, vLLM's that they stand before, and how vLLM calls each method that ours overrides.
OVERRIDES: list[tuple[type, type, dict[str, tuple[str, ...]]]] = [
    (
        VerificationScheduler,
        Scheduler,
        {
            "schedule": ("self", "throttle_prefills"),
            "update_from_output": ("self", "scheduler_output", "model_runner_output"),
            "add_request": ("self", "request"),
            "has_unfinished_requests": ("self",),
            "_free_request": ("self", "request"),
            "_preempt_request": ("self", "request", "timestamp"),
            "_handle_blocked_waiting_request": ("self", "request"),
            "update_draft_token_ids": ("self", "draft_token_ids"),
            "make_spec_decoding_stats": ("self", "spec_decoding_stats"),
        },
    ),
    (
        VerificationRunner,
        GPUModelRunner,
        {
            "execute_model": ("self", "scheduler_output"),
            "_sample": ("self", "logits", "spec_decode_metadata"),
            "sample_tokens": ("self", "grammar_output"),
            "_model_forward": ("self",),
            "take_draft_token_ids": ("self",),
        },
    ),
    (VerificationWorker, Worker, {"init_device": ("self",), "compile_or_warm_up_model": ("self",)}),
]


def overridden(ours: type, theirs: type) -> set[str]:
    """The methods of vLLM's class that ours takes over, whether by intent or by a name's chance."""
    return {
        name
        for name, value in vars(ours).items()
        if callable(value) and hasattr(theirs, name) and not name.startswith("__")
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "methods"), OVERRIDES, ids=lambda value: str(value)[:60]
)
def test_methods_we_override(ours: type, theirs: type, methods: dict[str, tuple[str, ...]]) -> None:
    assert overridden(ours, theirs) == set(methods)
    for name, arguments in methods.items():
        method = getattr(theirs, name)
        assert takes(method, *arguments), f"{method.__qualname__}{inspect.signature(method)}"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (Scheduler.finish_requests, ("self", "request_ids", "finished_status")),
        (check_stop, ("request", "max_model_len")),
        (Request.append_output_token_ids, ("self", "token_ids")),
        (Request.take_prefill_stats, ("self",)),
        (BlockPool.get_num_free_blocks, ("self",)),
        (GPUModelRunner._dummy_run, ("self", "num_tokens")),
        (AsyncMPClient.add_request_async, ("self", "request")),
        (AsyncMPClient.abort_requests_async, ("self", "request_ids")),
        (AsyncMPClient.get_output_async, ("self",)),
        (AsyncMPClient.profile_async, ("self", "is_start")),
        (
            EngineCoreClient.make_async_mp_client,
            ("vllm_config", "executor_class", "log_stats"),
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_methods_we_call(method: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    assert takes(method, *arguments), f"{method.__qualname__}{inspect.signature(method)}"


@pytest.mark.parametrize(
    ("where", "fragment", "why"),
    [
        (
            Scheduler.schedule,
            "self.current_step += 1",
            "StepPlanner.compose holds a session for the step that this line begins",
        ),
        (
            Scheduler.schedule,
            "if self.current_step < request.next_decode_eligible_step:",
            "StepPlanner.compose holds sessions by next_decode_eligible_step",
        ),
        (
            Scheduler.schedule,
            "spec_token_ids = spec_token_ids[:num_scheduled_spec_tokens]",
            "drafts that do not fit are cut at the end: StepPlanner takes the first ones' q",
        ),
        (
            Scheduler.schedule,
            "(self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None)",
            "num_spec_tokens = 0 keeps placeholder drafts out (scheduler.__init__)",
        ),
        (
            Scheduler.schedule,
            "self.max_model_len - request.num_computed_tokens - self.num_sampled_tokens_per_step",
            "StepPlanner: no draft beyond max_model_len - 1",
        ),
        (
            Scheduler.schedule,
            "if num_running >= self.max_num_active_reqs: break",
            "residency.py evicts held sessions when the batch is full",
        ),
        (
            Scheduler.schedule,
            "request = request_queue.peek_request() request_id = request.request_id "
            "ready_to_schedule = self._handle_blocked_waiting_request(request) "
            "if not ready_to_schedule: skip_request(request_queue) continue",
            "scheduler._make_room: vLLM tries waiting requests in order, those that stay out apart",
        ),
        (
            Scheduler.schedule,
            "if request.has_encoder_inputs: self.encoder_cache_manager.free(request) break",
            "scheduler._make_room: behind a request that does not fit, nobody is admitted",
        ),
        (
            KVCacheManager.allocate_slots,
            "required_blocks = num_blocks_to_allocate + watermark_blocks",
            "residency.py leaves the watermark free",
        ),
        (
            Scheduler._update_after_schedule,
            "request.is_prefill_chunk = request.num_computed_tokens < "
            "( request.num_tokens + request.num_output_placeholders )",
            "StepPlanner.describe: only a whole prefill has rows to judge",
        ),
        (
            Scheduler.update_from_output,
            "num_accepted = max(len(generated_token_ids) - num_sampled, 0)",
            "rollback arithmetic that scheduler.update_from_output corrects for split mode",
        ),
        (
            Scheduler._update_request_with_output,
            "del new_token_ids[num_new:]",
            "a stop cuts the tokens: Tally.conclude trusts what is left",
        ),
        (
            Scheduler._preempt_request,
            "request.num_computed_tokens = 0",
            "an evicted session is prefilled again",
        ),
        (
            Scheduler._preempt_request,
            "self.waiting.prepend_request(request)",
            "an evicted session waits until _handle_blocked_waiting_request lets it in",
        ),
        (
            Scheduler._free_blocks,
            "del self.requests[request.request_id]",
            "scheduler.has_unfinished_requests counts plain requests by it",
        ),
        (
            EngineCoreProc.has_work,
            "self.scheduler.has_requests()",
            "the engine sleeps while has_unfinished_requests is false",
        ),
        (
            SchedulerInterface.has_requests,
            "self.has_unfinished_requests() or self.has_finished_requests()",
            "what the engine asks; scheduler.has_unfinished_requests answers",
        ),
        (
            EngineCore.step,
            "self._process_aborts_queue() engine_core_outputs = self.scheduler.update_from_output(",
            "a session may be aborted between schedule and update: it is then not in _sessions",
        ),
        (
            EngineCoreProc._process_input_queue,
            "while not self.has_work() and self.is_running():",
            "the engine sleeps while has_unfinished_requests is false",
        ),
        (
            GPUModelRunner.sample_tokens,
            "sampler_output = self._sample(logits, spec_decode_metadata)",
            "worker._sample is the one place where tokens come from",
        ),
        (
            GPUModelRunner._bookkeeping_sync,
            "RejectionSampler.parse_output(",
            "with two columns or more, placeholders are removed (worker._MIN_COLUMNS)",
        ),
        (
            GPUModelRunner._bookkeeping_sync,
            "start_idx = self.input_batch.num_tokens_no_spec[req_idx]",
            "worker._append adds the scheduler's tokens the way sampled ones are",
        ),
        (
            GPUModelRunner._update_states,
            "self.input_batch.add_request(request)",
            "a session outside the batch is copied from its cached state (worker._append)",
        ),
        (
            GPUModelRunner._calc_spec_decode_metadata,
            "num_sampled_tokens = num_draft_tokens + 1",
            "a session has drafts + 1 rows, contiguous (worker._sample)",
        ),
        (
            custom_class_proposer.create_custom_proposer,
            'hasattr(instance, "propose")',
            "what null_speculator.NullSpeculator must have",
        ),
        (
            cpu_platform,
            'os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1" and '
            'parallel_config.distributed_executor_backend == "uni"',
            "model._two_processes: the switch that would add a third process",
        ),
        (
            vllm_config_module,
            '"custom_class", ): unsupported.append(f"speculative method',
            "custom_class selects the V1 runner, the one with custom proposers (model.py)",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_lines_we_stand_on(where: Any, fragment: str, why: str) -> None:
    assert fragment in source(where), why


def test_request_fields() -> None:
    """scheduler.py reads and writes them."""
    request = Request(
        "r", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=2, stop_token_ids=[9]), None
    )
    assert request.status == RequestStatus.WAITING
    assert (request.num_tokens, request.num_computed_tokens, request.num_output_tokens) == (3, 0, 0)
    assert request.spec_token_ids == []
    assert request.next_decode_eligible_step == 0
    assert request.is_prefill_chunk is False
    assert (request.client_index, request.max_tokens) == (0, 2)
    committed = request.all_token_ids
    request.append_output_token_ids(4)
    assert list(committed) == [1, 2, 3, 4], "DraftQueue reads it by reference"
    assert not check_stop(request, 100)
    request.append_output_token_ids(9)
    assert check_stop(request, 100)
    assert request.status == RequestStatus.FINISHED_STOPPED
    stats = Request("s", [1], SamplingParams(max_tokens=1), None).take_prefill_stats()
    assert isinstance(stats, PrefillStats)
    assert stats.num_cached_tokens == 0


def test_scheduler_attributes() -> None:
    """Set by Scheduler.__init__, read by our subclass."""
    text = source(Scheduler.__init__)
    for name in (
        "num_spec_tokens",
        "requests",
        "running",
        "waiting",
        "block_size",
        "max_model_len",
        "max_num_running_reqs",
        "kv_cache_manager",
        "current_step",
    ):
        assert f"self.{name}" in text, name
    assert "usage" in dir(KVCacheManager)
    assert "self.watermark_blocks" in source(KVCacheManager.__init__)
    assert "self.block_pool" in source(KVCacheManager.__init__)


def test_messages_carry_what_we_put_in_them() -> None:
    """envelope.py: the free-form field of each message survives its way."""
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, extra_args={"picospec": b"\x00\xff"}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=EngineCoreRequest)
    assert decoded.sampling_params is not None
    assert decoded.sampling_params.extra_args == {"picospec": b"\x00\xff"}
    output = EngineCoreOutput("r", [])
    assert output.finish_reason is None
    assert output.prefill_stats is None
    assert {FinishReason.STOP, FinishReason.LENGTH} <= set(FinishReason)


def test_a_report_comes_through_its_own_socket() -> None:
    """reports.py: whatever the scheduler says reaches the client, in order."""

    async def exchange() -> list[EngineReport]:
        received: asyncio.Queue[EngineReport] = asyncio.Queue()
        receiver = ReportReceiver(received.put_nowait)
        await receiver.listen()
        sender = ReportSender(receiver.name)
        await asyncio.to_thread(lambda: [sender.send(report) for report in reports])
        try:
            return [await received.get() for _ in reports]
        finally:
            receiver.close()

    verdict = make_verdict(position=4, token_ids=(7,))
    large = make_verdict(position=5, token_ids=tuple(range(300_000)))  # beyond any one read
    reports = [
        EngineReport(
            events={"r": [Prefilled(first_position=4), verdict], "s": [NumericalError("NaN")]},
            stats=EngineStats(steps=2),
            wake_s=12.5,
        ),
        EngineReport(events={"r": [large]}, stats=EngineStats(steps=3)),
    ]
    first, second = asyncio.run(exchange())
    assert first.stats == reports[0].stats
    assert first.wake_s == 12.5
    assert first.events["r"] == reports[0].events["r"]
    assert isinstance(first.events["s"][0], NumericalError)
    assert second.events["r"] == [large]
    assert (second.stats.steps, second.wake_s) == (3, 0.0)


def test_extra_attributes_survive_pickling() -> None:
    """The step's plan and its outcome ride on vLLM's own dataclasses between processes."""
    step = SchedulerOutput.make_empty()
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    for carrier in (step, output):
        carrier.picospec = "ours"
        assert pickle.loads(pickle.dumps(carrier)).picospec == "ours"


def test_placeholders_are_removed_from_two_columns_on() -> None:
    """worker._sample pads with -1."""
    tokens, _ = RejectionSampler.parse_output(
        torch.tensor([[5, -1], [-1, -1], [7, 8]], dtype=torch.int32), 32
    )
    assert tokens == [[5], [], [7, 8]]


def test_runner_state() -> None:
    """What worker.py touches of the runner's batch and of its cached sessions."""
    batch = source(InputBatch.__init__)
    for name in ("token_ids_cpu", "is_token_ids", "num_tokens_no_spec", "req_id_to_index"):
        assert f"self.{name}" in batch, name
    assert "req_ids" in dir(InputBatch)
    assert "output_token_ids" in CachedRequestState.__dataclass_fields__
    assert "num_draft_tokens" in SpecDecodeMetadata.__dataclass_fields__
    assert set(SamplerOutput.__dataclass_fields__) >= {"sampled_token_ids", "logprobs_tensors"}
    assert "self.requests" in source(GPUModelRunner.__init__)


def test_speculative_config_accepts_our_proposer() -> None:
    fields = set(SpeculativeConfig.__dataclass_fields__)
    assert {"method", "model", "num_speculative_tokens"} <= fields
