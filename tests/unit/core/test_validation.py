"""Every bound of the wire, one case each, with the field that is named."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from picospec.errors import RemoteOrderError, RemoteProtocolError
from picospec.protocol import validation
from picospec.protocol.messages import (
    EMPTY_TOKENS,
    AssistPolicy,
    Draft,
    FinishReason,
    Limits,
    Opened,
    SamplingParams,
    Verdict,
    VerificationMode,
)
from tests.support.builders import (
    COUPLED,
    SAMPLED,
    SPLIT,
    make_card,
    make_open,
    make_opened,
    make_rejection,
    token_array,
)

WIDTH = 50
CARD = make_card(
    logits_width=WIDTH,
    limits=Limits(
        max_draft_tokens=4, max_window=8, max_sparse_k=16, max_stop_token_ids=3, max_logit_bias=2
    ),
)
NAN, INF = float("nan"), float("inf")


OPEN = make_open(
    session_id="s-1",
    prompt_token_ids=(1, 2, 3),
    sampling=SAMPLED,
    mode=SPLIT,
    max_tokens=20,
    sparse_k=16,
)


def test_the_whole_distribution_is_given_where_the_limit_holds_it() -> None:
    limits = dataclasses.replace(CARD.limits, max_sparse_k=WIDTH)
    generous = dataclasses.replace(CARD, limits=limits)
    validation.check_open(dataclasses.replace(OPEN, sparse_k=0), generous)


@pytest.mark.parametrize("mode", [SPLIT, COUPLED])
def test_a_good_opening_passes(mode: VerificationMode) -> None:
    validation.check_open(dataclasses.replace(OPEN, mode=mode), CARD)


@pytest.mark.parametrize(
    ("mode", "assist"), [(SPLIT, AssistPolicy.NEVER), (COUPLED, AssistPolicy.AUTO)]
)
def test_whole_rounds_are_verified_where_no_takeover_can_tell_drafts_apart(
    mode: VerificationMode, assist: AssistPolicy
) -> None:
    opening = dataclasses.replace(OPEN, mode=mode, assist=assist, verify_whole_rounds=True)
    validation.check_open(opening, CARD)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"session_id": ""}, "session_id"),
        ({"session_id": "x" * 129}, "session_id"),
        ({"session_id": "a\nb"}, "session_id"),
        ({"session_id": "ok\n"}, "session_id"),
        ({"protocol_version": 0}, "protocol_version"),
        ({"verify_whole_rounds": True, "assist": AssistPolicy.IDLE}, "assist"),
        ({"verify_whole_rounds": True, "assist": AssistPolicy.AUTO}, "assist"),
        ({"prompt_token_ids": EMPTY_TOKENS}, "prompt_token_ids"),
        ({"prompt_token_ids": token_array(*[1] * 100)}, "prompt_token_ids"),
        ({"prompt_token_ids": token_array(1, WIDTH)}, "prompt_token_ids"),
        ({"prompt_token_ids": token_array(-1)}, "prompt_token_ids"),
        ({"output_token_ids": token_array(WIDTH)}, "output_token_ids"),
        ({"output_token_ids": token_array(*[1] * 20)}, "output_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 98}, "max_tokens"),
        ({"max_tokens": 2**32 - 1}, "max_tokens"),
        ({"stop_token_ids": (1, 2, 3, 4)}, "stop_token_ids"),
        ({"stop_token_ids": (WIDTH,)}, "stop_token_ids"),
        ({"sparse_k": 0}, "sparse_k"),  # all of P: more than is given out here
        ({"sparse_k": 17}, "sparse_k"),
        ({"probe": validation.MAX_PROBE + 1}, "probe"),
        ({"mode": COUPLED, "probe": 1}, "probe"),
    ],
)
def test_openings_that_can_never_be_right(change: dict[str, Any], field: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        validation.check_open(dataclasses.replace(OPEN, **change), CARD)
    assert caught.value.field == f"open.{field}"


def test_a_newer_protocol_is_refused_naming_both_versions() -> None:
    with pytest.raises(RemoteOrderError, match=r"version 7.*up to 1"):
        validation.check_open(dataclasses.replace(OPEN, protocol_version=7), CARD)


def test_a_mode_that_is_not_served() -> None:
    card = dataclasses.replace(CARD, modes=(COUPLED,))
    with pytest.raises(RemoteProtocolError) as caught:
        validation.check_open(OPEN, card)
    assert caught.value.field == "open.mode"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", bad) for bad in (-0.1, NAN, INF, -INF)),
        *(("top_p", bad) for bad in (0.0, -1.0, 1.5, NAN)),
        ("top_k", -1),
        ("top_k", 2**31),
        *(("min_p", bad) for bad in (-0.1, 1.1, NAN)),
        ("seed", -1),
        ("seed", 2**64),
        *(("presence_penalty", bad) for bad in (-2.1, 2.1, NAN)),
        *(("frequency_penalty", bad) for bad in (-2.1, INF)),
        *(("repetition_penalty", bad) for bad in (0.0, -1.0, 10.5, NAN)),
        ("logit_bias", ((WIDTH, 1.0),)),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, NAN),)),
        ("logit_bias", ((1, 1.0), (2, 1.0), (3, 1.0))),
    ],
)
def test_sampling_bounds(name: str, value: Any) -> None:
    params = dataclasses.replace(SamplingParams(), **{name: value})
    with pytest.raises(RemoteProtocolError) as caught:
        validation.check_open(dataclasses.replace(OPEN, sampling=params), CARD)
    assert caught.value.field == f"open.sampling.{name}"


@pytest.mark.parametrize(
    ("mode", "draft"),
    [
        (SPLIT, Draft(0, 3, token_ids=(1, 2), draft_probs=(0.5, 1.0))),
        (SPLIT, Draft(1, 3, token_ids=(1,), num_forced=1)),
        (SPLIT, Draft(1, 3, token_ids=(1, 2, 3, 4, 5), draft_probs=(0.1,) * 4, num_forced=1)),
        (SPLIT, Draft(1, 3, probe=7)),
        (COUPLED, Draft(0, 3, token_ids=(1, 2))),
        (COUPLED, Draft(0, 3, probe=1)),
    ],
)
def test_good_drafts_pass(mode: VerificationMode, draft: Draft) -> None:
    validation.check_draft(draft, CARD, mode)


@pytest.mark.parametrize(
    ("mode", "draft", "field"),
    [
        (SPLIT, Draft(0, 3, token_ids=(1, 2), draft_probs=(0.5,)), "draft_probs"),
        (SPLIT, Draft(0, 3, token_ids=(1,), draft_probs=(0.5, 0.5)), "draft_probs"),
        (SPLIT, Draft(0, 3, token_ids=(1,), draft_probs=(0.5,), num_forced=1), "draft_probs"),
        *(
            (SPLIT, Draft(0, 3, token_ids=(1,), draft_probs=(q,)), "draft_probs")
            for q in (0.0, -0.1, 1.01, NAN, INF)
        ),
        (COUPLED, Draft(0, 3, token_ids=(1,), draft_probs=(0.5,)), "draft_probs"),
        (COUPLED, Draft(0, 3, token_ids=(1,), num_forced=1), "num_forced"),
        (SPLIT, Draft(0, 3, token_ids=(1, 2), num_forced=2), "num_forced"),
        (SPLIT, Draft(0, 3, num_forced=1), "num_forced"),
        (SPLIT, Draft(0, 3, token_ids=(WIDTH,), draft_probs=(0.5,)), "token_ids"),
        (SPLIT, Draft(0, 3, token_ids=(2**32 - 1,), draft_probs=(0.5,)), "token_ids"),
        (SPLIT, Draft(0, 3, token_ids=(1,) * 5, draft_probs=(0.5,) * 5), "token_ids"),
        (SPLIT, Draft(0, 0, token_ids=(1,), draft_probs=(0.5,)), "base_position"),
        (SPLIT, Draft(0, 99, token_ids=(1, 2), draft_probs=(0.5, 0.5)), "base_position"),
        (SPLIT, Draft(0, 3), "probe"),
        (SPLIT, Draft(0, 3, token_ids=(1,), draft_probs=(0.5,), probe=1), "probe"),
        (SPLIT, Draft(0, 3, probe=validation.MAX_PROBE + 1), "probe"),
        (COUPLED, Draft(0, 3, probe=2), "probe"),
        (SPLIT, Draft(0, 3, token_ids=(1,), draft_probs=(0.5,), step_limit=5), "step_limit"),
        (SPLIT, Draft(0, 3, token_ids=(1,), draft_probs=(0.5,), step_limit=-1), "step_limit"),
    ],
)
def test_drafts_that_can_never_be_right(mode: VerificationMode, draft: Draft, field: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        validation.check_draft(draft, CARD, mode)
    assert caught.value.field == f"draft.{field}"


rejection = functools.partial(
    make_rejection,
    token_ids=(4, 2),
    probs=(0.5, 0.25),
    tail_mass=0.25,
    tail_token_id=9,
    tail_prob=0.125,
)


def test_good_verdicts_pass() -> None:
    validation.check_verdict(
        Verdict(0, 3, num_accepted=2, token_ids=(1,), finish_reason=FinishReason.STOP),
        CARD,
        COUPLED,
    )
    validation.check_verdict(Verdict(0, 3, rejection=rejection()), CARD, SPLIT)
    truncated = rejection(probs=(0.75, 0.25), tail_mass=0.0, tail_prob=0.0)
    validation.check_verdict(Verdict(0, 3, rejection=truncated), CARD, SPLIT)


@pytest.mark.parametrize(
    ("mode", "verdict", "field"),
    [
        (SPLIT, Verdict(0, 3, token_ids=(WIDTH,)), "token_ids"),
        (SPLIT, Verdict(0, 99, num_accepted=2), "position"),
        (COUPLED, Verdict(0, 3, rejection=rejection()), "rejection"),
        (SPLIT, Verdict(0, 3, token_ids=(1,), rejection=rejection()), "rejection"),
        (SPLIT, Verdict(0, 3, rejection=rejection(), finish_reason=FinishReason.STOP), "rejection"),
        (SPLIT, Verdict(0, 3, rejection=rejection(token_ids=(4, WIDTH))), "rejection.token_ids"),
        (SPLIT, Verdict(0, 3, rejection=rejection(token_ids=(4, 4))), "rejection.token_ids"),
        (SPLIT, Verdict(0, 3, rejection=rejection(token_ids=(), probs=())), "rejection.token_ids"),
        (SPLIT, Verdict(0, 3, rejection=rejection(probs=(0.5,))), "rejection.probs"),
        (SPLIT, Verdict(0, 3, rejection=rejection(probs=(0.5, NAN))), "rejection.probs"),
        (SPLIT, Verdict(0, 3, rejection=rejection(probs=(1.5, -0.75))), "rejection.probs"),
        (SPLIT, Verdict(0, 3, rejection=rejection(probs=(0.5, 0.5))), "rejection.probs"),
        (SPLIT, Verdict(0, 3, rejection=rejection(tail_mass=NAN)), "rejection.tail_mass"),
        (SPLIT, Verdict(0, 3, rejection=rejection(tail_token_id=WIDTH)), "rejection.tail_token_id"),
        (SPLIT, Verdict(0, 3, rejection=rejection(tail_prob=0.0)), "rejection.tail_prob"),
        (SPLIT, Verdict(0, 3, rejection=rejection(tail_prob=NAN)), "rejection.tail_prob"),
    ],
)
def test_verdicts_that_can_never_be_right(
    mode: VerificationMode, verdict: Verdict, field: str
) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        validation.check_verdict(verdict, CARD, mode)
    assert caught.value.field == f"verdict.{field}"


@pytest.mark.parametrize(
    "opened",
    [
        make_opened(max_draft_tokens=0, window=8, sparse_k=4),
        make_opened(max_draft_tokens=4, window=0, sparse_k=4),
        make_opened(first_position=100, max_draft_tokens=4, window=8, sparse_k=4),
    ],
)
def test_openings_the_edge_refuses(opened: Opened) -> None:
    with pytest.raises(RemoteProtocolError):
        validation.check_opened(opened, CARD)


def test_model_cards() -> None:
    validation.check_card(CARD)
    for change in (
        {"logits_width": 0},
        {"max_model_len": 0},
        {"eos_token_ids": (WIDTH,)},
        {"limits": Limits(max_draft_tokens=0)},
        {"limits": Limits(max_window=0)},
    ):
        with pytest.raises(RemoteProtocolError):
            validation.check_card(dataclasses.replace(CARD, **change))
