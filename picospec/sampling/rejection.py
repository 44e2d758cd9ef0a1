"""Split verification (docs/protocol.md): which drafts stay, and the token after a rejection.

P is the target's processed distribution at a position, Q the drafter's, u uniform in [0, 1). The
cloud accepts or rejects; the edge, which alone knows Q, draws the recovered token.

After a rejection the token at that position must follow max(0, P - Q), normalised. The cloud
sends P on a set S, its mass ε outside S, and draws y from P outside S, one for each attempt.
With h = max(0, P - Q) on S and A = Σ h:

    flip a coin; with probability A / (A + ε) emit v ~ h / A
    otherwise take the tail sample y, and emit it with probability max(0, 1 - Q(y) / P(y))
    otherwise start over with a fresh tail sample

One flip emits any v of S, and any y outside, with probability max(0, P - Q) / (A + ε), so the
law is exact for every S.

*The coin persists.* A flip that says "tail" when the tail sample is used up asks the cloud for
a fresh one, and that one is tested directly. To flip again would favour S: the flips that had
said tail would get a second chance to say S. So coin number n stands before tail sample
number n: coin 0 is flipped when sample 0 is offered, coin n when sample n - 1 was refused; a
sample number n > 0 is only ever offered because its coin said tail.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picospec.protocol.messages import Rejection
from picospec.sampling.distribution import Distribution
from picospec.sampling.noise import Purpose, race, uniform

# Only rounding (P = Q to the last bit) can need more: then the tail sample is taken as it is.
MAX_TAIL_ATTEMPTS = 1024


def accept(u: float, target_prob: float, draft_prob: float) -> bool:
    """Whether a draft drawn with `draft_prob` > 0 is accepted: u < P / q (arXiv:2211.17192)."""
    return u * draft_prob < target_prob


def residual(
    target_probs: NDArray[np.floating], draft_probs: NDArray[np.floating]
) -> NDArray[np.float64]:
    """max(0, P - Q), token by token: what a rejected draft leaves, not normalised."""
    return np.maximum(target_probs.astype(np.float64) - draft_probs, 0.0)


def accept_tail(u: float, target_prob: float, draft_prob: float) -> bool:
    """Whether a tail sample y ~ P stays: u < 1 - Q(y) / P(y). Never, where P(y) is 0."""
    return u * target_prob < target_prob - draft_prob


@dataclass(frozen=True, slots=True)
class RejectionSampler:
    """Draws the recovered token of one position. Stateless: all it does is a function of its
    arguments.

    `draft_law` is Q, the law the rejected draft was really drawn from; None if no draft was
    judged (Q = 0, the token follows P itself).
    """

    seed: int
    position: int
    draft_law: Distribution | None

    def offer(self, rejection: Rejection, attempt: int) -> int | None:
        """The recovered token, or None: a fresh tail sample is needed.

        `attempt` is the number of the tail sample in `rejection`, from 0. After None send a
        probe for sample attempt + 1 (Draft.probe = attempt + 2) and offer its answer.
        """
        probs = rejection.probs.astype(np.float64)
        kept = probs
        if self.draft_law is not None:
            kept = residual(probs, self.draft_law.probs_of(rejection.token_ids))
        tail_mass = rejection.tail_mass if rejection.tail_prob > 0.0 else 0.0
        if tail_mass <= 0.0:
            tail_mass = 0.0
            if not kept.any():  # P = Q to rounding: P itself is as good a law
                kept = probs
        if attempt == 0 and self._coin_says_kept(kept, tail_mass, 0):
            return self._draw_kept(rejection, kept, 0)
        if tail_mass > 0.0 and self._accepts_tail_sample(rejection, attempt):
            return rejection.tail_token_id
        if self._coin_says_kept(kept, tail_mass, attempt + 1):
            return self._draw_kept(rejection, kept, attempt + 1)
        return None

    def _coin_says_kept(self, kept: NDArray[np.float64], tail_mass: float, coin: int) -> bool:
        kept_mass = float(kept.sum())
        u = uniform(self.seed, self.position, Purpose.COIN, coin)
        return u * (kept_mass + tail_mass) < kept_mass

    def _draw_kept(self, rejection: Rejection, kept: NDArray[np.float64], coin: int) -> int:
        # Scaled by a power of two: however little is kept, float32 holds it without rounding.
        weights = np.ldexp(kept, -math.frexp(kept.sum())[1]).astype(np.float32)
        token_ids = rejection.token_ids
        index = race(weights, token_ids, self.seed, self.position, Purpose.RESIDUAL, coin)
        return int(token_ids[index])

    def _accepts_tail_sample(self, rejection: Rejection, attempt: int) -> bool:
        if attempt >= MAX_TAIL_ATTEMPTS:
            return True
        token_id = rejection.tail_token_id
        draft_prob = 0.0 if self.draft_law is None else self.draft_law.prob(token_id)
        u = uniform(self.seed, self.position, Purpose.TAIL_ACCEPT, attempt)
        return accept_tail(u, rejection.tail_prob, draft_prob)
