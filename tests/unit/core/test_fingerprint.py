"""Fingerprints: equal for every spelling of one tokenizer, different for different ones."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from picospec.errors import ConfigError
from picospec.protocol.fingerprint import chat_template_fingerprint, tokenizer_fingerprint

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "added_tokens": [{"id": 0, "content": "<s>", "special": True, "normalized": False}],
    "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
}


def fingerprint(document: Any) -> str:
    return tokenizer_fingerprint(json.dumps(document).encode())


def changed(path: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(TOKENIZER)
    *parents, last = path.split(".")
    target = document
    for name in parents:
        target = target[name]
    target[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("truncation", {"max_length": 512}),
        ("padding", None),
        ("model.merges", [["a", "b"]]),
        ("model.vocab", {"ab": 3, "b": 2, "a": 1}),
        ("model.dropout", None),
        ("model.byte_fallback", False),
    ],
)
def test_another_spelling_of_the_same_tokenizer(path: str, value: Any) -> None:
    assert fingerprint(changed(path, value)) == fingerprint(TOKENIZER)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("added_tokens", []),
        ("pre_tokenizer.use_regex", False),
        ("model.merges", []),
        ("model.vocab", {"a": 1, "b": 2, "ab": 4}),
        ("model.byte_fallback", True),
    ],
)
def test_another_tokenizer(path: str, value: Any) -> None:
    assert fingerprint(changed(path, value)) != fingerprint(TOKENIZER)


def test_whitespace_and_key_order_do_not_count() -> None:
    spaced = json.dumps(dict(reversed(TOKENIZER.items())), indent=2).encode()
    assert tokenizer_fingerprint(spaced) == fingerprint(TOKENIZER)
    assert len(fingerprint(TOKENIZER)) == 64


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model": 1}', b"\xff", b"[" * 100_000])
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError):
        tokenizer_fingerprint(content)


def test_chat_templates() -> None:
    assert chat_template_fingerprint(None) == ""
    assert chat_template_fingerprint("a\r\nb\n") == chat_template_fingerprint("a\nb")
    assert chat_template_fingerprint("a") != chat_template_fingerprint("b")
