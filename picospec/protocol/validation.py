"""Bounds on everything that comes from the peer: values that can never be right.

What is checked here depends on the frame and on the model served alone; what may be sent when
is the sessions' business. Every failure is a RemoteProtocolError that names the field.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from picospec import PROTOCOL_VERSION
from picospec.errors import RemoteOrderError, RemoteProtocolError
from picospec.protocol.messages import (
    AssistPolicy,
    Draft,
    ModelCard,
    Open,
    Opened,
    Rejection,
    SamplingParams,
    TokenArray,
    Verdict,
    VerificationMode,
)

MAX_PROBE = 1 << 20  # tail samples of one position; each needs a round trip
_SESSION_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_MASS_TOLERANCE = 1e-3  # what float32 sums over a vocabulary may be off by


def _require(holds: Any, message: str, field: str) -> None:
    if not holds:
        raise RemoteProtocolError(message, field)


def check_open(request: Open, card: ModelCard) -> None:
    """Raises RemoteProtocolError, or RemoteOrderError for a newer protocol version."""
    if request.protocol_version > PROTOCOL_VERSION:
        raise RemoteOrderError(
            f"The edge speaks protocol version {request.protocol_version}, "
            f"the cloud up to {PROTOCOL_VERSION}",
            "open.protocol_version",
        )
    _require(request.protocol_version >= 1, "Versions count from 1", "open.protocol_version")
    _require(
        _SESSION_ID.fullmatch(request.session_id),
        "A session id is 1 to 128 letters, digits or . _ : / -",
        "open.session_id",
    )
    _require(request.mode in card.modes, f"{request.mode.value} is not served", "open.mode")
    _check_lengths(request, card)
    _check_tokens(request.prompt_token_ids, card.logits_width, "open.prompt_token_ids")
    _check_tokens(request.output_token_ids, card.logits_width, "open.output_token_ids")
    check_sampling(request.sampling, card.logits_width, card.limits.max_logit_bias)
    _check_ids(request.stop_token_ids, card.logits_width, "open.stop_token_ids")
    _require(
        len(request.stop_token_ids) <= card.limits.max_stop_token_ids,
        f"More than {card.limits.max_stop_token_ids} stop token ids",
        "open.stop_token_ids",
    )
    if request.mode is VerificationMode.SPLIT:
        most = card.limits.max_sparse_k
        _require(
            1 <= request.sparse_k <= most or (request.sparse_k == 0 and most >= card.logits_width),
            f"{request.sparse_k} is not in 1 .. {most}",
            "open.sparse_k",
        )
        _require(0 <= request.probe <= MAX_PROBE, f"Above {MAX_PROBE}", "open.probe")
        # A round may end early because of a token in it (nothing to propose after a stop token), so
        # when it arrives depends on what was drafted, and a takeover would favour late tokens.
        _require(
            request.assist is AssistPolicy.NEVER or not request.verify_whole_rounds,
            "Where whole rounds are verified in split mode, the cloud may not take over",
            "open.assist",
        )
    else:
        _require(request.probe == 0, "Split mode only", "open.probe")


def _check_lengths(request: Open, card: ModelCard) -> None:
    num_prompt = len(request.prompt_token_ids)
    _require(num_prompt >= 1, "The prompt is empty", "open.prompt_token_ids")
    _require(
        num_prompt < card.max_model_len,
        f"The prompt has {num_prompt} tokens; the model takes {card.max_model_len} with the output",
        "open.prompt_token_ids",
    )
    _require(request.max_tokens >= 1, "Less than one token", "open.max_tokens")
    _require(
        num_prompt + request.max_tokens <= card.max_model_len,
        f"{num_prompt} prompt tokens and {request.max_tokens} output tokens are more than the "
        f"model's {card.max_model_len}",
        "open.max_tokens",
    )
    _require(
        len(request.output_token_ids) < request.max_tokens,
        "Nothing is left to generate",
        "open.output_token_ids",
    )


def check_sampling(
    params: SamplingParams, logits_width: int, max_logit_bias: int = 1024, prefix: str = "open."
) -> None:
    """Raises RemoteProtocolError; the bounds are those in the proto's comments."""

    def bounded(name: str, low: float, high: float, *, above_low: bool = False) -> None:
        value = getattr(params, name)
        # NaN fails every comparison.
        inside = (low < value if above_low else low <= value) and value <= high
        _require(
            inside,
            f"{value} is not in {'(' if above_low else '['}{low:g}, {high:g}]",
            f"{prefix}sampling.{name}",
        )

    bounded("temperature", 0.0, 100.0)
    bounded("top_p", 0.0, 1.0, above_low=True)
    bounded("top_k", 0, 2**31 - 1)
    bounded("min_p", 0.0, 1.0)
    bounded("seed", 0, 2**64 - 1)
    bounded("presence_penalty", -2.0, 2.0)
    bounded("frequency_penalty", -2.0, 2.0)
    bounded("repetition_penalty", 0.0, 10.0, above_low=True)
    field = f"{prefix}sampling.logit_bias"
    _require(len(params.logit_bias) <= max_logit_bias, f"More than {max_logit_bias} entries", field)
    _check_ids([token_id for token_id, _ in params.logit_bias], logits_width, field)
    _require(
        all(-100.0 <= bias <= 100.0 for _, bias in params.logit_bias),
        "A bias is not in [-100, 100]",
        field,
    )


