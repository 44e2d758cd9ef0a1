"""The cloud's side of one stream: which frame is legal when. Sans I/O, without a clock.

The rules of this file:
1. `receive` is called with every frame of the edge, in order, `send` with every frame that goes
   to the edge, just before it is written. Nothing else changes state.
2. What `receive` returns is to be acted on: an Open opens the engine's session, a Draft is
   delivered, a Finish aborts it. None: the frame changes nothing (a duplicate, a dead epoch).
3. The edge alone numbers epochs: an older one is dropped and counted, the next one begins a
   chain, a later one is an error. Gaps are errors, overlaps must be equal.
4. An error ends this session alone. `RemoteProtocolError` is the edge's fault,
   `LocalProtocolError` the engine's.

`TRANSITIONS` is the state machine; what is not in it is illegal.
"""

import enum

from picospec.errors import LocalProtocolError, RemoteOrderError
from picospec.protocol import validation
from picospec.protocol.epoch import Epoch
from picospec.protocol.messages import CloudFrame, Draft, EdgeFrame, Finish, ModelCard, Open, Opened


class CloudState(enum.Enum):
    NEW = "new"
    OPENING = "opening"  # until the prompt is in
    OPEN = "open"
    AWAITING_RECOVERY = "awaiting recovery"  # a rejection was sent
    FINISHED = "finished"


class CloudEvent(enum.Enum):
    """What was received or sent, seen from the cloud."""

    OPEN = "open"
    CHAIN = "a new epoch's drafts"
    RECOVERY = "a new epoch's forced head"
    PROBE = "a new epoch's probe"
    EXTENSION = "more of the current epoch"
    FINISH = "finish"
    OPENED = "opened"
    VERDICT = "verdict"
    REJECTION = "verdict with a rejection"
    LAST_VERDICT = "verdict with a finish reason"


_S, _E = CloudState, CloudEvent
TRANSITIONS: dict[tuple[CloudState, CloudEvent], CloudState] = {
    (_S.NEW, _E.OPEN): _S.OPENING,
    (_S.NEW, _E.FINISH): _S.FINISHED,
    # Drafts may come before the prompt is in; they are judged after the first token.
    (_S.OPENING, _E.CHAIN): _S.OPENING,
    (_S.OPENING, _E.PROBE): _S.OPENING,
    (_S.OPENING, _E.EXTENSION): _S.OPENING,
    (_S.OPENING, _E.FINISH): _S.FINISHED,
    (_S.OPENING, _E.OPENED): _S.OPEN,
    (_S.OPENING, _E.LAST_VERDICT): _S.FINISHED,
    (_S.OPEN, _E.CHAIN): _S.OPEN,
    (_S.OPEN, _E.PROBE): _S.OPEN,
    (_S.OPEN, _E.EXTENSION): _S.OPEN,
    (_S.OPEN, _E.FINISH): _S.FINISHED,
    (_S.OPEN, _E.VERDICT): _S.OPEN,
    (_S.OPEN, _E.REJECTION): _S.AWAITING_RECOVERY,
    (_S.OPEN, _E.LAST_VERDICT): _S.FINISHED,
    (_S.AWAITING_RECOVERY, _E.RECOVERY): _S.OPEN,
    (_S.AWAITING_RECOVERY, _E.PROBE): _S.OPEN,
    (_S.AWAITING_RECOVERY, _E.FINISH): _S.FINISHED,
    (_S.AWAITING_RECOVERY, _E.LAST_VERDICT): _S.FINISHED,
    # The engine and the edge may each finish while the other's frames are on their way.
    **{(_S.FINISHED, event): _S.FINISHED for event in CloudEvent},
}

_SENT = {_E.OPENED, _E.VERDICT, _E.REJECTION, _E.LAST_VERDICT}
# The field at fault when the edge does what its state forbids.
_FIELDS = {
    _E.OPEN: "open",
    _E.CHAIN: "draft.num_forced",
    _E.RECOVERY: "draft.num_forced",
    _E.PROBE: "draft.probe",
    _E.EXTENSION: "draft",
    _E.FINISH: "finish",
}


