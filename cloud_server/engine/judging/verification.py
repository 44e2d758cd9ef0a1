"""Judging drafts: one session's logits in, what one verification step decided out.

The rules of this file (docs/protocol.md has them in full):
1. Split: a draft x is accepted while u < P(x) / q(x). At the first rejection nothing is drawn;
   the edge gets the Rejection and draws the recovered token. After full acceptance nothing
   more is emitted.
2. Coupled: a draft is accepted exactly if it is the token the target draws itself with the
   shared noise. The token at the first mismatch (recovered) or after the last draft (bonus)
   is always emitted.
3. Nothing after the first rejection is looked at, and no noise of a later position is used.

Noise is a function of the position, so sessions may be judged in any order and any batch.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.engine.judging.torch_sampling import (
    NO_LAW,
    NO_TOKEN,
    TargetDistribution,
    best_token_ids,
    penalised,
    process,
)
from picospec.errors import NumericalError
from picospec.protocol.messages import (
    EMPTY_TOKENS,
    Open,
    Rejection,
    SamplingParams,
    VerificationMode,
)
from picospec.sampling.distribution import GREEDY_TEMPERATURE
from picospec.sampling.noise import Purpose, uniform
from picospec.sampling.rejection import accept


class StepKind(enum.Enum):
    """What a step is to decide."""

    DRAFTS = "drafts"  # judge the drafts
    FIRST = "first"  # no drafts: the generation's first token, the cloud's own
    PROBE = "probe"  # no drafts: split sends P, coupled its own token


@dataclass(frozen=True, slots=True)
class VerificationParams:
    """How one session is judged, as its Open said.

    `exact` and `sparse_k` shape the Rejection of split mode (`sparse_k` 0: all of P). Not
    exact, the edge draws from P truncated; drafts are judged by P itself all the same.
    """

    mode: VerificationMode
    sampling: SamplingParams
    exact: bool
    sparse_k: int
    logits_width: int  # logits beyond it are padding

    @classmethod
    def of(cls, opening: Open, logits_width: int) -> VerificationParams:
        """What `opening` asks for."""
        return cls(opening.mode, opening.sampling, opening.exact, opening.sparse_k, logits_width)

    @property
    def takes_best(self) -> bool:
        """Whether the rows' highest logits decide, as they are."""
        sampling = self.sampling
        is_greedy = sampling.temperature < GREEDY_TEMPERATURE
        return is_greedy and not (sampling.has_penalties or sampling.logit_bias)


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """As in messages.Verdict: the accepted drafts, then the cloud's own tokens or a rejection."""

    num_accepted: int
    token_ids: tuple[int, ...] = ()
    rejection: Rejection | None = None


def verify(
    logits: torch.Tensor,
    params: VerificationParams,
    position: int,
    draft_token_ids: Sequence[int],
    draft_probs: Sequence[float],
    prompt_token_ids: NDArray[np.integer] = EMPTY_TOKENS,
    output_token_ids: NDArray[np.integer] = EMPTY_TOKENS,
    step: StepKind = StepKind.DRAFTS,
    attempt: int = 0,
    best: Sequence[int] | None = None,
) -> StepResult:
    """Judges k drafts by the target's logits.

    `logits` is [k + 1, vocab_size], any float type and device, and stays as it is; row i is of
    `position + i`, where draft i stands. `draft_probs` are the k values q(x), split only.
    Prompt and output (all tokens before `position`) are looked at only with penalties.
    `attempt` is the number of the tail sample a PROBE asks for. `best` are the rows' best tokens,
    where the caller knows them (`best_token_ids`) and `params.takes_best`. Raises NumericalError
    where logits that matter do not define a probability distribution.

    With two drafts of which the second is rejected at position 8 in coupled mode,
    `verify(logits, params, 7, [5, 6], ())` is `StepResult(1, (recovered,))`.
    """
    num_rows = len(draft_token_ids) + 1
    rows = logits[:num_rows, : params.logits_width]
    sampling = params.sampling
    if sampling.temperature < GREEDY_TEMPERATURE and not sampling.has_penalties:
        if best is None or not params.takes_best:
            best = best_token_ids(penalised(rows, sampling, prompt_token_ids, output_token_ids))
        return _verify_greedy(best[:num_rows], params.mode, draft_token_ids, step)

    def target(index: int) -> TargetDistribution:
        output = output_token_ids
        if sampling.has_penalties and index:
            output = np.concatenate([output, np.asarray(draft_token_ids[:index], np.int64)])
        return process(rows[index], sampling, prompt_token_ids, output)

    def rejected(index: int, distribution: TargetDistribution, attempt: int) -> StepResult:
        where = (sampling.seed, position + index, attempt)
        return StepResult(
            index, rejection=distribution.rejection(params.sparse_k, params.exact, *where)
        )

    num_drafts = len(draft_token_ids)
    if params.mode is VerificationMode.COUPLED:
        for index in range(num_drafts + 1):
            token_id = target(index).draw(sampling.seed, position + index, Purpose.COUPLED)
            if index == num_drafts or token_id != draft_token_ids[index]:
                return StepResult(index, (token_id,))
    if step is StepKind.FIRST:
        return StepResult(0, (target(0).draw(sampling.seed, position, Purpose.FIRST),))
    for index, (draft_token_id, draft_prob) in enumerate(
        zip(draft_token_ids, draft_probs, strict=True)
    ):
        distribution = target(index)
        u = uniform(sampling.seed, position + index, Purpose.ACCEPT)
        if not accept(u, distribution.prob(draft_token_id), draft_prob):
            return rejected(index, distribution, attempt=0)
    if step is StepKind.PROBE:
        return rejected(0, target(0), attempt)
    return StepResult(num_drafts)


def _verify_greedy(
    best: Sequence[int], mode: VerificationMode, draft_token_ids: Sequence[int], step: StepKind
) -> StepResult:
    """All rows at once: P is one-hot, so a draft is accepted exactly if it is the best token."""
    if NO_TOKEN in best:
        raise NumericalError(NO_LAW)
    num_accepted = 0
    while (
        num_accepted < len(draft_token_ids) and draft_token_ids[num_accepted] == best[num_accepted]
    ):
        num_accepted += 1
    if mode is VerificationMode.COUPLED or step is StepKind.FIRST:
        return StepResult(num_accepted, (best[num_accepted],))
    if num_accepted == len(draft_token_ids) and step is StepKind.DRAFTS:
        return StepResult(num_accepted)
    token_ids = np.array([best[num_accepted]], np.int32)
    return StepResult(num_accepted, (), Rejection(token_ids, np.ones(1, np.float32)))
