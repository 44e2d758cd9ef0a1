"""Whether a drafter and a target turn text into the same tokens, in 64 hex digits.

Two files may differ in bytes and still be one tokenizer: tools order keys differently, write
merges as "a b" or ["a", "b"], and leave out fields at their default. The fingerprint is the
SHA-256 of a form in which these differences are gone, and none that changes a token is.
"""

import hashlib
import json
from typing import Any

from picospec.errors import ConfigError

# What a program sets at run time; it does not say which tokens a text has.
_RUNTIME_KEYS = frozenset({"version", "truncation", "padding"})


def tokenizer_fingerprint(tokenizer_json: bytes) -> str:
    """SHA-256 hex of the canonical `tokenizer.json`. Raises ConfigError if it is not one."""
    try:
        document = json.loads(tokenizer_json)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ConfigError("tokenizer.json is not a tokenizer file")
    canonical = {key: value for key, value in document.items() if key not in _RUNTIME_KEYS}
    # In the model, and only there, a missing flag means false.
    model = {key: value for key, value in canonical["model"].items() if value is not False}
    if isinstance(model.get("merges"), list):
        model["merges"] = [
            merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]
        ]
    canonical["model"] = model
    text = json.dumps(_without_nulls(canonical), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def chat_template_fingerprint(template: str | None) -> str:
    """SHA-256 hex of the template with line ends unified; empty without a template."""
    if not template:
        return ""
    text = template.replace("\r\n", "\n").strip()
    return hashlib.sha256(text.encode()).hexdigest()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value
