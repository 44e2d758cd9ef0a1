"""What both daemons must compute alike: the processed distribution of a position.

The processed distribution is the law a token is drawn from, after (in this order, as vLLM's
v1/sample/sampler.py applies them) logit bias, repetition, frequency and presence penalties,
temperature, min-p, top-k and top-p. The edge computes it of the drafter's logits (Q), the
cloud of the target's (P; cloud_server/engine/judging/torch_sampling.py has the rules for GPUs).
Where tokens tie at a filter's border: min-p and top-k keep all of them, top-p the lowest ids.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from picospec.errors import NumericalError
from picospec.protocol.messages import ProbArray, SamplingParams, TokenArray
from picospec.sampling.noise import Purpose, race

GREEDY_TEMPERATURE = 1e-5  # below it sampling is greedy, as in vLLM


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """A law over token ids. `probs` sums to 1 to rounding; ids not listed have none.

    `token_ids` is ascending, or None where `probs` is dense (index = id).
    """

    token_ids: TokenArray | None  # [n]
    probs: ProbArray  # [n]

    def prob(self, token_id: int) -> float:
        """The probability of one id; 0 for ids that are not in it, whatever their value."""
        if self.token_ids is None:
            return float(self.probs[token_id]) if 0 <= token_id < len(self.probs) else 0.0
        return float(self.probs_of([token_id])[0])

    def probs_of(self, token_ids: ArrayLike) -> ProbArray:
        """The probabilities of many ids, float32 of their shape."""
        wanted = np.asarray(token_ids, np.int64)
        if self.token_ids is None:
            found = (wanted >= 0) & (wanted < len(self.probs))
            index = np.where(found, wanted, 0)
        else:
            index = np.searchsorted(self.token_ids, wanted).clip(max=len(self.token_ids) - 1)
            found = self.token_ids[index] == wanted
        return np.where(found, self.probs[index], np.float32(0.0))


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """The penalties of one position, gathered by token id (OpenAI's formulas and vLLM's)."""

    repeated_token_ids: NDArray[np.int64]  # in prompt or output: logit / r or * r by its sign
    output_token_ids: NDArray[np.int64]  # in the output: logit - deduction
    deductions: ProbArray  # frequency * count + presence, for each of output_token_ids


def penalties_at(
    params: SamplingParams,
    prompt_token_ids: NDArray[np.integer],
    output_token_ids: NDArray[np.integer],
    width: int,
) -> Penalties:
    """Which logits are penalised, of `width`, after this prompt and output. Ids are unique."""
    prompt = np.asarray(prompt_token_ids, np.int64)
    output = np.asarray(output_token_ids, np.int64)
    output = output[(output >= 0) & (output < width)]
    unique, counts = np.unique(output, return_counts=True)
    deductions = params.frequency_penalty * counts + params.presence_penalty
    repeated = unique[:0]
    if params.repetition_penalty != 1.0:
        prompt = prompt[(prompt >= 0) & (prompt < width)]
        repeated = np.unique(np.concatenate([prompt, unique]))
    return Penalties(repeated, unique, deductions.astype(np.float32))


def process(
    logits: NDArray[np.floating],
    params: SamplingParams,
    prompt_token_ids: NDArray[np.integer],
    output_token_ids: NDArray[np.integer],
) -> Distribution:
    """The processed distribution at one position.

    `logits` is [vocab_size] and stays as it is; -inf excludes a token. `output_token_ids` are
    all tokens between the prompt and the position, drafts included; like the prompt they are
    only looked at when there are penalties. Only survivors are listed when a filter is on;
    greedy is the one-hot law of the lowest best id. Raises NumericalError on NaN or +inf, or
    when no token is possible.
    """
    scores = _penalised(logits, params, prompt_token_ids, output_token_ids)
    best = int(scores.argmax())  # a NaN, if there is one
    peak = scores[best]
    if not math.isfinite(peak):
        raise NumericalError(
            "the model's logits do not define a probability distribution: NaN, +inf or only -inf"
        )
    if params.temperature < GREEDY_TEMPERATURE:
        return Distribution(np.array([best], np.int32), np.ones(1, np.float32))
    scores = scores - peak
    if params.temperature != 1.0:
        scores /= np.float32(params.temperature)
    token_ids = None
    if params.min_p > 0.0 or 0 < params.top_k < len(scores) or params.top_p < 1.0:
        token_ids, scores = _filtered(scores, params)
    probs = np.exp(scores, out=scores)
    probs *= np.float32(1.0) / probs.sum()
    return Distribution(token_ids, probs)


def _penalised(
    logits: NDArray[np.floating],
    params: SamplingParams,
    prompt_token_ids: NDArray[np.integer],
    output_token_ids: NDArray[np.integer],
) -> ProbArray:
    """Float32 scores after bias and penalties; `logits` itself where nothing applies."""
    if not params.logit_bias and not params.has_penalties:
        return np.asarray(logits, np.float32)
    scores = np.array(logits, np.float32)
    for token_id, bias in dict(params.logit_bias).items():
        if 0 <= token_id < len(scores):
            scores[token_id] += np.float32(bias)
    if params.has_penalties:
        penalties = penalties_at(params, prompt_token_ids, output_token_ids, len(scores))
        factor = np.float32(params.repetition_penalty)
        repeated = scores[penalties.repeated_token_ids]
        scores[penalties.repeated_token_ids] = np.where(
            repeated > 0, repeated / factor, repeated * factor
        )
        scores[penalties.output_token_ids] -= penalties.deductions
    return scores


def _filtered(scores: ProbArray, params: SamplingParams) -> tuple[TokenArray, ProbArray]:
    """The ids, ascending, that min-p, top-k and top-p leave, and their scores.

    `scores` are log probabilities up to a constant, the highest is 0.
    """
    kept: NDArray[np.int64] | None = None

    def keep(index: NDArray[np.int64]) -> None:
        nonlocal kept, scores
        kept = index if kept is None else kept[index]
        scores = scores[index]

    if params.min_p > 0.0:
        keep(np.flatnonzero(scores >= np.float32(math.log(params.min_p))))
    if 0 < params.top_k < len(scores):
        rank = len(scores) - params.top_k
        keep(np.flatnonzero(scores >= np.partition(scores, rank)[rank]))
    if params.top_p < 1.0:
        probs = np.exp(scores)
        probs *= np.float32(1.0) / probs.sum()
        keep(_nucleus(probs, params.top_p))
    assert kept is not None
    return kept.astype(np.int32), scores


def _nucleus(probs: ProbArray, top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the smallest set of most probable tokens that holds `top_p`.

    A token stays while those before it hold less than top_p, so at least one does. Of n
    tokens, those below (1 - top_p) / n hold less than 1 - top_p together, so they all go;
    only the others are sorted.

    >>> _nucleus(np.array([0.1, 0.4, 0.3, 0.2], np.float32), 0.6)
    array([1, 2])
    """
    candidates = np.flatnonzero(probs >= (1.0 - top_p) / len(probs) * (1.0 - 1e-6))
    candidate_probs = probs[candidates]
    ordered = -np.sort(-candidate_probs)
    held = np.cumsum(ordered, dtype=np.float64)
    count = min(int(np.searchsorted(held, top_p)) + 1, len(ordered))
    border = ordered[count - 1]
    surplus = np.count_nonzero(candidate_probs >= border) - count
    kept = candidate_probs >= border
    if surplus:  # ties at the border: the highest ids go
        kept[np.flatnonzero(candidate_probs == border)[-surplus:]] = False
    nucleus: NDArray[np.int64] = candidates[kept]
    return nucleus


def draw(
    distribution: Distribution, seed: int, position: int, purpose: Purpose, attempt: int = 0
) -> int:
    """A token id drawn from `distribution` with the noise of (seed, position, purpose, attempt)."""
    index = race(distribution.probs, distribution.token_ids, seed, position, purpose, attempt)
    return index if distribution.token_ids is None else int(distribution.token_ids[index])
