"""A link that keeps the frames of its streams, so that a generation can be accounted for later.

Nothing is computed while the generation runs: frames are encoded a second time afterwards, to
learn how large they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.link import Link, Stream
from picospec.protocol import codec
from picospec.protocol.messages import CloudFrame, Draft, EdgeFrame, Verdict


@dataclass
class MeteredLink:
    """A `Link` over `link`. `frames` holds those of the streams opened since `reset`."""

    link: Link
    streams: list[MeteredStream] = field(default_factory=list)

    def open_stream(self, request_id: str) -> MeteredStream:
        stream = MeteredStream(self.link.open_stream(request_id))
        self.streams.append(stream)
        return stream

    def reset(self) -> None:
        self.streams.clear()

    @property
    def first_draft_s(self) -> float:
        """From the opening to the first frame with drafts; 0 if there was none."""
        for stream in self.streams:
            for frame, at_s in zip(stream.sent, stream.sent_s, strict=True):
                if isinstance(frame, Draft):
                    return at_s - stream.sent_s[0]
        return 0.0

    @property
    def restarts_s(self) -> list[float]:
        """From each rejection's arrival to the recovered token's departure."""
        found = []
        for stream in self.streams:
            heads_s = [
                at_s
                for frame, at_s in zip(stream.sent, stream.sent_s, strict=True)
                if isinstance(frame, Draft) and frame.num_forced
            ]
            rejections_s = [
                at_s
                for frame, at_s in zip(stream.received, stream.received_s, strict=True)
                if isinstance(frame, Verdict) and frame.rejection is not None
            ]
            for head_s in heads_s:
                before_s = [at_s for at_s in rejections_s if at_s < head_s]
                found += [head_s - at_s for at_s in before_s[-1:]]
        return found

    @property
    def sent(self) -> list[EdgeFrame]:
        return [frame for stream in self.streams for frame in stream.sent]

    @property
    def received(self) -> list[CloudFrame]:
        return [frame for stream in self.streams for frame in stream.received]


class MeteredStream:
    """A `Stream` that remembers."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.sent: list[EdgeFrame] = []
        self.received: list[CloudFrame] = []
        self.sent_s: list[float] = []  # when, by time.perf_counter
        self.received_s: list[float] = []

    @property
    def bytes_up(self) -> int:
        return self._stream.bytes_up

    @property
    def bytes_down(self) -> int:
        return self._stream.bytes_down

    def send(self, frame: EdgeFrame) -> None:
        self.sent.append(frame)
        self.sent_s.append(time.perf_counter())
        self._stream.send(frame)

    async def receive(self) -> CloudFrame | None:
        frame = await self._stream.receive()
        if frame is not None:
            self.received.append(frame)
            self.received_s.append(time.perf_counter())
        return frame

    async def aclose(self) -> None:
        await self._stream.aclose()


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the frames of one generation were, named as in a `Record`."""

    drafts_sent: int
    draft_bytes: int
    verdicts: int
    drafted: int
    accepted: int
    misses: int
    outcomes: str
    rejections: int
    rejection_bytes: int
    queue_us: float  # over verdicts on drafts, so without the prompt's prefill
    compute_us: float


def traffic(sent: list[EdgeFrame], received: list[CloudFrame]) -> Traffic:
    drafts = [frame for frame in sent if isinstance(frame, Draft)]
    encoder = codec.EdgeEncoder()
    verdicts = [frame for frame in received if isinstance(frame, Verdict)]
    judging = [verdict for verdict in verdicts if verdict.num_draft_tokens] or verdicts[1:]
    rejections = [verdict for verdict in verdicts if verdict.rejection is not None]
    return Traffic(
        drafts_sent=sum(len(draft.token_ids) - draft.num_forced for draft in drafts),
        draft_bytes=sum(len(encoder.to_bytes(draft)) for draft in drafts),
        verdicts=len(verdicts),
        drafted=sum(verdict.num_draft_tokens for verdict in verdicts),
        accepted=sum(verdict.num_accepted for verdict in verdicts),
        misses=sum(each.num_accepted < each.num_draft_tokens for each in verdicts),
        outcomes=_first_outcome(drafts, verdicts) + "".join(map(_outcome, verdicts)),
        rejections=len(rejections),
        rejection_bytes=sum(
            len(codec.encode_cloud(verdict).SerializeToString()) for verdict in rejections
        ),
        queue_us=_mean(judging, lambda verdict: verdict.queue_us),
        compute_us=_mean(judging, lambda verdict: verdict.compute_us),
    )


def steps_ms(received: list[CloudFrame], keeps_rows: bool) -> list[tuple[int, float]]:
    """The engine's steps that were told of: drafts forwarded behind the first token, and what it
    took. `keeps_rows`: a draft that a row judges takes that token's place (docs/protocol.md)."""
    found = []
    place = 0
    for verdict in received:
        if not isinstance(verdict, Verdict) or not verdict.num_draft_tokens:
            continue
        by_row = keeps_rows and (place > 0 or verdict.num_forwards > 1)
        if verdict.compute_us:
            found.append((verdict.num_draft_tokens - by_row, verdict.compute_us / 1e3))
        whole = verdict.num_accepted == verdict.num_draft_tokens
        place = place + verdict.num_accepted if whole else 0
    return found


def _first_outcome(drafts: list[Draft], verdicts: list[Verdict]) -> str:
    """Of a draft for the first token, which the cloud draws itself; "-" if there was none."""
    if not verdicts or not verdicts[0].token_ids:
        return ""
    first = verdicts[0].position, verdicts[0].token_ids[0]
    said = any((draft.base_position, *draft.token_ids[:1]) == first for draft in drafts[:1])
    return "+" if said else "-"


def _outcome(verdict: Verdict) -> str:
    """In split mode. A probe's answer judges nothing: its position had its outcome before.

    >>> _outcome(Verdict(0, 5, num_accepted=2, num_draft_tokens=3))
    '++-'
    """
    rejected = verdict.num_accepted < verdict.num_draft_tokens and not verdict.finish_reason
    return "+" * verdict.num_accepted + "-" * rejected


def _mean(verdicts: list[Verdict], value: Callable[[Verdict], int]) -> float:
    return sum(map(value, verdicts)) / len(verdicts) if verdicts else 0.0
