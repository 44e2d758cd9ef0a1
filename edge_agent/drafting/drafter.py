"""The seam to the drafting runtimes: what a drafter is, and which there are.

A `Drafter` is loaded once and opens a `DrafterContext` for each text. What a context proposes
for the next position is a law (a processed distribution), None where it has nothing to
propose; drawing from it is the worker's business. Runtimes with a language model only supply
a `KVRuntime` (store.py) and are wrapped by `ModelContext`; scripted.py is the double for tests.

A context is lazy: `append` and `rollback` only record, `propose` computes what is missing. So
the last draft of a window costs no forward until its successor is wanted.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edge_agent.drafting.kv_cache import SpeculativeKVCache
from edge_agent.drafting.messages import ContextSpec, DrafterSpec
from edge_agent.drafting.store import ContextStore, KVRuntime
from picospec.errors import DrafterFailed
from picospec.protocol.messages import VerificationMode
from picospec.sampling.distribution import Distribution, process

LogitsArray = NDArray[np.float32]  # [logits_width]

# Modules are imported when chosen: a worker loads no runtime it does not use.
BACKENDS = {
    "onnx": "edge_agent.drafting.onnx",
    "torch": "edge_agent.drafting.torch",
    "ngram": "edge_agent.drafting.ngram",
    "scripted": "edge_agent.drafting.scripted",
}

# Tokens prefilled between two looks at other contexts and at commands.
PREFILL_CHUNK = 32
# Committed tokens that a proposal may forward along with its last one.
CATCH_UP_MAX = 8


class DrafterContext(Protocol):
    """One text's state in a drafter."""

    def __len__(self) -> int:
        """Tokens in the text, drafts included: the position `propose` speaks of."""

    def prefill(self) -> bool:
        """Compute one chunk, if `propose` needs more than that. True: call again first."""

    def propose(self) -> Distribution | None:
        """The law of the next token; None when there is nothing to propose.

        A function of the text alone. Raises whatever the runtime raises.
        """

    def confidence(self) -> float:
        """The probability of what the last `propose` found most likely, before temperature."""

    def append(self, token_id: int) -> None:
        """Add a draft to the text."""

    def rollback(self, length: int, token_ids: Sequence[int] = ()) -> int:
        """See SpeculativeTokens.rollback."""

    def close(self) -> None:
        """Free what the runtime holds. Nothing else may be called after it."""


class Drafter(Protocol):
    """A loaded drafter. `logits_width` 0: it proposes ids it has seen, of any width."""

    logits_width: int

    def open(self, spec: ContextSpec, num_committed: int = -1) -> DrafterContext:
        """A context that holds spec.token_ids, of which the first `num_committed` are final."""


