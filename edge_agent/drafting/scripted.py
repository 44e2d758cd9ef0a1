"""The doubles of this folder's two seams, for tests.

`ScriptedDrafter` is a Drafter that proposes what a function says. `ScriptedDrafting` stands in for
`process.DraftingProcess`: the same contexts and the same worker code, but on the event loop,
without a process. `load` makes a ScriptedDrafter in a real worker process from a folder.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_agent.drafting.context import DraftContext, OnEvent
from edge_agent.drafting.drafter import LogitsArray
from edge_agent.drafting.kv_cache import SpeculativeTokens
from edge_agent.drafting.messages import CloseContext, Command, ContextSpec, DrafterSpec, DraftEvent
from edge_agent.drafting.ngram import certain
from edge_agent.drafting.worker import DraftWorker
from picospec.errors import CapacityError
from picospec.protocol.drafting import Drafted
from picospec.protocol.messages import TokenArray
from picospec.sampling.distribution import Distribution, process

# Of the text: a token to propose, logits to sample from, or None for nothing.
Script = Callable[[TokenArray], "int | LogitsArray | None"]

SCRIPT_FILE = "script.json"


class ScriptedContext(SpeculativeTokens):
    """A DrafterContext that asks the script."""

    def __init__(self, script: Script, spec: ContextSpec, num_committed: int) -> None:
        super().__init__(spec.token_ids, num_committed)
        self._script = script
        self._spec = spec
        self.closed = False

    def prefill(self) -> bool:
        return False

    def propose(self) -> Distribution | None:
        proposed = self._script(self.token_ids)
        if proposed is None:
            return None
        if isinstance(proposed, int):
            return certain(proposed)
        prompt_length = self._spec.prompt_length
        prompt, output = self.token_ids[:prompt_length], self.token_ids[prompt_length:]
        return process(proposed, self._spec.sampling, prompt, output)

    def confidence(self) -> float:
        proposed = self._script(self.token_ids)
        if proposed is None or isinstance(proposed, int):
            return 1.0
        return float(1.0 / np.exp(proposed - proposed.max()).sum())

    def close(self) -> None:
        self.closed = True


class ScriptedDrafter:
    """A Drafter that proposes what `script` says."""

    def __init__(self, script: Script, logits_width: int = 0) -> None:
        self.logits_width = logits_width
        self.contexts: list[ScriptedContext] = []  # all that were ever opened
        self._script = script

    def open(self, spec: ContextSpec, num_committed: int = -1) -> ScriptedContext:
        self.contexts.append(ScriptedContext(self._script, spec, num_committed))
        return self.contexts[-1]


def sequence(token_ids: list[int], start: int) -> Script:
    """Proposes token_ids[i] at position start + i, whatever the text; nothing after them."""

    def script(text: TokenArray) -> int | None:
        index = len(text) - start
        return token_ids[index] if 0 <= index < len(token_ids) else None

    return script


def pseudo_model(logits_width: int, seed: int = 0, scale: float = 2.0) -> Script:
    """A language model of sorts: random logits that depend on the last two tokens."""

    def script(text: TokenArray) -> LogitsArray:
        state = np.random.default_rng([seed, *(int(token_id) for token_id in text[-2:])])
        return (scale * state.standard_normal(logits_width)).astype(np.float32)

    return script


class ScriptedDrafting:
    """A DraftingProcess without a process: drafts a token at each turn of the event loop.

    With `token_s`, a token takes that long on the loop's clock. Never fails by itself.
    """

    def __init__(
        self, script: Script, logits_width: int = 0, max_contexts: int = 64, token_s: float = 0.0
    ) -> None:
        self.drafter = ScriptedDrafter(script, logits_width)
        self.logits_width = logits_width
        self.alive = False
        self.restarts = 0
        self.pid: int | None = None
        self.drafted_tokens = 0
        self.timed_tokens = 0
        self.drafting_s = 0.0
        self._worker = DraftWorker(self.drafter, self._emit)
        self.contexts: dict[int, DraftContext] = {}
        self._max_contexts = max_contexts
        self._token_s = token_s
        self._turn: asyncio.Handle | None = None
        self._opened = 0

    @property
    def trouble(self) -> str:
        return "" if self.alive else "not started"

    @property
    def open_contexts(self) -> int:
        return len(self.contexts)

    async def start(self) -> None:
        self.alive = True

    async def stop(self) -> None:
        self.alive = False
        if self._turn is not None:
            self._turn.cancel()

    def open(self, spec: ContextSpec, on_event: OnEvent, *, branch: int = 0) -> DraftContext:
        if self.open_contexts >= self._max_contexts:
            raise CapacityError("the drafter has no context free")
        self._opened += 1
        context = DraftContext(self._opened, spec, on_event, self._send, branch=branch)
        self.contexts[context.context_id] = context
        return context

    def _send(self, context_id: int, command: Command) -> None:
        if isinstance(command, CloseContext):
            self.contexts.pop(context_id, None)
        self._worker.handle(context_id, command)
        self._schedule()

    def _emit(self, context_id: int, event: DraftEvent) -> None:
        # Never from within a command, as with the real worker.
        asyncio.get_running_loop().call_soon(self._deliver, context_id, event)

    def _deliver(self, context_id: int, event: DraftEvent) -> None:
        if context_id in self.contexts:
            self.drafted_tokens += isinstance(event, Drafted)
            self.contexts[context_id].deliver(event)

    def _schedule(self) -> None:
        if self._turn is None and self._worker.runnable:
            self._turn = asyncio.get_running_loop().call_later(self._token_s, self._step)

    def _step(self) -> None:
        self._turn = None
        self.timed_tokens += self._token_s > 0.0
        self.drafting_s += self._token_s
        self._worker.step()
        self._schedule()


def load(spec: DrafterSpec) -> ScriptedDrafter:
    """A pseudo_model described by script.json: logits_width, seed, token_s (time per token).

    It fails as told: `load` "no memory" or "killed"; `nan_behind`, a text that begins with this.
    """
    description = json.loads((Path(spec.model) / SCRIPT_FILE).read_text())
    match description.get("load"):
        case "no memory":
            raise MemoryError("98304 bytes are too many")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    model = pseudo_model(description["logits_width"], description["seed"])

    def script(text: TokenArray) -> int | LogitsArray | None:
        time.sleep(description["token_s"])
        if text[0] == description.get("nan_behind"):
            return np.full(description["logits_width"], np.nan, np.float32)
        return model(text)

    return ScriptedDrafter(script, description["logits_width"])
