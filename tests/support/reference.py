"""What the target should say, computed without vLLM: transformers' logits, the core's laws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from picospec.protocol.messages import SamplingParams
from picospec.sampling.distribution import Distribution, draw, process
from picospec.sampling.noise import Purpose


class Reference:
    """A model folder's next-token laws, exact to float32."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.logits = lru_cache(maxsize=100_000)(self._logits)

    def _logits(self, context: tuple[int, ...]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([context])).logits[0, -1]
        result: NDArray[np.float32] = logits.float().numpy()
        return result

    def law(
        self, prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams
    ) -> Distribution:
        """The processed distribution after `prompt + output`."""
        return process(
            self.logits((*prompt, *output)).copy(),
            sampling,
            np.asarray(prompt, np.int32),
            np.asarray(output, np.int32),
        )

    def probs(
        self, prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams
    ) -> NDArray[np.float64]:
        """The same, dense: float64 [vocab_size]."""
        law = self.law(prompt, output, sampling)
        dense: NDArray[np.float64] = np.zeros(len(self.logits((*prompt, *output))))
        ids = np.arange(len(dense)) if law.token_ids is None else law.token_ids
        dense[ids] = law.probs
        dense /= dense.sum()
        return dense

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        stop_token_ids: Sequence[int] = (),
    ) -> list[int]:
        """The one text of a coupled (or greedy) generation."""
        output: list[int] = []
        while len(output) < max_tokens:
            law = self.law(prompt, output, sampling)
            position = len(prompt) + len(output)
            output.append(draw(law, sampling.seed, position, Purpose.COUPLED))
            if output[-1] in stop_token_ids:
                break
        return output
