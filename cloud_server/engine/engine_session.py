"""A generation as the scheduler sees it, and judging a draft without a forward.

When a step accepts all its drafts, its last logits row is of the next position. Stock speculation
draws a bonus token from it. Split verification may not, because the edge draws, and would forward
the last token again with the next drafts. So the row is kept: the next draft is judged by it the
moment it arrives. If it is rejected, the edge knows at once; if it is accepted, it takes the last
token's place in the next forward, which is a position shorter.

A row that the next draft will need is computed ahead: a recovered token is forwarded as soon as
it is there, alone if nothing else has come (the paper's pre-verification). Where the cloud takes
over it draws from the row, and forwards what it has drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import torch

from cloud_server.engine.judging.verification import (
    StepKind,
    StepResult,
    VerificationParams,
    verify,
)
from cloud_server.engine.takeover import (
    TAKEOVERS,
    DraftFlow,
    NeverTakeOver,
    Occasion,
    Takeover,
)
from cloud_server.engine.verdicts import Tally
from picospec.protocol.draft_queue import DraftQueue, Work
from picospec.protocol.messages import (
    EMPTY_TOKENS,
    AssistPolicy,
    Draft,
    Open,
    Verdict,
    VerificationMode,
)


class EngineRequest(Protocol):
    """What this package reads and writes of vLLM's request (vllm/v1/request.py)."""

    request_id: str
    max_tokens: int
    num_computed_tokens: int
    is_prefill_chunk: bool  # the step that was scheduled last leaves some of the prompt
    spec_token_ids: list[int]  # drafts for the coming step
    next_decode_eligible_step: int  # the number of the first step that may schedule it

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def all_token_ids(self) -> Sequence[int]: ...


