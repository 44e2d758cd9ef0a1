"""Values of the protocol for tests: each builder's defaults are legal, and legal together.

All parameters are keywords, so that a test names what it is about and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from edge_agent.drafting.messages import ContextSpec
from edge_agent.tokenizer import Tokenizer
from picospec.protocol.messages import (
    AssistPolicy,
    Draft,
    FinishReason,
    Limits,
    ModelCard,
    Open,
    Opened,
    Rejection,
    SamplingParams,
    TokenArray,
    Verdict,
    VerificationMode,
)
from picospec.sampling.distribution import Distribution

SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED
SAMPLED, GREEDY = SamplingParams(), SamplingParams(temperature=0.0)
LIMITS = Limits()


def token_array(*token_ids: int) -> TokenArray:
    return np.array(token_ids, np.int32)


def make_card(
    *,
    model_id: str = "m",
    logits_width: int = 50,
    tokenizer_fingerprint: str = "f",
    chat_template_fingerprint: str = "",
    eos_token_ids: tuple[int, ...] = (0,),
    max_model_len: int = 100,
    modes: tuple[VerificationMode, ...] = (SPLIT, COUPLED),
    limits: Limits = LIMITS,
    protocol_version: int = 1,
) -> ModelCard:
    return ModelCard(
        model_id=model_id,
        logits_width=logits_width,
        tokenizer_fingerprint=tokenizer_fingerprint,
        chat_template_fingerprint=chat_template_fingerprint,
        eos_token_ids=eos_token_ids,
        max_model_len=max_model_len,
        modes=modes,
        limits=limits,
        protocol_version=protocol_version,
    )


def make_card_for(
    tokenizer: Tokenizer,
    *,
    model_id: str = "tiny/target",
    padding: int = 0,
    max_model_len: int = 512,
    modes: tuple[VerificationMode, ...] = (SPLIT, COUPLED),
    limits: Limits = LIMITS,
) -> ModelCard:
    """The card of a model with `tokenizer`; its logits are `padding` wider than the vocabulary."""
    return make_card(
        model_id=model_id,
        logits_width=tokenizer.size + padding,
        tokenizer_fingerprint=tokenizer.fingerprint,
        chat_template_fingerprint=tokenizer.chat_template_fingerprint,
        eos_token_ids=tokenizer.eos_token_ids,
        max_model_len=max_model_len,
        modes=modes,
        limits=limits,
    )


def make_open(
    *,
    session_id: str = "chat-1",
    prompt_token_ids: ArrayLike = (3, 1, 4),
    output_token_ids: ArrayLike = (),
    sampling: SamplingParams = GREEDY,
    mode: VerificationMode = COUPLED,
    max_tokens: int = 16,
    stop_token_ids: tuple[int, ...] = (0,),
    sparse_k: int = 64,
    assist: AssistPolicy = AssistPolicy.NEVER,
    probe: int = 0,
    protocol_version: int = 1,
) -> Open:
    return Open(
        session_id=session_id,
        prompt_token_ids=np.asarray(prompt_token_ids, np.int32),
        output_token_ids=np.asarray(output_token_ids, np.int32),
        sampling=sampling,
        mode=mode,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
        sparse_k=sparse_k,
        assist=assist,
        probe=probe,
        protocol_version=protocol_version,
    )


def make_opened(
    *,
    first_position: int = 3,
    cached_prompt_tokens: int = 0,
    max_draft_tokens: int = 16,
    window: int = 64,
    sparse_k: int = 64,
) -> Opened:
    return Opened(
        first_position=first_position,
        cached_prompt_tokens=cached_prompt_tokens,
        max_draft_tokens=max_draft_tokens,
        window=window,
        sparse_k=sparse_k,
    )


def make_draft(
    *,
    epoch: int = 0,
    base_position: int = 3,
    token_ids: tuple[int, ...] = (),
    draft_probs: tuple[float, ...] = (),
    num_forced: int = 0,
    end_of_round: bool = False,
    probe: int = 0,
    step_limit: int = 0,
) -> Draft:
    return Draft(
        epoch=epoch,
        base_position=base_position,
        token_ids=token_ids,
        draft_probs=draft_probs,
        num_forced=num_forced,
        end_of_round=end_of_round,
        probe=probe,
        step_limit=step_limit,
    )


def make_verdict(
    *,
    epoch: int = 0,
    position: int = 3,
    num_accepted: int = 0,
    token_ids: tuple[int, ...] = (),
    rejection: Rejection | None = None,
    finish_reason: FinishReason | None = None,
    num_draft_tokens: int = 0,
    queue_us: int = 0,
    compute_us: int = 0,
    batch_size: int = 0,
    draft_budget: int = 0,
    num_forwards: int = 0,
) -> Verdict:
    return Verdict(
        epoch=epoch,
        position=position,
        num_accepted=num_accepted,
        token_ids=token_ids,
        rejection=rejection,
        finish_reason=finish_reason,
        num_draft_tokens=num_draft_tokens,
        queue_us=queue_us,
        compute_us=compute_us,
        batch_size=batch_size,
        draft_budget=draft_budget,
        num_forwards=num_forwards,
    )


def make_rejection(
    *,
    token_ids: ArrayLike = (1,),
    probs: ArrayLike = (1.0,),
    tail_mass: float = 0.0,
    tail_token_id: int = 0,
    tail_prob: float = 0.0,
) -> Rejection:
    return Rejection(
        token_ids=np.asarray(token_ids, np.int32),
        probs=np.asarray(probs, np.float32),
        tail_mass=tail_mass,
        tail_token_id=tail_token_id,
        tail_prob=tail_prob,
    )


def make_law(token_id: int) -> Distribution:
    """What a draft was drawn from: its q is 0.5, and 3 and 4 have 0.25 each."""
    ids = np.array(sorted((3, 4, token_id)), np.int32)
    probs = np.where(ids == token_id, np.float32(0.5), np.float32(0.25))
    return Distribution(ids, probs)


def make_context_spec(
    *,
    request_id: str = "r",
    token_ids: Sequence[int] = (1, 2, 3),
    sampling: SamplingParams = SAMPLED,
    mode: VerificationMode = SPLIT,
    stop_token_ids: tuple[int, ...] = (),
    prompt_length: int | None = None,
    max_length: int = 0,
    logits_width: int = 0,
    confidence_stop: float = 0.0,
) -> ContextSpec:
    """All of `token_ids` is the prompt where `prompt_length` does not say otherwise."""
    return ContextSpec(
        request_id=request_id,
        token_ids=np.asarray(token_ids, np.int32),
        sampling=sampling,
        mode=mode,
        stop_token_ids=stop_token_ids,
        prompt_length=len(token_ids) if prompt_length is None else prompt_length,
        max_length=max_length,
        logits_width=logits_width,
        confidence_stop=confidence_stop,
    )