class ModelContext:
    """A DrafterContext over a language model, whose KV cache comes from a store and goes back.

    Runtimes round a batch of tokens differently from the same tokens one by one (int4: logits
    differ by 0.5). In split mode a seed shall give the same drafts whenever which news arrived, so
    there tokens behind the prompt are forwarded one by one; in coupled mode, where drafts change no
    text, the cloud's tokens are caught up with in one forward.
    """

    def __init__(
        self,
        store: ContextStore,
        spec: ContextSpec,
        num_committed: int,
        *,
        logits_width: int,
        context_length: int,
    ) -> None:
        self._store = store
        self._spec = spec
        self.cache = SpeculativeKVCache(spec.token_ids, num_committed)
        self._logits_width = logits_width  # the model's own
        self._max_length = min(context_length, spec.max_length or context_length)
        self._runtime: KVRuntime | None = None
        self._runtime_length = 0
        self._prefill_length = len(self.cache) - 1  # tokens before it are forwarded in batches
        self._batches = spec.mode is VerificationMode.COUPLED
        self._logits: LogitsArray = np.zeros(1, np.float32)  # that the last proposal came from

    def __len__(self) -> int:
        return len(self.cache)

    def confidence(self) -> float:
        return float(1.0 / np.exp(self._logits - self._logits.max()).sum())

    def append(self, token_id: int) -> None:
        self.cache.append(token_id)

    def rollback(self, length: int, token_ids: Sequence[int] = ()) -> int:
        return self.cache.rollback(length, token_ids)

    def close(self) -> None:
        """What is committed and computed is kept for the next turn."""
        if self._runtime is not None:
            length = min(self.cache.num_committed, self.cache.num_computed)
            self._runtime.truncate(length)
            self._store.give_back(self._runtime, self.cache.token_ids[:length])
            self._runtime = None

    def prefill(self) -> bool:
        if len(self) > self._max_length:
            return False
        runtime = self._open_runtime()
        missing = len(self.cache.uncomputed)
        if missing <= self._in_one_go():
            return False
        self._forward(runtime, min(missing - 1, self._together()))
        self._store.shrink()
        return True

    def _in_one_go(self) -> int:
        """How many tokens a proposal may forward."""
        return CATCH_UP_MAX if self._batches else 1

    def _together(self) -> int:
        """How many tokens a turn of prefill forwards."""
        if self._batches:
            return PREFILL_CHUNK
        return min(PREFILL_CHUNK, max(1, self._prefill_length - self.cache.num_computed))

    def propose(self) -> Distribution | None:
        if len(self) > self._max_length:
            return None
        while self.prefill():
            pass
        if not len(self.cache.uncomputed):
            # Everything is computed but the logits are gone: the last token runs again.
            self.cache.num_computed -= 1
        raw = self._forward(self._open_runtime(), len(self.cache.uncomputed))
        logits = fit(raw, self._spec.logits_width)
        self._logits = logits
        token_ids, prompt_length = self.cache.token_ids, self._spec.prompt_length
        return process(
            logits, self._spec.sampling, token_ids[:prompt_length], token_ids[prompt_length:]
        )

    def _open_runtime(self) -> KVRuntime:
        if self._runtime is None:
            committed = self.cache.token_ids[: self.cache.num_committed]
            # The last token's logits are wanted: it is computed anew.
            self._runtime, known = self._store.borrow(committed)
            self.cache.num_computed = self._runtime_length = min(known, len(committed) - 1)
            self._runtime.truncate(self._runtime_length)
        return self._runtime

    def _forward(self, runtime: KVRuntime, num_tokens: int) -> LogitsArray:
        cache = self.cache
        if self._runtime_length != cache.num_computed:
            runtime.truncate(cache.num_computed)
        # An id of the target's padding would be outside the embedding; any token will do for it.
        token_ids = np.minimum(cache.uncomputed[:num_tokens], self._logits_width - 1)
        logits = runtime.forward(token_ids)
        cache.computed(len(token_ids))
        self._runtime_length = cache.num_computed
        return logits


class ModelDrafter:
    """A drafter over a language model that is loaded: `open_runtime` gives an empty KV cache."""

    def __init__(
        self,
        open_runtime: Callable[[], KVRuntime],
        *,
        logits_width: int,
        context_length: int,
        cache_bytes: int = 0,
    ) -> None:
        """`cache_bytes` bounds the KV caches; 0: a share of the machine's memory."""
        self.logits_width = logits_width
        self._context_length = context_length
        self.store = ContextStore(open_runtime, cache_bytes)

    def open(self, spec: ContextSpec, num_committed: int = -1) -> ModelContext:
        return ModelContext(
            self.store,
            spec,
            num_committed,
            logits_width=self.logits_width,
            context_length=self._context_length,
        )


def fit(logits: LogitsArray, width: int) -> LogitsArray:
    """Cut or pad (with -inf) logits to `width`, so that both models speak of the same ids.

    >>> fit(np.zeros(2, np.float32), 3)
    array([  0.,   0., -inf], dtype=float32)
    """
    if width in (0, len(logits)):
        return logits
    if width < len(logits):
        return logits[:width]
    padding = np.full(width - len(logits), -np.inf, np.float32)
    return np.concatenate([logits, padding])


def load(spec: DrafterSpec) -> Drafter:
    """Load the drafter that `spec` names. Raises DrafterFailed with what went wrong."""
    if spec.backend not in BACKENDS:
        raise DrafterFailed(f"unknown drafter backend {spec.backend!r}: one of {[*BACKENDS]}")
    try:
        return cast(Drafter, importlib.import_module(BACKENDS[spec.backend]).load(spec))
    except DrafterFailed:
        raise
    except ImportError as error:
        raise DrafterFailed(
            f"the {spec.backend} drafter needs a package that is not installed: {error}"
        ) from error
    except Exception as error:  # whatever a runtime raises over a model it cannot read
        raise DrafterFailed(
            f"cannot load {spec.backend} drafter {spec.model!r}: {error}"
        ) from error