@dataclass(slots=True, eq=False)
class EngineSession:
    """What the scheduler knows of a session beside vLLM's request."""

    request: EngineRequest
    opening: Open
    queue: DraftQueue
    params: VerificationParams
    takeover: Takeover
    keeps_rows: bool  # whether the worker hands rows out
    resident: bool = False  # holds KV cache: vLLM has scheduled it, and nobody has evicted it
    opened: bool = False  # the edge has been told that the prompt is in
    flow: DraftFlow = field(default_factory=DraftFlow)
    draft_budget: int | None = None  # most drafts that pay in one step; told with each verdict
    goes_alone: bool = False  # the running step has no draft of it to judge
    work: Work | None = None  # what the running step was asked to judge
    # Appended by the scheduler (recovered by the edge, or accepted by a row); the worker's copy of
    # the session has not seen them.
    appended_token_ids: list[int] = field(default_factory=list)
    last_step: int = 0  # in which it was scheduled, for least-recently-used eviction
    row: torch.Tensor | None = None  # [1, vocab_size] logits of position request.num_tokens
    row_due: bool = False  # the last token is to be forwarded whether drafts are there or not
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def of(
        cls, request: EngineRequest, opening: Open, *, logits_width: int, may_keep_rows: bool
    ) -> Self:
        """A new session, as `opening` asks for it."""
        whole_rounds = opening.verify_whole_rounds
        split = opening.mode is VerificationMode.SPLIT
        return cls(
            request,
            opening,
            DraftQueue(opening.mode, request.all_token_ids, verify_whole_rounds=whole_rounds),
            VerificationParams.of(opening, logits_width),
            TAKEOVERS[opening.assist],
            keeps_rows=may_keep_rows and split and not whole_rounds,
            flow=DraftFlow(survives=not split or opening.sampling.temperature == 0.0),
        )

    @property
    def split(self) -> bool:
        return self.opening.mode is VerificationMode.SPLIT

    @property
    def prefilling(self) -> bool:
        return not self.opened or self.request.num_computed_tokens < self.request.num_tokens - 1

    @property
    def edge_waits(self) -> bool:
        """Whether the edge waits for something: the prompt's prefill, or a judgement."""
        return not self.opened or self.row_due or self.queue.has_work

    @property
    def has_work(self) -> bool:
        """Whether the next step can bring the session forward, its takeover left out."""
        return self.edge_waits or (self.resident and self.prefilling)

    @property
    def may_be_taken_over(self) -> bool:
        """Whether the cloud may ever decode the next token alone."""
        return not (isinstance(self.takeover, NeverTakeOver) or self.queue.is_edges_turn)

    @property
    def is_auto(self) -> bool:
        return self.opening.assist is AssistPolicy.AUTO

    def is_taken_over(self, occasion: Occasion) -> bool:
        """Whether the coming step may decode without a draft of it."""
        return self.may_be_taken_over and self.takeover.is_due(occasion)

    def has_step(self, occasion: Occasion) -> bool:
        return self.has_work or self.is_taken_over(occasion)

    def deliver(self, draft: Draft, arrived_s: float) -> int | None:
        """Queue a frame; returns the recovered token at its head, to be appended at once."""
        was_dead = self.queue.is_dead
        recovered = self.queue.add(draft, arrived_s)
        num_drafts = len(draft.token_ids) - draft.num_forced
        self.flow.arrived(
            draft.epoch, draft.base_position + draft.num_forced, num_drafts, arrived_s
        )
        if self.queue.is_dead and not was_dead:
            self.flow.broke()
        return recovered

    def is_held(self, step: int) -> bool:
        """Whether it holds KV cache, and step number `step` leaves it out."""
        return self.resident and self.request.next_decode_eligible_step > step

    def scheduled(self, step: int) -> None:
        """Step number `step` forwards tokens of it."""
        self.resident = True
        self.last_step = step

    def evicted(self) -> None:
        """Its KV cache is gone. Only a verdict that is still owed brings it back by itself."""
        self.resident = False
        self.row = None
        self.row_due = self.tally.num_by_row > 0

    def append(self, token_id: int) -> None:
        """Note a token that the scheduler has appended to the request.

        Every token before it has been forwarded: the row it was judged by came from that.
        """
        self.appended_token_ids.append(token_id)
        self.extended()
        if self.resident:
            self.request.num_computed_tokens = self.request.num_tokens - 1

    def judge_by_row(self, work: Work) -> StepResult:
        """Judge the one draft of `work`, or answer its probe. Uses the row up.

        Raises NumericalError.
        """
        self.tally.arrived_s = work.arrived_s
        return self._verify_row(
            draft_token_ids=work.token_ids,
            draft_probs=work.draft_probs,
            step=StepKind.PROBE if work.probe else StepKind.DRAFTS,
            attempt=max(0, work.probe - 1),
        )

    def draw_from_row(self) -> int:
        """The cloud's own token for the row's position. Uses the row up. Raises NumericalError."""
        result = self._verify_row(draft_token_ids=(), draft_probs=(), step=StepKind.FIRST)
        return result.token_ids[0]

    def _verify_row(
        self,
        *,
        draft_token_ids: Sequence[int],
        draft_probs: Sequence[float],
        step: StepKind,
        attempt: int = 0,
    ) -> StepResult:
        assert self.row is not None
        row, self.row = self.row, None
        prompt = output = EMPTY_TOKENS
        if self.params.sampling.has_penalties:
            prompt = self.opening.prompt_token_ids
            output = np.array(self.request.all_token_ids[len(prompt) :], np.int32)
        return verify(
            row,
            self.params,
            position=self.request.num_tokens,
            draft_token_ids=draft_token_ids,
            draft_probs=draft_probs,
            prompt_token_ids=prompt,
            output_token_ids=output,
            step=step,
            attempt=attempt,
        )

    def told(self, verdict: Verdict, now: float) -> None:
        """`verdict` is on its way; its tokens are in the request."""
        rejected = verdict.rejection is not None
        alone = bool(verdict.token_ids) and not verdict.num_draft_tokens
        had_drafts = self.queue.has_drafts
        self.queue.judged(rejected=rejected)
        self.flow.judged(verdict.num_draft_tokens, verdict.num_accepted)
        missed = verdict.num_accepted < verdict.num_draft_tokens
        broken = missed or (had_drafts and self.queue.is_dead)
        position = self.request.num_tokens + rejected
        self.flow.told(position, broken=broken, alone=alone and not had_drafts, now=now)

    def extended(self) -> None:
        """A token was committed beyond what was forwarded: it has no row yet."""
        self.row = None
        self.row_due = self.keeps_rows
