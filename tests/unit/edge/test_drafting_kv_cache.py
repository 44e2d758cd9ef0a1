"""The book-keeping of a partly speculative text, against a plain list."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.drafting import drafter, kv_cache, ngram
from edge_agent.drafting.kv_cache import SpeculativeKVCache, SpeculativeTokens


@pytest.mark.parametrize("module", [kv_cache, drafter, ngram])
def test_worked_examples_hold(module):
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.lists(
        st.one_of(
            st.integers(0, 3),  # append
            st.tuples(st.integers(0, 12), st.lists(st.integers(0, 3), max_size=4)),  # rollback
            st.just("compute"),
        ),
        max_size=30,
    ),
)
def test_cache_never_holds_what_the_text_does_not(initial, operations):
    cache = SpeculativeKVCache(initial)
    text, computed, committed = list(initial), [], len(initial)
    for operation in operations:
        if operation == "compute":
            computed = list(text)
            cache.computed(len(cache.uncomputed))
        elif isinstance(operation, int):
            text.append(operation)
            cache.append(operation)
        else:
            length, token_ids = operation
            if not committed <= length <= len(text):
                with pytest.raises(ValueError, match="cannot roll back"):
                    cache.rollback(length, token_ids)
                continue
            cache.rollback(length, token_ids)
            text = text[:length] + token_ids
            committed = len(text)
        assert cache.token_ids.tolist() == text
        assert cache.num_committed == committed
        assert cache.token_ids[: cache.num_computed].tolist() == computed[: cache.num_computed]
        assert cache.uncomputed.tolist() == text[cache.num_computed :]


def test_rollback_that_repeats_what_was_there_keeps_what_was_computed():
    cache = SpeculativeKVCache([1, 2])
    for token_id in (3, 4, 5):
        cache.append(token_id)
    cache.computed(5)
    assert cache.rollback(2, (3, 4)) == 4
    assert cache.num_computed == 4
    assert cache.token_ids.tolist() == [1, 2, 3, 4]


def test_text_grows_without_bound():
    tokens = SpeculativeTokens(np.arange(3))
    for token_id in range(3, 5000):
        tokens.append(token_id)
    assert tokens.token_ids.tolist() == list(range(5000))
    assert tokens.num_committed == 3