def check_draft(draft: Draft, card: ModelCard, mode: VerificationMode) -> None:
    """Raises RemoteProtocolError."""
    split = mode is VerificationMode.SPLIT
    num_tokens = len(draft.token_ids)
    num_unforced = num_tokens - draft.num_forced
    _require(
        0 <= draft.num_forced <= (1 if split else 0),
        f"{draft.num_forced} forced tokens in {mode.value} mode",
        "draft.num_forced",
    )
    _require(num_unforced >= 0, "More forced tokens than tokens", "draft.num_forced")
    _require(
        num_unforced <= card.limits.max_draft_tokens,
        f"{num_unforced} drafts in a frame; at most {card.limits.max_draft_tokens} are taken",
        "draft.token_ids",
    )
    _require(
        len(draft.draft_probs) == (num_unforced if split else 0),
        f"{len(draft.draft_probs)} probabilities for {num_unforced} drafts in {mode.value} mode",
        "draft.draft_probs",
    )
    if num_tokens:
        _require(draft.probe == 0, "A probe has no tokens", "draft.probe")
    else:
        _require(
            1 <= draft.probe <= (MAX_PROBE if split else 1),
            f"{draft.probe} is no probe in {mode.value} mode, and there are no tokens",
            "draft.probe",
        )
    _require(
        0 <= draft.step_limit <= card.limits.max_draft_tokens,
        f"{draft.step_limit} is not in 0 .. {card.limits.max_draft_tokens}",
        "draft.step_limit",
    )
    _require(
        draft.base_position >= 1 and draft.base_position + num_tokens <= card.max_model_len,
        f"The model's positions end at {card.max_model_len}",
        "draft.base_position",
    )
    _check_ids(draft.token_ids, card.logits_width, "draft.token_ids")
    _require(
        all(0.0 < prob <= 1.0 for prob in draft.draft_probs),
        "A draft's probability is not in (0, 1]",
        "draft.draft_probs",
    )


def check_card(card: ModelCard) -> None:
    """Raises RemoteProtocolError. Edge side."""
    limits = card.limits
    for field, value, low, high in (
        ("protocol_version", card.protocol_version, 1, 2**32),
        ("logits_width", card.logits_width, 1, 2**24),
        ("max_model_len", card.max_model_len, 2, 2**31),
        ("limits.max_draft_tokens", limits.max_draft_tokens, 1, 2**16),
        ("limits.max_window", limits.max_window, 1, 2**16),
        ("limits.max_sparse_k", limits.max_sparse_k, 1, 2**24),
    ):
        _require(low <= value <= high, f"{value} is not in {low} .. {high}", f"model.{field}")
    _check_ids(card.eos_token_ids, card.logits_width, "model.eos_token_ids")


