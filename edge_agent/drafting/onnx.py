"""The default drafter on CPU edges: a model made by onnxruntime-genai's builder, on onnxruntime.

The KV cache is memory of our own, bound as past and present at once, so the attention operator
appends in place (tests/integration/test_drafters.py compares the logits with onnxruntime-genai's,
bit for bit). It is room for the model's whole context, of which the system only backs what was
written: a context grows without being copied or computed again, and truncating it is a number.
"""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge_agent.drafting.drafter import LogitsArray, ModelDrafter
from edge_agent.drafting.messages import DrafterSpec
from picospec.errors import DrafterFailed
from picospec.protocol.messages import TokenArray

CONFIG_FILE = "genai_config.json"
_DEVICE = ("cpu", 0)
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class OnnxRuntime:
    """A KVRuntime over the session of an `OnnxModel`."""

    def __init__(self, model: "OnnxModel") -> None:
        self._model = model
        self.length = self.longest = 0
        size = int(np.prod(model.cache_shape)) * model.cache_type.itemsize
        self._memory = mmap.mmap(-1, size * len(model.cache_names))
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would back tokens never written
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._cache = np.frombuffer(self._memory, np.uint8).reshape(len(model.cache_names), size)
        self._binding = model.session.io_binding()
        for row, (past, present) in zip(self._cache, model.cache_names, strict=True):
            where = (*_DEVICE, model.cache_type, model.cache_shape, row.ctypes.data)
            self._binding.bind_input(past, *where)
            self._binding.bind_output(present, *where)

    def forward(self, token_ids: TokenArray) -> LogitsArray:
        model, total = self._model, self.length + len(token_ids)
        ids = token_ids.astype(np.int64)[np.newaxis]
        mask = np.ones((1, total), np.int64)
        logits = np.empty((1, len(token_ids), model.logits_width), model.logits_type)
        for name, array in (("input_ids", ids), ("attention_mask", mask)):
            self._binding.bind_input(name, *_DEVICE, np.int64, array.shape, array.ctypes.data)
        self._binding.bind_output(
            "logits", *_DEVICE, model.logits_type, logits.shape, logits.ctypes.data
        )
        model.session.run_with_iobinding(self._binding)
        self.length = total
        self.longest = max(self.longest, total)
        last: LogitsArray = logits[0, -1].astype(np.float32)
        return last

    def truncate(self, length: int) -> None:
        self.length = length

    def fork(self, length: int) -> "OnnxRuntime":
        other = OnnxRuntime(self._model)
        for ours, theirs in zip(self._layers(), other._layers(), strict=True):
            theirs[..., :length, :] = ours[..., :length, :]
        other.length = other.longest = length
        return other

    def _layers(self) -> Iterator[NDArray[np.generic]]:
        """Each [1, num_heads, context_length, head_size]."""
        model = self._model
        for row in self._cache:
            yield row.view(model.cache_type).reshape(model.cache_shape)

    @property
    def num_bytes(self) -> int:
        """Of memory that the system backs."""
        return self.longest * self._model.bytes_per_token

    def close(self) -> None:
        """The memory goes with its last reference."""
        del self._binding, self._cache, self._memory


class OnnxModel:
    """A model folder made by onnxruntime-genai's builder. Opens KV caches."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Raises DrafterFailed for a model of another make."""
        description = json.loads((folder / CONFIG_FILE).read_text())["model"]
        decoder = description["decoder"]
        self.context_length = int(description["context_length"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.session: Any = onnxruntime.InferenceSession(
            str(folder / decoder["filename"]), options, providers=["CPUExecutionProvider"]
        )
        inputs = {each.name: each for each in self.session.get_inputs()}
        outputs = {each.name: each for each in self.session.get_outputs()}
        pasts = [
            name.replace("%d", str(layer))
            for layer in range(int(decoder["num_hidden_layers"]))
            for name in (decoder["inputs"]["past_key_names"], decoder["inputs"]["past_value_names"])
        ]
        presents = [
            name.replace("%d", str(layer))
            for layer in range(int(decoder["num_hidden_layers"]))
            for name in (
                decoder["outputs"]["present_key_names"],
                decoder["outputs"]["present_value_names"],
            )
        ]
        known = {"input_ids", "attention_mask", *pasts}
        if inputs.keys() != known or not outputs.keys() >= {"logits", *presents}:
            raise DrafterFailed(
                f"{folder} is a model of an unknown make: its inputs are {', '.join(inputs)}"
            )
        self.cache_names = list(zip(pasts, presents, strict=True))
        self.cache_type = np.dtype(_TYPES[inputs[pasts[0]].type])
        self.logits_type = _TYPES[outputs["logits"].type]
        self.logits_width = int(outputs["logits"].shape[-1])
        heads, head_size = int(decoder["num_key_value_heads"]), int(decoder["head_size"])
        self.cache_shape = (1, heads, self.context_length, head_size)
        self.bytes_per_token = len(pasts) * heads * head_size * self.cache_type.itemsize

    def open(self) -> OnnxRuntime:
        return OnnxRuntime(self)


def load(spec: DrafterSpec) -> ModelDrafter:
    folder = Path(spec.model)
    if not (folder / CONFIG_FILE).is_file():
        raise DrafterFailed(
            f"{spec.model!r} holds no {CONFIG_FILE}: make a draft model with `picospec prepare`"
        )
    model = OnnxModel(folder, spec.threads)
    # Fails here, not in the first chat, when file and description disagree.
    model.open().forward(np.zeros(1, np.int32))
    return ModelDrafter(
        model.open,
        logits_width=model.logits_width,
        context_length=model.context_length,
        cache_bytes=spec.cache_bytes,
    )
