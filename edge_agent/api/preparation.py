"""From a checked body to a GenerationRequest: what only the served model can tell.

After this, nothing in the request can be refused by the cloud any more.
"""

from collections.abc import Sequence

import numpy as np

from edge_agent.api.schema import ChatBody, CompletionBody, TextBody
from edge_agent.generation import GenerationRequest
from edge_agent.tokenizer import Tokenizer
from picospec.errors import RequestError, UnknownModel
from picospec.protocol.messages import ModelCard, SamplingParams, TokenArray


async def prepare(
    body: CompletionBody, *, tokenizer: Tokenizer, card: ModelCard, request_id: str
) -> GenerationRequest:
    """Raises RequestError or UnknownModel naming the parameter at fault."""
    if body.model != card.model_id:
        raise UnknownModel(
            f"The model {body.model!r} does not exist; {card.model_id!r} is served here.",
            "model",
            "model_not_found",
        )
    sampling = sampling_params(body, card)
    stop_token_ids = _stop_token_ids(body, tokenizer, card)
    param, prompt_token_ids = await _tokenize(body, tokenizer, card)
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        max_tokens=_max_tokens(body, param, len(prompt_token_ids), card),
        stop_token_ids=stop_token_ids,
        seeded="seed" in body.model_fields_set,
    )


def sampling_params(body: CompletionBody, card: ModelCard) -> SamplingParams:
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=min(body.top_k, card.logits_width),
        min_p=body.min_p,
        seed=body.seed % 2**64,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body, card),
    )


def _logit_bias(body: CompletionBody, card: ModelCard) -> tuple[tuple[int, float], ...]:
    most = card.limits.max_logit_bias
    if len(body.logit_bias) > most:
        raise RequestError(
            f"'logit_bias' has {len(body.logit_bias)} entries; at most {most} are allowed.",
            "logit_bias",
            "object_above_max_properties",
        )
    biases: dict[int, float] = {}
    for key, bias in body.logit_bias.items():
        # Ten digits hold every 32-bit id; int() alone would take "1_0", " 1" and "١".
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else -1
        if not 0 <= token_id < card.logits_width:
            raise RequestError(
                f"'logit_bias' names token {key[:32]!r}; token ids go from 0 to "
                f"{card.logits_width - 1}.",
                "logit_bias",
                "invalid_value",
            )
        biases[token_id] = bias
    return tuple(sorted(biases.items()))


def _stop_token_ids(body: CompletionBody, tokenizer: Tokenizer, card: ModelCard) -> tuple[int, ...]:
    _check_token_ids(body.stop_token_ids, "stop_token_ids", card)
    # The target's word on where a text ends counts, not the drafter's.
    eos_token_ids = () if body.ignore_eos else card.eos_token_ids or tokenizer.eos_token_ids
    stop_token_ids = tuple(dict.fromkeys((*eos_token_ids, *body.stop_token_ids)))
    most = card.limits.max_stop_token_ids
    if body.stop_token_ids and len(stop_token_ids) > most:
        raise RequestError(
            f"'stop_token_ids' are too many: with end of sequence at most {most} are allowed.",
            "stop_token_ids",
            "array_above_max_length",
        )
    return stop_token_ids


async def _tokenize(
    body: CompletionBody, tokenizer: Tokenizer, card: ModelCard
) -> tuple[str, TokenArray]:
    """The name of the prompt's parameter, and its tokens."""
    if isinstance(body, ChatBody):
        param = "messages"
        token_ids = await tokenizer.encode_chat_async(
            [message.plain() for message in body.messages]
        )
    else:
        assert isinstance(body, TextBody)
        param = "prompt"
        if isinstance(body.prompt, str):
            token_ids = await tokenizer.encode_async(body.prompt)
        else:
            _check_token_ids(body.prompt, param, card)
            token_ids = np.asarray(body.prompt, np.int32)
    if not len(token_ids):
        raise RequestError("The prompt has no tokens.", param, "empty_prompt")
    return param, token_ids


def _check_token_ids(token_ids: Sequence[int], param: str, card: ModelCard) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < card.logits_width:
            raise RequestError(
                f"'{param}' holds token {token_id}; token ids go from 0 to "
                f"{card.logits_width - 1}.",
                param,
                "invalid_value",
            )


def _max_tokens(body: CompletionBody, param: str, num_prompt_tokens: int, card: ModelCard) -> int:
    """How many tokens may be generated: what was asked for, or all there is room for."""
    room = card.max_model_len - num_prompt_tokens
    if room < 1:
        raise RequestError(
            f"The prompt has {num_prompt_tokens} tokens; the model's context holds "
            f"{card.max_model_len} tokens, prompt and answer together.",
            param,
            "context_length_exceeded",
        )
    name, asked = body.token_limit
    if asked is None:
        return room
    if asked > room and name in body.model_fields_set:
        raise RequestError(
            f"'{name}' is {asked}; after the prompt's {num_prompt_tokens} tokens the model's "
            f"context of {card.max_model_len} tokens has room for {room}.",
            name,
            "context_length_exceeded",
        )
    return min(asked, room)
