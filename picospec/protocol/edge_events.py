"""What an `EdgeSession` is told (events) and what follows (effects), as frozen values.

The cloud's frames are events as they come (`messages`); what the drafter says is an event and
what it is told an effect (`drafting`).
"""

from dataclasses import dataclass

from picospec.protocol.drafting import DrafterCommand, DrafterEvent
from picospec.protocol.messages import CloudFrame, EdgeFrame, FinishReason

# Events


@dataclass(frozen=True, slots=True)
class Start:
    """Open the first stream."""


@dataclass(frozen=True, slots=True)
class SetLength:
    """Speculate with these lengths from now on; the cloud's limits cap them. A window of 0 stops
    the drafter: the cloud goes on alone.

    `lead`: tokens that the cloud decodes alone while a verdict and a frame travel. A chain that
    ends within them lands behind the cloud, so it waits for its next drafts: one frame then carries
    all.
    """

    draft_length: int
    window: int
    lead: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due at `EdgeSession.deadline`."""


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The stream is gone; no frame of it comes any more."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Open a new stream in place of the lost one."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """The answer is not wanted any more; may come again."""


EdgeEvent = Start | SetLength | Tick | LinkLost | Resume | Cancel | DrafterEvent | CloudFrame


# Effects: what the caller must do, in order.


@dataclass(frozen=True, slots=True)
class Send:
    """Send `frame`. An Open goes out on a new stream."""

    frame: EdgeFrame


@dataclass(frozen=True, slots=True)
class Commit:
    """These tokens are final; show them to the user."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The generation is complete."""

    reason: FinishReason


Effect = Send | Commit | Finished | DrafterCommand
