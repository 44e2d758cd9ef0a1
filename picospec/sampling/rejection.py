"""The arithmetic of split verification (docs/protocol.md): what stays, and what a rejection leaves.

P is the target's processed distribution at a position, Q the drafter's, u uniform in [0, 1).
"""

import numpy as np
from numpy.typing import NDArray


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
