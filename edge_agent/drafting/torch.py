"""The drafter for GPU and Jetson edges, and the reference in tests: transformers on torch."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from edge_agent.drafting.drafter import LogitsArray, ModelContext
from edge_agent.drafting.messages import ContextSpec, DrafterSpec
from picospec.errors import DrafterFailed
from picospec.protocol.messages import TokenArray


class TorchRuntime:
    """A KVRuntime: a DynamicCache, which grows as it is filled and so has all the room."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.capacity = capacity
        self._model = model
        self._cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def forward(self, token_ids: TokenArray) -> LogitsArray:
        input_ids = torch.from_numpy(token_ids).long().unsqueeze(0).to(self._model.device)
        output = self._model(
            input_ids=input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: LogitsArray = output.logits[0, -1].float().cpu().numpy()
        return logits

    def truncate(self, length: int) -> None:
        num_dropped = self._cache.get_seq_length() - length
        if num_dropped:
            self._cache.crop(-num_dropped)

    def close(self) -> None:
        del self._cache


class TorchDrafter:
    """A Hugging Face model folder, on the GPU when there is one."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Half precision is slower than single on most CPUs.
        dtype = "auto" if device == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
        self._model = model.to(device).eval()
        if getattr(model.config, "sliding_window", None):
            raise DrafterFailed("models with sliding-window attention cannot be rolled back")
        self.logits_width = int(model.config.vocab_size)
        self._context_length = int(model.config.max_position_embeddings)

    def open(self, spec: ContextSpec, num_committed: int = -1) -> ModelContext:
        return ModelContext(
            lambda _capacity: TorchRuntime(self._model, self._context_length),
            spec,
            num_committed,
            self.logits_width,
            self._context_length,
        )


def load(spec: DrafterSpec) -> TorchDrafter:
    folder = Path(spec.model)
    if not folder.is_dir():
        raise DrafterFailed(f"there is no model folder {spec.model!r}")
    return TorchDrafter(folder, spec.threads)
