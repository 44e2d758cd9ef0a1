"""How far apart two tokens' logits are where a greedy text leaves that of stock vLLM.

In fp32 that never happens. In bf16 a forward of several rows rounds otherwise than one of a single
row; so the gap is measured, by the same weights in fp32, and shown beside what bf16 can tell apart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.floor.results import Difference
from bench.systems import Task
from picospec_cli.pairs import TARGET, Pair

BF16_BITS = 7  # of the mantissa


class Gaps:
    """Differences to be measured once the engines have gone: the model needs their memory."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._noted: list[tuple[Difference, list[int]]] = []

    def note(
        self, difference: Difference, tasks: Sequence[Task], texts: Mapping[str, Sequence[int]]
    ) -> None:
        """`texts` are stock vLLM's, by prompt."""
        prompts = {task.prompt_id: task.prompt_token_ids.tolist() for task in tasks}
        if difference.prompt in prompts and self._pair.precision == "bf16":
            text = texts[difference.prompt][: difference.at]
            self._noted.append((difference, [*prompts[difference.prompt], *text]))

    def measure(self) -> None:
        """Fill in the gaps of what was noted."""
        if not self._noted:
            return
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            self._pair.home / TARGET, dtype=torch.float32
        )
        for difference, context in self._noted:
            with torch.inference_mode():
                logits = model(torch.tensor([context]), logits_to_keep=1).logits[0, -1]
            ours, reference = (
                float(logits[difference.token_id]),
                float(logits[difference.reference]),
            )
            difference.gap = abs(ours - reference)
            difference.rounding = 2.0 ** (math.floor(math.log2(float(logits.max()))) - BF16_BITS)