class CloudSession:
    """Checks one generation's frames against what was sent and received on its stream."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self.state = CloudState.NEW
        self.request: Open | None = None
        self.stale_tokens = 0  # in frames of epochs that were over
        self.duplicate_frames = 0
        self.epoch = Epoch[int]()  # its tokens; to be read only
        self._probe = (0, 0)  # (position, number) of the epoch's last probe
        self._forced_position: int | None = None  # of the epoch's forced head
        self.committed_end = 0  # first position that neither a sent verdict nor a head commits
        self._length_max = 0  # prompt and most output tokens

    @property
    def finished(self) -> bool:
        return self.state is CloudState.FINISHED

    @property
    def unverified_tokens(self) -> int:
        """Drafts of the current epoch without a verdict."""
        return max(0, self.epoch.end - self.committed_end)

    def receive(self, frame: EdgeFrame) -> EdgeFrame | None:
        """Returns the frame to act on, or None. Raises RemoteProtocolError, RemoteOrderError."""
        if self.state is CloudState.FINISHED:
            return None
        match frame:
            case Open():
                self._move(CloudEvent.OPEN)
                self._receive_open(frame)
                return frame
            case Finish():
                self._move(CloudEvent.FINISH)
                return frame
            case Draft():
                return self._receive_draft(frame)

    def send(self, frame: CloudFrame) -> None:
        """Note a frame that is about to be sent. Raises LocalProtocolError if it is illegal."""
        if isinstance(frame, Opened):
            self._move(CloudEvent.OPENED)
            return
        if frame.finish_reason is not None:
            event = CloudEvent.LAST_VERDICT
        elif frame.rejection is not None:
            event = CloudEvent.REJECTION
        else:
            event = CloudEvent.VERDICT
        if self.state is not CloudState.FINISHED and frame.position != self.committed_end:
            raise LocalProtocolError(
                f"A verdict for position {frame.position}, expected {self.committed_end}",
                "verdict.position",
            )
        self._move(event)
        self.committed_end += frame.num_accepted + len(frame.token_ids)

    def _receive_open(self, request: Open) -> None:
        validation.check_open(request, self._card)
        self.request = request
        self.epoch.base = self.committed_end = self._first_position
        self._length_max = len(request.prompt_token_ids) + request.max_tokens

    def _receive_draft(self, draft: Draft) -> Draft | None:
        if self.request is None:
            raise RemoteOrderError("The first frame must be an Open", "draft")
        validation.check_draft(draft, self._card, self.request.mode)
        next_epoch = self.epoch.number + 1
        if draft.epoch > next_epoch:
            raise RemoteOrderError(
                f"Epoch {draft.epoch} is unknown; the next is {next_epoch}", "draft.epoch"
            )
        begins = self.epoch.is_begun_by(draft)
        awaits_recovery = self.state is CloudState.AWAITING_RECOVERY
        dead = self.epoch.has_passed(draft) or (awaits_recovery and not begins)
        if dead:
            self.stale_tokens += len(draft.token_ids)
            return None
        if draft.base_position + len(draft.token_ids) > self._length_max:
            raise RemoteOrderError(
                f"The generation ends at position {self._length_max}", "draft.token_ids"
            )
        fresh = self._begin(draft) if begins else self._extend(draft)
        self._check_window()
        if fresh:
            return draft
        self.duplicate_frames += 1
        return None

    def _begin(self, draft: Draft) -> bool:
        """A frame that starts an epoch."""
        awaited = self.state is CloudState.AWAITING_RECOVERY
        if draft.num_forced:
            self._move(CloudEvent.RECOVERY)
        else:
            self._move(CloudEvent.CHAIN if draft.token_ids else CloudEvent.PROBE)
        lowest = self.committed_end if awaited else self._first_position
        if not lowest <= draft.base_position <= self.committed_end:
            raise RemoteOrderError(
                f"A chain at position {draft.base_position}; it can begin at {lowest} to "
                f"{self.committed_end}",
                "draft.base_position",
            )
        self.committed_end += draft.num_forced
        self.epoch.begin(draft)
        self.epoch.entries += draft.token_ids
        self._probe = (draft.base_position, draft.probe)
        self._forced_position = draft.base_position if draft.num_forced else None
        return True

    def _extend(self, draft: Draft) -> bool:
        """A frame of the current epoch. Returns whether it holds anything new."""
        self._move(CloudEvent.EXTENSION)
        base, end = draft.base_position, self.epoch.end
        # Coupled: what the cloud committed itself, equal to the edge's chain, need not travel.
        if not self._first_position <= base <= max(end, self.committed_end):
            raise RemoteOrderError(
                f"A frame at position {base}; epoch {draft.epoch} ends at {end}",
                "draft.base_position",
            )
        if not draft.token_ids:
            if base > self.committed_end:
                raise RemoteOrderError("A probe behind unverified drafts", "draft.base_position")
            duplicate = self._probe == (base, draft.probe)
            self._probe = (base, draft.probe)
            return not duplicate
        if draft.num_forced and base != self._forced_position:
            raise RemoteOrderError("Only a new epoch has a forced head", "draft.num_forced")
        if base > end:
            self.epoch.begin(draft)
            end = base
        start = max(base, self.epoch.base)
        known = tuple(self.epoch.entries[start - self.epoch.base :])
        tokens = draft.token_ids[start - base :]
        if known[: len(tokens)] != tokens[: len(known)]:
            raise RemoteOrderError(
                f"Epoch {draft.epoch} had other tokens there before", "draft.token_ids"
            )
        self.epoch.entries += draft.token_ids[self.epoch.num_known(draft) :]
        return self.epoch.end > end

    def _check_window(self) -> None:
        window = self._card.limits.max_window
        if self.unverified_tokens > window:
            raise RemoteOrderError(
                f"{self.unverified_tokens} unverified tokens; the window is {window}",
                "draft.token_ids",
            )

    @property
    def _first_position(self) -> int:
        assert self.request is not None
        return len(self.request.prompt_token_ids) + len(self.request.output_token_ids)

    def _move(self, event: CloudEvent) -> None:
        """Follow TRANSITIONS, or raise in the name of whoever caused `event`."""
        state = TRANSITIONS.get((self.state, event))
        if state is not None:
            self.state = state
            return
        message = f"{event.value!r} is not allowed in state {self.state.value!r}"
        if event in _SENT:
            raise LocalProtocolError(message, "verdict")
        raise RemoteOrderError(message, _FIELDS[event])