def check_opened(opened: Opened, card: ModelCard) -> None:
    """Raises RemoteProtocolError. Edge side."""
    _require(opened.max_draft_tokens >= 1, "No drafts are taken", "opened.max_draft_tokens")
    _require(opened.window >= 1, "The window is closed", "opened.window")
    _require(
        1 <= opened.first_position < card.max_model_len,
        f"Not in 1 .. {card.max_model_len - 1}",
        "opened.first_position",
    )


def check_verdict(verdict: Verdict, card: ModelCard, mode: VerificationMode) -> None:
    """Raises RemoteProtocolError. Edge side."""
    _check_ids(verdict.token_ids, card.logits_width, "verdict.token_ids")
    num_tokens = verdict.num_accepted + len(verdict.token_ids)
    _require(
        verdict.position + num_tokens <= card.max_model_len,
        f"The model's positions end at {card.max_model_len}",
        "verdict.position",
    )
    if verdict.rejection is not None:
        _require(mode is VerificationMode.SPLIT, "Split mode only", "verdict.rejection")
        _require(not verdict.token_ids, "Not with tokens", "verdict.rejection")
        _require(verdict.finish_reason is None, "Not at the end", "verdict.rejection")
        _check_rejection(verdict.rejection, card)


def _check_rejection(rejection: Rejection, card: ModelCard) -> None:
    token_ids, probs = rejection.token_ids, rejection.probs
    # One draft's whole distribution may travel (the ablation without sparse rejection).
    _require(
        1 <= len(token_ids) <= card.logits_width,
        f"{len(token_ids)} token ids",
        "verdict.rejection.token_ids",
    )
    _check_tokens(token_ids, card.logits_width, "verdict.rejection.token_ids")
    # A whole law's ids ascend, which is told a hundred times as fast as sorting them.
    _require(
        bool((token_ids[1:] > token_ids[:-1]).all()) or len(np.unique(token_ids)) == len(token_ids),
        "A token id comes twice",
        "verdict.rejection.token_ids",
    )
    _require(
        len(probs) == len(token_ids),
        f"{len(probs)} probabilities for {len(token_ids)} token ids",
        "verdict.rejection.probs",
    )
    tail_mass = rejection.tail_mass
    _require(
        math.isfinite(tail_mass) and 0.0 <= tail_mass <= 1.0,
        f"{tail_mass} is not in [0, 1]",
        "verdict.rejection.tail_mass",
    )
    _require(
        bool(np.all((probs >= 0.0) & (probs <= 1.0 + _MASS_TOLERANCE)))
        and abs(float(probs.sum(dtype=np.float64)) + tail_mass - 1.0) <= _MASS_TOLERANCE,
        "The probabilities and the tail's mass are no distribution",
        "verdict.rejection.probs",
    )
    if tail_mass > 0.0:
        _check_ids((rejection.tail_token_id,), card.logits_width, "verdict.rejection.tail_token_id")
        _require(
            0.0 < rejection.tail_prob <= 1.0,
            f"{rejection.tail_prob} is not in (0, 1]",
            "verdict.rejection.tail_prob",
        )


def _check_ids(token_ids: Sequence[int], logits_width: int, field: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < logits_width:
            _require(False, f"Token id {token_id} is not in 0 .. {logits_width - 1}", field)


def _check_tokens(token_ids: TokenArray, logits_width: int, field: str) -> None:
    if len(token_ids):
        _check_ids((int(token_ids.min()), int(token_ids.max())), logits_width, field)
