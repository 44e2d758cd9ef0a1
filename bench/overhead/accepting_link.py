"""A link to a cloud that accepts every draft at once: what is left is the edge's own time."""

from __future__ import annotations

import asyncio

from picospec import PROTOCOL_VERSION
from picospec.protocol import codec
from picospec.protocol.messages import (
    CloudFrame,
    Draft,
    EdgeFrame,
    FinishReason,
    Limits,
    ModelCard,
    Open,
    Opened,
    Verdict,
    VerificationMode,
)


class AcceptingLink:
    """A `Link` in memory. Frames are encoded and decoded as on a real one."""

    def __init__(self, mode: VerificationMode, logits_width: int = 49152) -> None:
        self.card = ModelCard(
            model_id="accepts-all",
            logits_width=logits_width,
            tokenizer_fingerprint="",
            chat_template_fingerprint="",
            eos_token_ids=(),
            max_model_len=8192,
            modes=(mode,),
            limits=Limits(),
            protocol_version=PROTOCOL_VERSION,
        )

    def open_stream(self, request_id: str) -> AcceptingStream:
        return AcceptingStream(self.card)


class AcceptingStream:
    """A `Stream` whose verdicts are ready before the next token is drafted."""

    def __init__(self, card: ModelCard) -> None:
        self.bytes_up = self.bytes_down = 0
        self._card = card
        self._encoder = codec.EdgeEncoder()
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._position = self._end = 0

    def send(self, frame: EdgeFrame) -> None:
        payload = self._encoder.to_bytes(frame)
        self.bytes_up += len(payload)
        limits = self._card.limits
        if isinstance(frame, Open):
            self._position = len(frame.prompt_token_ids)
            self._end = self._position + frame.max_tokens
            self._answer(
                Opened(
                    first_position=self._position,
                    cached_prompt_tokens=0,
                    max_draft_tokens=limits.max_draft_tokens,
                    window=limits.max_window,
                    sparse_k=64,
                )
            )
            self._answer(Verdict(0, self._position, token_ids=(0,)))
            self._position += 1
        elif isinstance(frame, Draft):
            if frame.base_position != self._position:
                return  # of the chain that the first token ended
            accepted = len(frame.token_ids)
            done = self._position + accepted >= self._end
            self._answer(
                Verdict(
                    frame.epoch,
                    self._position,
                    num_accepted=accepted,
                    finish_reason=FinishReason.LENGTH if done else None,
                    num_draft_tokens=accepted,
                )
            )
            self._position += accepted

    def _answer(self, frame: CloudFrame) -> None:
        self._frames.put_nowait(codec.encode_cloud(frame).SerializeToString())

    async def receive(self) -> CloudFrame | None:
        payload = await self._frames.get()
        self.bytes_down += len(payload)
        return codec.cloud_from_bytes(payload)

    async def aclose(self) -> None:
        """Nothing to free."""
