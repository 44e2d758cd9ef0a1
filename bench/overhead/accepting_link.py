"""A link to a cloud that accepts every draft at once: what is left is the edge's own time."""

from edge_agent.link import ScriptedLink, ScriptedStream
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


class AcceptingLink(ScriptedLink):
    """For one stream, whose verdicts are ready before the next token is drafted."""

    def __init__(self, mode: VerificationMode, logits_width: int = 49152) -> None:
        super().__init__(self._accept)
        self._position = self._end = 0
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

    def _accept(self, stream: ScriptedStream, frame: EdgeFrame) -> None:
        position = self._position
        if isinstance(frame, Open):
            position = len(frame.prompt_token_ids)
            self._end = position + frame.max_tokens
            limits = self.card.limits
            opened = Opened(
                first_position=position,
                cached_prompt_tokens=0,
                max_draft_tokens=limits.max_draft_tokens,
                window=limits.max_window,
                sparse_k=64,
            )
            _feed(stream, opened, Verdict(0, position, token_ids=(0,)))
            self._position = position + 1
        # Drafts for elsewhere are of the chain that the first token ended.
        elif isinstance(frame, Draft) and frame.base_position == position:
            accepted = len(frame.token_ids)
            self._position = position + accepted
            verdict = Verdict(
                frame.epoch,
                position,
                num_accepted=accepted,
                finish_reason=FinishReason.LENGTH if self._position >= self._end else None,
                num_draft_tokens=accepted,
            )
            _feed(stream, verdict)


def _feed(stream: ScriptedStream, *frames: CloudFrame) -> None:
    """Encoded and decoded as on a real link."""
    for frame in frames:
        stream.feed(codec.cloud_from_bytes(codec.encode_cloud(frame).SerializeToString()))
