"""A drafter that knows the answer: it replays the target's own text, with a given rate of errors at
a given pace. It waits by the loop's timers and computes next to nothing, so a core has room for
many.
"""

from collections.abc import Sequence

import numpy as np

from edge_agent.drafting.scripted import ScriptedDrafting
from picospec.protocol.messages import TokenArray


class ReplayDrafting(ScriptedDrafting):
    """A `context.Drafting` of one text at a time, drafted at `token_s` seconds per token."""

    def __init__(self, *, alpha: float, token_s: float) -> None:
        super().__init__(self._propose, token_s=token_s)
        self.alive = True
        self._alpha = alpha
        self._prompt_length = 0
        self._drafts: list[int] = []

    def learn(self, prompt_length: int, text: Sequence[int], *, seed: int) -> None:
        """From now on `text` follows a prompt of `prompt_length` tokens."""
        self._prompt_length = prompt_length
        self._drafts = with_errors(text, alpha=self._alpha, seed=seed)

    def _propose(self, so_far: TokenArray) -> int | None:
        index = len(so_far) - self._prompt_length
        return self._drafts[index] if 0 <= index < len(self._drafts) else None


def with_errors(text: Sequence[int], *, alpha: float, seed: int) -> list[int]:
    """`text` with a share of 1 - alpha of its tokens wrong, at positions drawn from `seed`: the
    right one is not found by asking again, only by going on from the target's token.

    >>> with_errors([10, 12], alpha=0.0, seed=1)
    [11, 13]
    """
    order = np.random.default_rng(seed).permutation(len(text))
    is_wrong = order < round((1.0 - alpha) * len(text))  # [num_tokens]
    # Logits' widths are even, so the neighbour is a token, too.
    return [token ^ 1 if wrong else token for token, wrong in zip(text, is_wrong, strict=True)]
