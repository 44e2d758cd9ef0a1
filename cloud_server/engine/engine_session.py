"""A generation as the scheduler sees it, and judging a draft without a forward.

When a step accepts all its drafts, its last logits row is of the next position. Stock speculation
draws a bonus token from it; split verification may not (the edge draws), and would forward the last
token again with the next drafts. So the row is kept: the next draft is judged by it the moment it
arrives. Rejected, the edge knows at once; accepted, it takes the last token's place in the
next forward, which is a position shorter.

A row that the next draft will want is computed ahead: as soon as a recovered token is there it
is forwarded, alone if nothing else has come (the paper's pre-verification).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.v1.request import Request, RequestStatus

from cloud_server.engine.judging.verification import (
    StepKind,
    StepResult,
    VerificationParams,
    verify,
)
from picospec.protocol.draft_queue import DraftQueue, Work
from picospec.protocol.messages import EMPTY_TOKENS, Open, VerificationMode


@dataclass(slots=True, eq=False)
class EngineSession:
    """What the scheduler knows of a session beside vLLM's request."""

    request: Request
    opening: Open
    queue: DraftQueue
    params: VerificationParams
    keeps_rows: bool  # whether the worker hands rows out
    opened: bool = False  # the edge has been told that the prompt is in
    work: Work | None = None  # what the running step was asked to judge
    unseen_forced: list[int] = field(default_factory=list)  # appended, not in the worker yet
    last_step: int = 0  # in which it was scheduled, for least-recently-used eviction
    row: torch.Tensor | None = None  # [1, vocab_size] logits of position request.num_tokens
    row_due: bool = False  # the last token is to be forwarded whether drafts are there or not
    # Since the last verdict:
    num_by_row: int = 0  # drafts accepted by a row
    num_forwards: int = 0
    arrived_s: float = 0.0  # of the newest draft judged by a row

    @property
    def split(self) -> bool:
        return self.opening.mode is VerificationMode.SPLIT

    @property
    def prefilling(self) -> bool:
        return not self.opened or self.request.num_computed_tokens < self.request.num_tokens - 1

    @property
    def speaks(self) -> bool:
        """Whether its edge has asked for something: the prompt's prefill, or a judgement."""
        return not self.opened or self.row_due or self.queue.has_work

    @property
    def has_own_step(self) -> bool:
        """Whether a step can bring it forward, whatever its assist policy."""
        if self.speaks:
            return True
        return self.request.status == RequestStatus.RUNNING and self.prefilling

    def extended(self) -> None:
        """A token was committed beyond what was forwarded."""
        self.row = None
        self.row_due = self.keeps_rows

    def evicted(self) -> None:
        """Its KV cache is gone. A verdict that is owed brings it back, nothing else does."""
        self.row = None
        self.row_due = self.num_by_row > 0

    def judge_by_row(self, work: Work) -> StepResult:
        """Judge the one draft of `work`, or answer its probe. Uses the row up.

        Raises NumericalError.
        """
        assert self.row is not None
        row, self.row = self.row, None
        prompt = output = EMPTY_TOKENS
        if self.params.sampling.has_penalties:
            prompt = self.opening.prompt_token_ids
            output = np.array(self.request.all_token_ids[len(prompt) :], np.int32)
        return verify(
            row,
            self.params,
            position=work.position,
            draft_token_ids=work.token_ids,
            draft_probs=work.draft_probs,
            prompt_token_ids=prompt,
            output_token_ids=output,
            step=StepKind.PROBE if work.probe else StepKind.DRAFTS,
            attempt=max(0, work.probe - 1),
        )
