"""The book-keeping of one text that is partly speculative.

What may change here: `append` adds a draft at the end, `rollback` takes tokens off the end and
never below what is committed, `commit` moves the border. Nothing else changes the text.
"""

from collections.abc import Sequence

import numpy as np

from picospec.protocol.messages import TokenArray


class SpeculativeTokens:
    """Token ids in two parts: committed, and a speculative tail that may be taken back.

    >>> tokens = SpeculativeTokens([5, 6, 7])
    >>> tokens.append(8); tokens.append(9)      # 5 6 7 | 8 9
    >>> kept = tokens.rollback(4, (3,))         # 5 6 7 8 3 |
    >>> len(tokens), tokens.num_committed
    (5, 5)
    """

    def __init__(self, token_ids: Sequence[int] | TokenArray, num_committed: int = -1) -> None:
        initial = np.asarray(token_ids, np.int32)
        self._length = len(initial)
        self._buffer = np.empty(max(256, 2 * self._length), np.int32)
        self._buffer[: self._length] = initial
        self.num_committed = self._length if num_committed < 0 else num_committed

    def __len__(self) -> int:
        return self._length

    @property
    def token_ids(self) -> TokenArray:
        """int32 [len]: a view, valid until the next change."""
        return self._buffer[: self._length]

    def append(self, token_id: int) -> None:
        if self._length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._length] = token_id
        self._length += 1

    def commit(self, length: int) -> None:
        """The first `length` tokens are final."""
        self.num_committed = max(self.num_committed, length)

    def rollback(self, length: int, token_ids: Sequence[int] = ()) -> int:
        """Truncate to `length` and append `token_ids`; all that is left is committed.

        Returns how many of the old tokens are still there: where the appended repeat what was
        taken back, nothing was. Raises ValueError outside num_committed .. len.

        >>> SpeculativeTokens([5, 6, 7, 8, 9], num_committed=2).rollback(3, (8, 1))
        4
        """
        if not self.num_committed <= length <= self._length:
            raise ValueError(
                f"cannot roll back to {length} tokens: {self.num_committed} of "
                f"{self._length} are committed"
            )
        end = length + len(token_ids)
        kept = length
        while kept < min(end, self._length) and self._buffer[kept] == token_ids[kept - length]:
            kept += 1
        self._length = kept
        for token_id in token_ids[kept - length :]:
            self.append(token_id)
        self.num_committed = end
        return kept


class SpeculativeKVCache(SpeculativeTokens):
    """A text and how much of it a runtime's KV cache holds.

    The cache may lag behind the text (drafts are appended without a forward; a prompt is
    prefilled in chunks) and never holds a token that the text does not have there:

    >>> cache = SpeculativeKVCache([5, 6, 7])   # text 5 6 7       KV -
    >>> cache.computed(3)                       # text 5 6 7       KV 5 6 7
    >>> cache.append(8); cache.append(9)        # text 5 6 7 | 8 9 KV 5 6 7
    >>> cache.uncomputed
    array([8, 9], dtype=int32)
    >>> cache.computed(2)                       # text 5 6 7 | 8 9 KV 5 6 7 8 9
    >>> cache.rollback(4, (3,))                 # text 5 6 7 8 3 | KV 5 6 7 8
    4
    >>> cache.num_computed, cache.uncomputed
    (4, array([3], dtype=int32))
    """

    def __init__(self, token_ids: Sequence[int] | TokenArray, num_committed: int = -1) -> None:
        super().__init__(token_ids, num_committed)
        self.num_computed = 0

    @property
    def uncomputed(self) -> TokenArray:
        """int32 [len - num_computed]: a view of what has to be forwarded, in order."""
        return self._buffer[self.num_computed : self._length]

    def computed(self, num_tokens: int) -> None:
        """The runtime has forwarded the next `num_tokens` of `uncomputed`."""
        self.num_computed += num_tokens

    def rollback(self, length: int, token_ids: Sequence[int] = ()) -> int:
        kept = super().rollback(length, token_ids)
        self.num_computed = min(self.num_computed, kept)
        return kept
