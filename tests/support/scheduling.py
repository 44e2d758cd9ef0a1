"""The real scheduler over vLLM's, stepped by hand, with a model that always says 1.

Blocks of KV cache are counted as in the engine; only the forward is missing.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from cloud_server.config import EngineConfig
from cloud_server.engine.envelope import Delivery, StepOutcome, wrap
from cloud_server.engine.interface import EngineEvent, EngineStats
from cloud_server.engine.judging.verification import StepKind, StepResult
from cloud_server.engine.model import build_vllm_config
from cloud_server.engine.reports import ReportParser, socket_path
from cloud_server.engine.scheduler import VerificationScheduler
from cloud_server.engine.step_plan import StepPlan
from picospec.protocol.messages import AssistPolicy, Draft, Rejection, Verdict, VerificationMode
from tests.support.builders import COUPLED, SPLIT, make_open, token_array
from tests.support.tiny import VOCAB_SIZE

BLOCK_SIZE = 32
TOKEN_ID = 1  # what the model says
LOGITS = torch.zeros(1, VOCAB_SIZE)
LOGITS[0, TOKEN_ID] = 99.0


@dataclass(slots=True)
class Edge:
    """A session as its edge has it."""

    mode: VerificationMode
    position: int  # of the next token
    max_tokens: int
    committed: int = 0  # tokens of output
    epoch: int = 0
    rejected: bool = False  # split: the next frame begins with the recovered token
    chain: list[int] = field(default_factory=list)  # drafts without a verdict
    waits: bool = True  # for a verdict
    finished: bool = False

    def told(self, verdict: Verdict) -> None:
        """Commit what `verdict` says. A chain that it contradicts is over."""
        assert verdict.position == self.position
        num_tokens = verdict.num_accepted + len(verdict.token_ids)
        self.committed += num_tokens
        self.position += num_tokens
        committed = [*self.chain[: verdict.num_accepted], *verdict.token_ids]
        known = self.chain[: len(committed)]
        self.rejected = verdict.rejection is not None
        if self.rejected or known != committed[: len(known)]:
            self.chain.clear()
            self.epoch += 1
        else:
            del self.chain[: len(committed)]
        self.waits = bool(self.chain)
        self.finished = verdict.finish_reason is not None


class CheckedScheduler(VerificationScheduler):
    """The scheduler, which looks after itself."""

    def check(self) -> None:
        """Raises AssertionError if a session is not where its state says."""
        self._ready.check(self._sessions.values())


class SteppedEngine:
    """Sessions of the real scheduler, stepped by hand."""

    def __init__(self, model: Path, *, num_blocks: int, max_model_len: int = 1024) -> None:
        """`num_blocks` of KV cache, of 32 tokens each, are there for sessions."""
        self._folder = tempfile.TemporaryDirectory(prefix="picospec-engine-")
        name = Path(self._folder.name).name
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(socket_path(name))
        listener.listen()
        config = build_vllm_config(
            EngineConfig(
                model=str(model),
                args={"max_model_len": max_model_len, "max_num_seqs": 32, "enforce_eager": True},
            ),
            name,
        )
        config.cache_config.num_gpu_blocks = num_blocks + 1  # one is vLLM's own
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self.scheduler = CheckedScheduler(
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
        self._reports, _ = listener.accept()
        self._reports.setblocking(False)
        self._parser = ReportParser()
        listener.close()
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.edges: dict[str, Edge] = {}
        self.stats = EngineStats()
        self.checks = True  # whether the scheduler's state is checked after each event
        self._num_opened = 0

    # -- what edges do ---------------------------------------------------------------------------

    def open(
        self,
        key: str,
        *,
        prompt_tokens: int,
        max_tokens: int = 100,
        mode: VerificationMode = COUPLED,
        assist: AssistPolicy = AssistPolicy.NEVER,
    ) -> None:
        """A session whose prompt shares no block with another's."""
        self._num_opened += 1
        first = divmod(self._num_opened, VOCAB_SIZE - 2)
        request = make_open(
            session_id=key,
            prompt_token_ids=[*first, *[TOKEN_ID] * prompt_tokens][:prompt_tokens],
            max_tokens=max_tokens,
            mode=mode,
            assist=assist,
        )
        self.edges[key] = Edge(mode, prompt_tokens, max_tokens)
        self._add(key, request.prompt_token_ids.tolist(), max_tokens, wrap(request))

    def ask(self, *keys: str) -> None:
        """The edges of coupled sessions `keys`, all at once, each ask for the next token."""
        self._deliver(
            {key: Draft(self.edges[key].epoch, self.edges[key].position, probe=1) for key in keys}
        )

    def draft(self, key: str, *token_ids: int) -> None:
        """The edge of session `key` drafts, after a rejection with the recovered token first."""
        edge = self.edges[key]
        forced = (TOKEN_ID,) if edge.rejected else ()
        draft = Draft(
            edge.epoch,
            edge.position,
            token_ids=(*forced, *token_ids),
            draft_probs=(0.5,) * len(token_ids) if edge.mode is SPLIT else (),
            num_forced=len(forced),
        )
        edge.position += len(forced)
        edge.committed += len(forced)
        edge.rejected = False
        edge.chain += token_ids
        self._deliver({key: draft})

    def abort(self, key: str) -> None:
        self.scheduler.finish_requests(key, RequestStatus.FINISHED_ABORTED)
        del self.edges[key]
        self._check()

    def _deliver(self, drafts: dict[str, Draft]) -> None:
        for key, draft in drafts.items():
            # A recovered token alone is not judged.
            self.edges[key].waits = not draft.num_forced or len(draft.token_ids) > 1
        now = time.monotonic()
        deliveries = [Delivery(key, draft, now) for key, draft in drafts.items()]
        self._add("deliveries", [0], 1, wrap(deliveries))

    def _add(
        self, key: str, prompt: list[int], max_tokens: int, extra_args: dict[str, Any]
    ) -> None:
        request = EngineCoreRequest(
            request_id=key,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(
                temperature=0.0, max_tokens=max_tokens, extra_args=extra_args
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.scheduler.add_request(Request.from_engine_core_request(request, self._hasher))
        self._check()

    # -- what the engine does --------------------------------------------------------------------

    def step(self) -> int:
        """One step of the engine; returns how many tokens it forwarded."""
        scheduled = self.scheduler.schedule()
        forwarded = self._forward(scheduled)
        self.scheduler.update_from_output(scheduled, forwarded)
        self._read_reports()
        self._check()
        return sum(scheduled.num_scheduled_tokens.values())

    def _read_reports(self) -> None:
        with suppress(BlockingIOError):
            while data := self._reports.recv(1 << 16):
                for report in self._parser.feed(data):
                    self.stats = report.stats
                    for key, events in report.events.items():
                        self._tell(key, events)

    def run(self, *, steps_max: int = 50) -> None:
        """Step until nothing is left to do. Raises AssertionError if that takes too many steps."""
        for _ in range(steps_max):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"{self.stats} after {steps_max} steps")

    def _forward(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """What the worker would answer."""
        keys = list(scheduled.num_scheduled_tokens)
        plans: dict[str, StepPlan] = scheduled.picospec.plans  # type: ignore[attr-defined]
        outcome = StepOutcome()
        sampled: list[list[int]] = []
        for key in keys:
            plan = plans.get(key)
            if plan is None:
                sampled.append([])
                continue
            drafts = scheduled.scheduled_spec_decode_tokens.get(key, [])[: plan.num_drafts]
            result = judge(drafts, plan, mode=self.edges[key].mode)
            outcome.results[key] = result
            sampled.append([*drafts[: result.num_accepted], *result.token_ids])
            if plan.keep_row and result.rejection is None and not result.token_ids:
                outcome.rows[key] = LOGITS.clone()
        output = ModelRunnerOutput(
            req_ids=keys,
            req_id_to_index={key: index for index, key in enumerate(keys)},
            sampled_token_ids=sampled,
        )
        output.picospec = outcome  # type: ignore[attr-defined]
        return output

    def _tell(self, key: str, events: Sequence[EngineEvent]) -> None:
        for event in events:
            assert not isinstance(event, Exception), event
            if isinstance(event, Verdict):
                self.edges[key].told(event)

    def _check(self) -> None:
        if self.checks:
            self.scheduler.check()


def judge(drafts: Sequence[int], plan: StepPlan, *, mode: VerificationMode) -> StepResult:
    """What verification decides where the target always says TOKEN_ID."""
    num_accepted = next((n for n, token in enumerate(drafts) if token != TOKEN_ID), len(drafts))
    if mode is COUPLED or plan.kind is StepKind.FIRST:
        return StepResult(num_accepted, (TOKEN_ID,))
    if num_accepted < len(drafts):
        rejection = Rejection(token_array(TOKEN_ID), np.ones(1, np.float32))
        return StepResult(num_accepted, rejection=rejection)
    return StepResult(num_accepted)
