"""The default drafter on CPU edges: onnxruntime-genai.

Measured facts of 0.18 that this file leans on (tests/integration/test_drafters.py pins them):
`append_tokens` runs the forward; `get_logits` returns a float32 [1, 1, V] copy; `rewind_to`
takes microseconds and any length, 0 included; the KV cache is reserved, and zeroed, for
`max_length` tokens when a Generator is made. `get_logits` straight after `rewind_to` runs the
last token a second time and leaves it in the cache twice, so it is only ever called after
`append_tokens`. A token id outside the vocabulary raises RuntimeError.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

from edge_agent.drafting.drafter import LogitsArray, ModelContext
from edge_agent.drafting.messages import ContextSpec, DrafterSpec
from picospec.errors import DrafterFailed
from picospec.protocol.messages import TokenArray

CONFIG_FILE = "genai_config.json"


class OnnxRuntime:
    """A KVRuntime: one Generator, used for its cache and logits only."""

    def __init__(self, model: genai.Model, capacity: int) -> None:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=capacity)
        self.capacity = capacity
        self._generator: genai.Generator | None = genai.Generator(model, params)

    def forward(self, token_ids: TokenArray) -> LogitsArray:
        assert self._generator is not None
        self._generator.append_tokens(token_ids)
        logits: LogitsArray = self._generator.get_logits()[0, -1]
        return logits

    def truncate(self, length: int) -> None:
        assert self._generator is not None
        self._generator.rewind_to(length)

    def close(self) -> None:
        self._generator = None


class OnnxDrafter:
    """A model folder made by onnxruntime-genai's builder."""

    def __init__(self, folder: Path, threads: int) -> None:
        description = json.loads((folder / CONFIG_FILE).read_text())["model"]
        self._context_length = int(description["context_length"])
        config = genai.Config(str(folder))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = genai.Model(config)
        # Fails here, not in the first chat, when file and description disagree.
        logits = OnnxRuntime(self._model, capacity=1).forward(np.zeros(1, np.int32))
        self.logits_width = len(logits)

    def open(self, spec: ContextSpec, num_committed: int = -1) -> ModelContext:
        return ModelContext(
            partial(OnnxRuntime, self._model),
            spec,
            num_committed,
            self.logits_width,
            self._context_length,
        )


def load(spec: DrafterSpec) -> OnnxDrafter:
    folder = Path(spec.model)
    if not (folder / CONFIG_FILE).is_file():
        raise DrafterFailed(
            f"{spec.model!r} holds no {CONFIG_FILE}: make a draft model with `picospec prepare`"
        )
    return OnnxDrafter(folder, spec.threads)
