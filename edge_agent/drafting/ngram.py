"""Prompt lookup: proposes what followed the last few tokens when they occurred before.

No model and no forward: a floor for boxes too small for any language model, and a fast
drafter for tests. Source: prompt lookup decoding, as in vLLM's v1/spec_decode/ngram_proposer.
"""

import numpy as np

from edge_agent.drafting.kv_cache import SpeculativeTokens
from edge_agent.drafting.messages import ContextSpec, DrafterSpec
from picospec.protocol.messages import TokenArray
from picospec.sampling.distribution import Distribution

# A single equal token says next to nothing; verifying a bad draft costs the cloud more.
MATCH_MIN, MATCH_MAX = 2, 4  # tokens


def lookup(token_ids: TokenArray) -> int | None:
    """The token after the most recent of the longest earlier matches of the text's end.

    >>> lookup(np.array([7, 8, 9, 4, 8, 9, 5, 7, 8, 9], np.int32))   # 7 8 9 beats 8 9
    4
    """
    if len(token_ids) <= MATCH_MIN:
        return None
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1])  # [num_matches] of a match's last token
    for length in range(2, MATCH_MAX + 1):
        if length >= len(token_ids):
            break
        longer = ends[ends >= length - 1]
        longer = longer[token_ids[longer - (length - 1)] == token_ids[-length]]
        if not len(longer):
            if length <= MATCH_MIN:
                return None
            break
        ends = longer
    return int(token_ids[ends[-1] + 1])


class NgramContext(SpeculativeTokens):
    """A DrafterContext whose law is certain of the token it looked up."""

    def prefill(self) -> bool:
        return False

    def propose(self) -> Distribution | None:
        token_id = lookup(self.token_ids)
        return None if token_id is None else certain(token_id)

    def confidence(self) -> float:
        return 1.0

    def close(self) -> None: ...


class NgramDrafter:
    """Opens contexts that look up their own text."""

    logits_width = 0

    def open(self, spec: ContextSpec, num_committed: int = -1) -> NgramContext:
        return NgramContext(spec.token_ids, num_committed)


def certain(token_id: int) -> Distribution:
    """The law that has all its mass on `token_id`."""
    return Distribution(np.array([token_id], np.int32), np.ones(1, np.float32))


def load(_spec: DrafterSpec) -> NgramDrafter:
    return NgramDrafter()
