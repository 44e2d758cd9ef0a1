"""Frames of one stream that wait to be written. Sans I/O.

When an epoch begins, what waits of older ones is dropped: the cloud would drop it on arrival. The
first frame of each epoch stays, because epochs must be seen one after the other; it names its own
position, so nothing that was dropped before it is missed in decoding.
"""

from collections import deque

from picospec.protocol.codec import EdgeEncoder
from picospec.protocol.messages import Draft, EdgeFrame

MAX_FRAMES = 1024


class OutboxFull(Exception):
    """The peer takes nothing any more: the stream is lost."""


class Outbox:
    """Encoded frames, in order; those that may be dropped are known.

    >>> outbox = Outbox()
    >>> for epoch, position in ((0, 5), (0, 6), (1, 5)):
    ...     outbox.put(Draft(epoch=epoch, base_position=position, token_ids=(7,)))
    >>> len(outbox)  # the second frame of epoch 0 is gone
    2
    """

    def __init__(self) -> None:
        self._encoder = EdgeEncoder()
        self._frames: deque[tuple[bool, bytes]] = deque()  # (may be dropped, payload)
        self._epoch = -1  # of the newest draft

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: EdgeFrame) -> None:
        """Raises OutboxFull."""
        may_be_dropped = False
        if isinstance(frame, Draft):
            may_be_dropped = frame.epoch <= self._epoch
            if not may_be_dropped:
                self._epoch = frame.epoch
                self._frames = deque(waiting for waiting in self._frames if not waiting[0])
        if len(self._frames) >= MAX_FRAMES:
            raise OutboxFull
        self._frames.append((may_be_dropped, self._encoder.to_bytes(frame)))

    def take(self) -> bytes:
        """The next payload. Raises IndexError if there is none."""
        return self._frames.popleft()[1]
