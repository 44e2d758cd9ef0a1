"""Sessions as the engine's scheduler has them, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloud_server.engine.engine_session import EngineSession
from picospec.protocol.messages import AssistPolicy, Draft, VerificationMode
from tests.support.builders import SPLIT, make_open, token_array

PROMPT = (7, 8, 9)
WIDTH = 50


@dataclass
class FakeRequest:
    """What `EngineRequest` asks of vLLM's request."""

    request_id: str = "s1"
    max_tokens: int = 40
    num_computed_tokens: int = 0
    is_prefill_chunk: bool = False
    spec_token_ids: list[int] = field(default_factory=list)
    next_decode_eligible_step: int = 0
    all_token_ids: list[int] = field(default_factory=lambda: list(PROMPT))

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - len(PROMPT)


def make_session(
    name: str = "s1",
    *,
    mode: VerificationMode = SPLIT,
    assist: AssistPolicy = AssistPolicy.NEVER,
    output: tuple[int, ...] = (1,),
    drafts: tuple[int, ...] = (),
    probe: int = 0,
    max_tokens: int = 40,
    opened: bool = True,
    may_keep_rows: bool = True,
    last_step: int = 0,
) -> EngineSession:
    """A resident session past its prefill, with `drafts` for the position after `output`."""
    request = FakeRequest(request_id=name, max_tokens=max_tokens, all_token_ids=[*PROMPT, *output])
    opening = make_open(
        prompt_token_ids=token_array(*PROMPT), mode=mode, assist=assist, max_tokens=max_tokens
    )
    session = EngineSession.of(request, opening, logits_width=WIDTH, may_keep_rows=may_keep_rows)
    if opened:
        session.opened = True
        session.scheduled(last_step)
        request.num_computed_tokens = request.num_tokens - 1
    if drafts or probe:
        probs = (0.5,) * len(drafts) if mode is SPLIT else ()
        session.queue.add(
            Draft(
                epoch=0,
                base_position=request.num_tokens,
                token_ids=drafts,
                draft_probs=probs,
                probe=probe,
            ),
            1.0,
        )
    return session
