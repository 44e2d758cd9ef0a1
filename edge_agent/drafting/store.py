"""KV caches of closed contexts, to be found again: the next turn of a chat begins with them.

Bounded in bytes. What was not used for longest goes first; what is in use counts, too.
"""

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from picospec.protocol.messages import TokenArray

MEMORY_SHARE = 8  # by default a cache takes at most this part of the machine's memory
USEFUL_TOKENS = 16  # a shorter common prefix is sooner computed than looked after


class KVRuntime(Protocol):
    """A runtime's KV cache of one text."""

    def forward(self, token_ids: TokenArray) -> NDArray[np.float32]:
        """Add token_ids (int32 [n], n >= 1) to the cache; the logits that follow the last."""

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens. Cheap; any length from 0 on."""

    def fork(self, length: int) -> "KVRuntime":
        """Another cache with the first `length` tokens, copied."""

    @property
    def num_bytes(self) -> int:
        """What it holds of the machine's memory."""

    def close(self) -> None: ...


class ContextStore:
    """Lends KV caches and takes them back.

    >>> store = ContextStore(open_runtime=FakeRuntime, bytes_max=1 << 20)
    >>> runtime, known = store.borrow(np.arange(40, dtype=np.int32))
    >>> known
    0
    >>> logits = runtime.forward(np.arange(32, dtype=np.int32))
    >>> store.give_back(runtime, np.arange(32, dtype=np.int32))
    >>> store.borrow(np.arange(100, dtype=np.int32))[1]  # the next turn of the same chat
    32
    """

    def __init__(self, open_runtime: Callable[[], KVRuntime], bytes_max: int = 0) -> None:
        """`bytes_max` 0: a share of the machine's memory."""
        self._open_runtime = open_runtime
        self._bytes_max = bytes_max or physical_memory() // MEMORY_SHARE
        self._lent: list[KVRuntime] = []
        self._kept: list[tuple[TokenArray, KVRuntime]] = []  # the least recently used first

    @property
    def num_bytes(self) -> int:
        kept = sum(runtime.num_bytes for _, runtime in self._kept)
        return kept + sum(runtime.num_bytes for runtime in self._lent)

    def borrow(self, token_ids: TokenArray) -> tuple[KVRuntime, int]:
        """A KV cache for a text, and how many of its first tokens it holds."""
        known, best = USEFUL_TOKENS - 1, -1
        for index, (held, _) in enumerate(self._kept):
            length = common_prefix(held, token_ids)
            if length > known:
                known, best = length, index
        if best < 0:
            runtime, known = self._open_runtime(), 0
        elif len(self._kept[best][0]) > 2 * known:  # another chat's, which begins alike
            runtime = self._kept[best][1].fork(known)
        else:
            _, runtime = self._kept.pop(best)
            runtime.truncate(known)
        self._lent.append(runtime)
        self.shrink()
        return runtime, known

    def give_back(self, runtime: KVRuntime, token_ids: TokenArray) -> None:
        """Take back a cache that holds `token_ids`."""
        self._lent.remove(runtime)
        if len(token_ids) < USEFUL_TOKENS:
            runtime.close()
            return
        self._kept.append((token_ids.copy(), runtime))
        self.shrink()

    def shrink(self) -> None:
        """Let go of what is beyond the bound, the least recently used first."""
        while self._kept and self.num_bytes > self._bytes_max:
            self._kept.pop(0)[1].close()


def common_prefix(one: TokenArray, other: TokenArray) -> int:
    """How many first tokens two texts share.

    >>> common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size


def physical_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
