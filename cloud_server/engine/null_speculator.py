"""The speculator without drafts: they come over the wire.

vLLM prepares its model runner for drafts (several logits rows per request, rollback) only if a
speculative method is configured. The method `custom_class` with this class is that switch.
"""

from typing import Any


class NullSpeculator:
    """A custom_class proposer (vllm/v1/spec_decode/custom_class_proposer.py)."""

    def __init__(self, vllm_config: Any) -> None:
        del vllm_config

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no model."""

    def propose(
        self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        """No drafts for any of the requests."""
        return [[] for _ in sampled_token_ids]
