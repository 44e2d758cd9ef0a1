"""Prompt lookup against the obvious implementation."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.drafting import drafter
from edge_agent.drafting.messages import ContextSpec, DrafterSpec
from edge_agent.drafting.ngram import MATCH_MAX, MATCH_MIN, lookup
from picospec.protocol.messages import SamplingParams, VerificationMode


def brute_force(text: list[int]) -> int | None:
    for length in range(MATCH_MAX, MATCH_MIN - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:] and length < len(text):
                return text[start + length]
    return None


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_lookup_takes_the_most_recent_of_the_longest_matches(text):
    assert lookup(np.array(text, np.int32)) == brute_force(text)


def test_law_is_certain_of_the_token_and_none_without_a_match():
    ngram = drafter.load(DrafterSpec("ngram", ""))
    spec = ContextSpec(
        "r", np.array([1, 2, 3, 1, 2]), SamplingParams(), VerificationMode.SPLIT, (), 5
    )
    context = ngram.open(spec)
    law = context.propose()
    assert law is not None
    assert law.prob(3) == 1.0
    context.rollback(5, (9,))
    assert context.propose() is None
