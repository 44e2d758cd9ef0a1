"""What an edge wants of one generation, and how it opens a stream for it. Pure data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from picospec import PROTOCOL_VERSION
from picospec.protocol.edge_machine import SpeculationPolicy
from picospec.protocol.messages import (
    ModelCard,
    Open,
    SamplingParams,
    TokenArray,
    VerificationMode,
)


@dataclass(frozen=True, slots=True, eq=False)
class SessionSpec:
    """All that an `EdgeSession` is made from."""

    session_id: str
    prompt_token_ids: TokenArray  # [num_prompt_tokens]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    card: ModelCard
    policy: SpeculationPolicy

    @property
    def is_split(self) -> bool:
        return self.policy.mode is VerificationMode.SPLIT

    @property
    def length_max(self) -> int:
        """Most tokens of prompt and output."""
        return min(len(self.prompt_token_ids) + self.max_tokens, self.card.max_model_len)

    def open(self, output: Sequence[int], *, probe: int) -> Open:
        """The first frame of a stream; `output` is committed, `probe` as in Draft.probe."""
        policy, card = self.policy, self.card
        sparse_k = min(policy.sparse_k, card.limits.max_sparse_k)
        return Open(
            session_id=self.session_id,
            prompt_token_ids=self.prompt_token_ids,
            output_token_ids=np.array(output, np.int32),
            sampling=self.sampling,
            mode=policy.mode,
            max_tokens=self.max_tokens,
            stop_token_ids=tuple(sorted(set(self.stop_token_ids))),
            exact=policy.exact,
            sparse_k=sparse_k if policy.split_rejection else 0,
            assist=policy.assist,
            verify_whole_rounds=not policy.fast_verify,
            probe=probe,
            protocol_version=min(PROTOCOL_VERSION, card.protocol_version),
        )
