"""Whatever is sent, parsing ends in a checked body or in a RequestError."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.api.preparation import sampling_params
from edge_agent.api.schema import HARMLESS, UNSUPPORTED, ChatBody, TextBody, parse
from picospec.errors import RequestError
from picospec.protocol.validation import check_sampling
from tests.support.edge_api import CARD

FIELDS = sorted({*ChatBody.model_fields, *TextBody.model_fields, *HARMLESS, *UNSUPPORTED})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=6) | JSON)
def test_any_json(value: Any) -> None:
    good = {"model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    for body_type in (ChatBody, TextBody):
        for sent in (value, good | value if isinstance(value, dict) else value):
            with contextlib.suppress(RequestError):
                parse(body_type, json.dumps(sent).encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse(ChatBody, raw)


NUMBER = st.floats(0, 1) | st.floats() | st.sampled_from([1e-46, 1e39, math.nextafter(1, 2)])


@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(
                ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"), NUMBER
            ),
            "top_k": st.integers(-1, 2**32),
            "seed": st.integers(-(2**64), 2**65),
        },
    )
)
def test_what_is_accepted_here_the_cloud_accepts(fields: dict[str, Any]) -> None:
    raw = json.dumps({"model": CARD.model_id, "prompt": "x"} | fields).encode()
    with contextlib.suppress(RequestError):
        body = parse(TextBody, raw)
        check_sampling(sampling_params(body, CARD), CARD.logits_width)
