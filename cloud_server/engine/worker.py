"""vLLM's worker, taught to judge drafts that came over the wire.

The worker is vLLM's own; only its model runner is replaced by a subclass that
  - learns a session's verification parameters when the session first runs,
  - adds recovered tokens to its copy of the session before the forward, and
  - judges each session's logits rows with `verification.verify` where vLLM would sample.

Everything about devices stays in vLLM: this file works on whatever tensors it hands over.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.outputs import ModelRunnerOutput, SamplerOutput

from cloud_server.engine import step_costs
from cloud_server.engine.envelope import StepOutcome, unwrap
from cloud_server.engine.judging.torch_sampling import best_token_ids
from cloud_server.engine.judging.verification import VerificationParams, verify
from cloud_server.engine.step_plan import StepPlan, VerificationStep
from picospec.errors import NumericalError
from picospec.protocol.messages import EMPTY_TOKENS, Open, TokenArray

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker  # type: ignore[assignment]

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM logs in this process

PARENT_POLL_S = 1.0
_NO_TOKEN = -1  # vLLM's PLACEHOLDER_TOKEN_ID: removed when the output is parsed
_MIN_COLUMNS = 2  # with one column vLLM takes the output as it is, placeholders included


class VerificationRunner:
    """Mixed in before vLLM's model runner (see `VerificationWorker.init_device`)."""

    input_batch: Any
    requests: dict[str, Any]
    model_config: Any
    device: torch.device

    def prepare_verification(self) -> None:
        self._opens: dict[str, Open] = {}
        self._params: dict[str, VerificationParams] = {}
        self._step = VerificationStep()
        self._drafts: dict[str, list[int]] = {}
        self._outcome = StepOutcome()
        self._forward_started_s = 0.0
        self.step_s: dict[int, float] | None = None  # to be told with the next outcome

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._step = getattr(scheduler_output, "picospec", None) or VerificationStep()
        self._drafts = scheduler_output.scheduled_spec_decode_tokens
        for request_id in scheduler_output.finished_req_ids:
            self._params.pop(request_id, None)
            self._opens.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            request = unwrap(new.sampling_params and new.sampling_params.extra_args)
            if isinstance(request, Open):  # vLLM's warm-up requests have none
                self._opens[new.req_id] = request
                self._params[new.req_id] = VerificationParams.of(
                    request, self.model_config.get_vocab_size()
                )
        for request_id, token_ids in self._step.appended_token_ids.items():
            self._append(request_id, token_ids)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def _append(self, request_id: str, token_ids: list[int]) -> None:
        """Add recovered tokens to the cached session, as if it had sampled them itself."""
        state = self.requests.get(request_id)
        if state is None:
            return  # first run since the session was opened: the prompt has them
        state.output_token_ids.extend(token_ids)
        index = self.input_batch.req_id_to_index.get(request_id)
        if index is None:
            return  # not in the persistent batch: copied from the state when it is added
        start = self.input_batch.num_tokens_no_spec[index]
        end = start + len(token_ids)
        self.input_batch.token_ids_cpu[index, start:end] = token_ids
        self.input_batch.is_token_ids[index, start:end] = True
        self.input_batch.num_tokens_no_spec[index] = end

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        self._forward_started_s = time.perf_counter()
        return super()._model_forward(*args, **kwargs)  # type: ignore[misc]

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: Any | None
    ) -> SamplerOutput:
        """Judge every session that has a plan; the rest get no token.

        logits: [sum of (drafts + 1), logits_width], a session's rows contiguous, in the
        order of the batch.
        """
        started_s = time.perf_counter()
        step_s, self.step_s = self.step_s, None
        self._outcome = StepOutcome(step_s=step_s, forward_s=started_s - self._forward_started_s)
        request_ids = self.input_batch.req_ids
        num_drafts = (
            spec_decode_metadata.num_draft_tokens
            if spec_decode_metadata is not None
            else [0] * len(request_ids)
        )
        assert logits is not None
        plans = self._step.plans
        best: list[int] | None = None
        if any(self._params[request_id].takes_best for request_id in plans):
            best = best_token_ids(logits[:, : self.model_config.get_vocab_size()])
        tokens: list[list[int]] = []
        row = 0
        for request_id, count in zip(request_ids, num_drafts, strict=True):
            rows = slice(row, row + count + 1)
            row = rows.stop
            plan = plans.get(request_id)
            tokens.append(
                []
                if plan is None
                else self._judge(request_id, logits[rows], best and best[rows], plan)
            )
        columns = max(_MIN_COLUMNS, max(map(len, tokens), default=0))
        sampled = np.full((len(tokens), columns), _NO_TOKEN, np.int32)
        for index, token_ids in enumerate(tokens):
            sampled[index, : len(token_ids)] = token_ids
        self._outcome.sampling_s = time.perf_counter() - started_s
        return SamplerOutput(
            sampled_token_ids=torch.from_numpy(sampled).to(self.device), logprobs_tensors=None
        )

    def _judge(
        self, request_id: str, rows: torch.Tensor, best: Sequence[int] | None, plan: StepPlan
    ) -> list[int]:
        """The session's tokens. `best` are those of the highest logits in `rows`, if known."""
        drafts = self._drafts.get(request_id, [])[: plan.num_drafts]
        params = self._params[request_id]
        prompt, output = (
            self._history(request_id, plan.position)
            if params.sampling.has_penalties
            else (EMPTY_TOKENS, EMPTY_TOKENS)
        )
        try:
            result = verify(
                rows,
                params,
                position=plan.position,
                draft_token_ids=drafts,
                draft_probs=plan.draft_probs,
                prompt_token_ids=prompt,
                output_token_ids=output,
                step=plan.kind,
                attempt=plan.attempt,
                best=best,
            )
        except NumericalError as error:  # this session's logits; the others' are sound
            self._outcome.results[request_id] = error
            return []
        self._outcome.results[request_id] = result
        if plan.keep_row and result.rejection is None and not result.token_ids:
            self._outcome.rows[request_id] = rows[plan.num_drafts : plan.num_drafts + 1].clone()
        return [*drafts[: result.num_accepted], *result.token_ids]

    def _history(self, request_id: str, position: int) -> tuple[TokenArray, TokenArray]:
        """The session's prompt and its output before `position` (views)."""
        index = self.input_batch.req_id_to_index[request_id]
        token_ids = self.input_batch.token_ids_cpu[index]
        prompt_length = len(self._opens[request_id].prompt_token_ids)
        return token_ids[:prompt_length], token_ids[prompt_length:position]

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if isinstance(output, ModelRunnerOutput):
            output.picospec = self._outcome  # type: ignore[attr-defined]
        return output

    def take_draft_token_ids(self) -> None:
        """Drafts come over the wire, never from the runner."""
        return


