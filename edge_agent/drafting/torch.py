"""The drafter for GPU and Jetson edges, and the reference in tests: transformers on torch."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from edge_agent.drafting.drafter import LogitsArray, ModelDrafter
from edge_agent.drafting.messages import DrafterSpec
from picospec.errors import DrafterFailed
from picospec.protocol.messages import TokenArray


class TorchRuntime:
    """A KVRuntime: a DynamicCache, which grows as it is filled."""

    def __init__(self, model: Any) -> None:
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

    def fork(self, length: int) -> "TorchRuntime":
        other = TorchRuntime(self._model)
        other._cache = copy.deepcopy(self._cache)
        other.truncate(length)
        return other

    @property
    def num_bytes(self) -> int:
        layers: Any = self._cache.layers
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def close(self) -> None:
        del self._cache


def load(spec: DrafterSpec) -> ModelDrafter:
    """A Hugging Face model folder, on the GPU when there is one."""
    folder = Path(spec.model)
    if not folder.is_dir():
        raise DrafterFailed(f"there is no model folder {spec.model!r}")
    torch.set_num_threads(spec.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Half precision is slower than single on most CPUs.
    dtype = "auto" if device == "cuda" else torch.float32
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model = loaded.to(device).eval()
    if getattr(model.config, "sliding_window", None):
        raise DrafterFailed("models with sliding-window attention cannot be rolled back")
    return ModelDrafter(
        partial(TorchRuntime, model),
        logits_width=int(model.config.vocab_size),
        context_length=int(model.config.max_position_embeddings),
        cache_bytes=spec.cache_bytes,
    )
