"""The processed distribution (picospec/sampling/distribution.py) of torch logits on any device.

On the CPU a tensor's memory is numpy's too, so `process` is distribution.process itself (whose
sort and partition are also several times faster). On other devices the same rules are applied
here, in the same order, ties at a filter's border included; only rounding may differ.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.engine.judging import torch_noise
from picospec.errors import NumericalError
from picospec.protocol.messages import Rejection, SamplingParams
from picospec.sampling import distribution
from picospec.sampling.distribution import GREEDY_TEMPERATURE, penalties_at
from picospec.sampling.noise import Purpose

REJECTION_TAIL_MASS_MAX = 1e-3  # what a Rejection may leave out of S, `sparse_k` allowing
REJECTION_TAIL_MASS_MIN = 1e-12  # far below the rounding of P on S; less is no tail
NO_TOKEN = -1  # of a row that has no best one
NO_LAW = "the target's logits do not define a probability distribution: NaN, +inf or only -inf"


@dataclass(frozen=True, slots=True, eq=False)
class TargetDistribution:
    """P at one position, like `distribution.Distribution`: dense where `token_ids` is None."""

    token_ids: torch.Tensor | None  # integers [n], ascending
    probs: torch.Tensor  # float32 [n]

    def prob(self, token_id: int) -> float:
        """P(token_id); 0 for an id that is not in it."""
        if self.token_ids is not None:
            return float(self.probs[self.token_ids == token_id].sum())
        return float(self.probs[token_id]) if 0 <= token_id < len(self.probs) else 0.0

    def draw(self, seed: int, position: int, purpose: Purpose, attempt: int = 0) -> int:
        """A token id drawn with the noise of (seed, position, purpose, attempt)."""
        index = torch_noise.race(self.probs, self.token_ids, seed, position, purpose, attempt)
        return index if self.token_ids is None else int(self.token_ids[index])

    def rejection(
        self, sparse_k: int, exact: bool, seed: int, position: int, attempt: int
    ) -> Rejection:
        """What the edge needs of P to draw the recovered token.

        S is the smallest Top-K that leaves at most REJECTION_TAIL_MASS_MAX, of at most
        `sparse_k` tokens; 0 is no limit: all of P, zeros included, in order of the ids. Not
        `exact`: P truncated to S and renormalised, without a tail.
        """
        if not sparse_k:
            return self._dense()
        top_probs, top_index = self.probs.topk(min(sparse_k, len(self.probs)))
        probs = top_probs.cpu().numpy()
        held = np.cumsum(probs, dtype=np.float64)
        size = min(
            int(np.count_nonzero(probs)),
            int(np.searchsorted(held, 1.0 - REJECTION_TAIL_MASS_MAX)) + 1,
        )
        probs, top_index = probs[:size], top_index[:size]
        top_ids = top_index if self.token_ids is None else self.token_ids[top_index]
        ids = top_ids.to(torch.int32).cpu().numpy()
        if not exact:
            return Rejection(ids, probs / probs.sum())
        tail = TargetDistribution(self.token_ids, self.probs.index_fill(0, top_index, 0.0))
        tail_mass = float(tail.probs.sum(dtype=torch.float64))
        if tail_mass < REJECTION_TAIL_MASS_MIN:
            return Rejection(ids, probs)
        token_id = tail.draw(seed, position, Purpose.TAIL, attempt)
        return Rejection(ids, probs, tail_mass, token_id, tail.prob(token_id))

    def _dense(self) -> Rejection:
        ids = torch.arange(len(self.probs)) if self.token_ids is None else self.token_ids
        return Rejection(ids.to(torch.int32).cpu().numpy(), self.probs.cpu().numpy())


def process(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt_token_ids: NDArray[np.integer],
    output_token_ids: NDArray[np.integer],
) -> TargetDistribution:
    """`distribution.process` for one row of logits [vocab_size], which stays as it is.

    Raises NumericalError where the logits do not define a probability distribution.
    """
    if logits.device.type != "cpu":
        return process_on_device(logits, params, prompt_token_ids, output_token_ids)
    law = distribution.process(logits.float().numpy(), params, prompt_token_ids, output_token_ids)
    token_ids = None if law.token_ids is None else torch.from_numpy(law.token_ids)
    return TargetDistribution(token_ids, torch.from_numpy(law.probs))


def process_on_device(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt_token_ids: NDArray[np.integer],
    output_token_ids: NDArray[np.integer],
) -> TargetDistribution:
    """`process` in torch alone."""
    scores = penalised(logits.float(), params, prompt_token_ids, output_token_ids)
    peak, best = scores.max(dim=0)
    if not math.isfinite(peak):
        raise NumericalError(NO_LAW)
    if params.temperature < GREEDY_TEMPERATURE:
        return TargetDistribution(best.view(1), torch.ones(1, device=scores.device))
    scores = scores - peak
    if params.temperature != 1.0:
        scores /= params.temperature
    token_ids = None
    if params.min_p > 0.0 or 0 < params.top_k < len(scores) or params.top_p < 1.0:
        token_ids, scores = _filtered(scores, params)
    return TargetDistribution(token_ids, scores.softmax(0))


def best_token_ids(rows: torch.Tensor) -> list[int]:
    """The token with the highest logit of each row [n, vocab_size]; NO_TOKEN if it is not finite.

    NaN counts as the highest, in numpy's argmax (ten times as fast as torch's) as in torch's.
    """
    if rows.device.type == "cpu":
        scores = rows.float().numpy()
        token_ids = [int(row.argmax()) for row in scores]
        peaks = [float(row[token_id]) for row, token_id in zip(scores, token_ids, strict=True)]
    else:
        best = rows.argmax(dim=-1)
        peaks = rows.gather(-1, best[:, None]).view(-1).tolist()
        token_ids = best.tolist()
    return [
        token_id if math.isfinite(peak) else NO_TOKEN
        for token_id, peak in zip(token_ids, peaks, strict=True)
    ]


def penalised(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt_token_ids: NDArray[np.integer],
    output_token_ids: NDArray[np.integer],
) -> torch.Tensor:
    """Scores [..., vocab_size] after bias and penalties; `logits` itself where none apply."""
    width = logits.shape[-1]
    if params.logit_bias or params.has_penalties:
        logits = logits.clone()
    bias = {i: value for i, value in dict(params.logit_bias).items() if 0 <= i < width}
    if bias:
        biased = torch.tensor(list(bias), device=logits.device)
        logits[..., biased] += torch.tensor(list(bias.values()), device=logits.device)
    if params.has_penalties:
        penalties = penalties_at(params, prompt_token_ids, output_token_ids, width)
        index = torch.from_numpy(penalties.repeated_token_ids).to(logits.device)
        repeated, factor = logits[..., index], params.repetition_penalty
        logits[..., index] = torch.where(repeated > 0, repeated / factor, repeated * factor)
        index = torch.from_numpy(penalties.output_token_ids).to(logits.device)
        logits[..., index] -= torch.from_numpy(penalties.deductions).to(logits.device)
    return logits


def _filtered(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """`sampling._filtered`: the ids, ascending, that min-p, top-k and top-p leave."""
    token_ids: torch.Tensor | None = None

    def keep(mask: torch.Tensor) -> None:
        nonlocal token_ids, scores
        index = mask.nonzero().view(-1)
        token_ids = index if token_ids is None else token_ids[index]
        scores = scores[index]

    if params.min_p > 0.0:
        keep(scores >= math.log(params.min_p))
    if 0 < params.top_k < len(scores):
        keep(scores >= scores.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        keep(_nucleus(scores.softmax(0), params.top_p))
    assert token_ids is not None
    return token_ids, scores


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the smallest set of most probable tokens that holds `top_p` (`sampling._nucleus`)."""
    candidates = probs[probs >= (1.0 - top_p) / len(probs) * (1.0 - 1e-6)]
    ordered = candidates.sort(descending=True).values
    held = ordered.cumsum(0, dtype=torch.float64)
    count = min(int(torch.count_nonzero(held < top_p)) + 1, len(ordered))
    border = ordered[count - 1]
    kept = probs >= border
    surplus = int(torch.count_nonzero(kept)) - count
    if surplus:  # ties at the border: the highest ids go
        kept[(probs == border).nonzero().view(-1)[-surplus:]] = False
    return kept
