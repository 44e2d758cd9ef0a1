"""The real scheduler over vLLM's, stepped by hand, with a model that always says 1.

Blocks of KV cache are counted as in the engine; only the forward is missing.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from cloud_server.config import EngineConfig
from cloud_server.engine.envelope import Delivery, StepOutcome, VerificationOutputs, wrap
from cloud_server.engine.interface import EngineEvent, EngineStats
from cloud_server.engine.judging.verification import StepResult
from cloud_server.engine.model import build_vllm_config
from cloud_server.engine.scheduler import VerificationScheduler
from picospec.protocol.messages import Draft, FinishReason, Verdict
from tests.support.builders import make_open

BLOCK_SIZE = 32
TOKEN_ID = 1  # what the model says, and what is drafted here


class SteppedEngine:
    """Coupled sessions of the real scheduler, stepped by hand."""

    def __init__(self, model: Path, *, num_blocks: int, max_model_len: int = 1024) -> None:
        """`num_blocks` of KV cache, of 32 tokens each, are there for sessions."""
        config = build_vllm_config(
            EngineConfig(
                model=str(model),
                args={"max_model_len": max_model_len, "max_num_seqs": 32, "enforce_eager": True},
            )
        )
        config.cache_config.num_gpu_blocks = num_blocks + 1  # one is vLLM's own
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self.scheduler = VerificationScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks + 1,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.num_steps = 0
        self.forwarded_tokens = 0
        self.stats = EngineStats()
        self.committed: dict[str, int] = {}  # tokens of output, by session
        self._positions: dict[str, int] = {}
        self._num_opened = 0

    def open(self, key: str, *, prompt_tokens: int, max_tokens: int = 100) -> None:
        """A session whose prompt shares no block with another's."""
        self._num_opened += 1
        request = make_open(
            session_id=key,
            prompt_token_ids=[1 + self._num_opened] * prompt_tokens,
            max_tokens=max_tokens,
        )
        self.committed[key] = 0
        self._positions[key] = prompt_tokens
        self._add(
            EngineCoreRequest(
                request_id=key,
                prompt_token_ids=request.prompt_token_ids.tolist(),
                mm_features=None,
                sampling_params=SamplingParams(
                    temperature=0.0, max_tokens=max_tokens, extra_args=wrap(request)
                ),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )

    def ask(self, *keys: str) -> None:
        """The edges of sessions `keys` each ask for the next token."""
        deliveries = [
            Delivery(key, Draft(0, self._positions[key], probe=1), time.monotonic()) for key in keys
        ]
        self._add(
            EngineCoreRequest(
                request_id="deliveries",
                prompt_token_ids=[0],
                mm_features=None,
                sampling_params=SamplingParams(max_tokens=1, extra_args=wrap(deliveries)),
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )

    def abort(self, key: str) -> None:
        self.scheduler.finish_requests(key, RequestStatus.FINISHED_ABORTED)

    def step(self) -> int:
        """One step of the engine; returns how many tokens it forwarded."""
        output = self.scheduler.schedule()
        request_ids = list(output.num_scheduled_tokens)
        plans = output.picospec.plans  # type: ignore[attr-defined]
        runner_output = ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={key: index for index, key in enumerate(request_ids)},
            sampled_token_ids=[
                [TOKEN_ID] * (plans[key].num_drafts + 1) if key in plans else []
                for key in request_ids
            ],
        )
        runner_output.picospec = StepOutcome(  # type: ignore[attr-defined]
            results={key: StepResult(plan.num_drafts, (TOKEN_ID,)) for key, plan in plans.items()}
        )
        for outputs in self.scheduler.update_from_output(output, runner_output).values():
            assert isinstance(outputs, VerificationOutputs)
            report = outputs.open_report()
            assert report is not None
            self.stats = report.stats
            for key, events in report.events.items():
                self._told(key, events)
        self.num_steps += 1
        num_tokens = sum(output.num_scheduled_tokens.values())
        self.forwarded_tokens += num_tokens
        return num_tokens

    def run(self, *, steps_max: int = 50) -> None:
        """Step until nothing is left to do. Raises AssertionError if that takes too many steps."""
        for _ in range(steps_max):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"{self.stats} after {steps_max} steps")

    def _add(self, request: EngineCoreRequest) -> None:
        self.scheduler.add_request(Request.from_engine_core_request(request, self._hasher))

    def _told(self, key: str, events: list[EngineEvent]) -> None:
        for event in events:
            assert not isinstance(event, Exception), event
            if isinstance(event, Verdict):
                num_tokens = event.num_accepted + len(event.token_ids)
                self.committed[key] += num_tokens
                self._positions[key] += num_tokens
                assert event.finish_reason in (None, FinishReason.LENGTH)