def _follow_parent() -> None:
    """Let the parent process decide when this one ends.

    Ctrl-C at a terminal goes to its whole process group, which would end the engine under the
    sessions that the daemon is still draining; so the engine leaves that group. And a parent that
    is killed tells nobody, so a thread looks whether it is still there.
    """
    os.setpgid(0, 0)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


class VerificationWorker(_Worker):
    """The engine's `worker_cls`."""

    def init_device(self) -> None:
        _follow_parent()
        super().init_device()  # type: ignore[no-untyped-call]
        runner: Any = self.model_runner
        runner.__class__ = type(
            f"Verification{type(runner).__name__}", (VerificationRunner, type(runner)), {}
        )
        runner.prepare_verification()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        if current_platform.is_cpu():
            longest = min(step_costs.MEASURED_TOKENS[-1], runner.max_num_tokens)
            counts = [count for count in step_costs.MEASURED_TOKENS if count <= longest]
            runner.step_s = step_costs.measure(self._forward, counts)
            logger.info(
                "forwards by their tokens take, in ms: %s",
                {count: round(1e3 * each, 2) for count, each in runner.step_s.items()},
            )
        return times

    @torch.inference_mode()
    def _forward(self, num_tokens: int) -> None:
        """A forward of `num_tokens` with all their logits, as verification needs them."""
        runner: Any = self.model_runner
        hidden_states, _ = runner._dummy_run(num_tokens)
        runner.model.compute_logits(hidden_states[:num_tokens])
