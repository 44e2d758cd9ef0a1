"""The account of epochs that both of the cloud's processes keep: what a frame adds to its epoch.

`CloudSession` keeps it over what has arrived, `DraftQueue` over what is not judged yet.
"""

from typing import Generic, TypeVar

from picospec.protocol.messages import Draft

T = TypeVar("T")


class Epoch(Generic[T]):
    """The newest epoch, and its entries, one per position from `base` on.

    >>> epoch = Epoch[int]()
    >>> first = Draft(epoch=0, base_position=5, token_ids=(7, 8))
    >>> epoch.is_begun_by(first), epoch.begin(first)
    (True, None)
    >>> epoch.entries += first.token_ids
    >>> late = Draft(epoch=0, base_position=6, token_ids=(8, 9))  # 8 is known, 9 is new
    >>> epoch.end, epoch.num_known(late)
    (7, 1)
    """

    def __init__(self) -> None:
        self.number = -1  # none was begun
        self.base = 0
        self.entries: list[T] = []

    @property
    def end(self) -> int:
        """The position after the last entry."""
        return self.base + len(self.entries)

    def is_begun_by(self, draft: Draft) -> bool:
        return draft.epoch > self.number

    def has_passed(self, draft: Draft) -> bool:
        """Whether a newer epoch than the frame's was begun."""
        return draft.epoch < self.number

    def begin(self, draft: Draft) -> None:
        """The frame's epoch is the newest; its entries are to be added."""
        self.number = draft.epoch
        self.base = draft.base_position
        self.entries.clear()

    def num_known(self, draft: Draft) -> int:
        """How many of the frame's tokens, the first ones, are for positions before the end."""
        return max(0, self.end - draft.base_position)
