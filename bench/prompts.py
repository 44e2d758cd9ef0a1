"""The prompts that benchmarks run: our own, or a data set's from a local file.

Ours are written for this project in the manner of GSM8K (arXiv:2110.14168), HumanEval
(arXiv:2107.03374) and everyday chats: what is measured needs no download and no licence.
"""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN = Path(__file__).parent / "data" / "prompts.jsonl"
HUMAN = frozenset({"human", "user"})  # ShareGPT's name of who asks, and that of later copies


class PromptFileError(ValueError):
    """A file that cannot be read as prompts; the message begins with `file:line: `.

    In a file that is one JSON list, a record's number stands for its line.
    """


@dataclass(frozen=True, slots=True)
class Prompt:
    """`kind` is math, code or chat for the formats known here; own files may say others."""

    id: str
    kind: str
    prompt: str


def own_prompts() -> list[Prompt]:
    """16 of each kind: math word problems, function heads with docstrings, chat questions."""
    return load(OWN)


def load(path: Path) -> list[Prompt]:
    """The prompts of `path`, in its order; gunzipped if it is named .gz.

    Each record may have the form of our own file, GSM8K, HumanEval or ShareGPT. A file is JSON
    lines, or a single JSON list as ShareGPT has it; of a conversation, the first question counts.

    Raises OSError, and PromptFileError for what is none of these, for two equal ids, and for a
    file without prompts.
    """
    prompts: list[Prompt] = []
    lines_by_id: dict[str, int] = {}
    for number, record in _records(path):
        try:
            prompt = _prompt(record, number)
        except ValueError as error:
            raise PromptFileError(f"{path}:{number}: {error}") from None
        if prompt is None:
            continue
        if (first := lines_by_id.setdefault(prompt.id, number)) != number:
            raise PromptFileError(f"{path}:{number}: id {prompt.id!r} is that of {first} too")
        prompts.append(prompt)
    if not prompts:
        raise PromptFileError(f"{path}:1: no prompts")
    return prompts


def sample(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` different prompts, kinds in turn: their numbers differ by one at most.

    Only where a kind has no more do the others fill up. The same arguments give the same list,
    and a larger count begins with the smaller one's. Raises ValueError if there are too few.
    """
    if not 0 <= count <= len(prompts):
        raise ValueError(f"count must be from 0 to {len(prompts)}, not {count}")
    by_kind: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_kind.setdefault(prompt.kind, []).append(prompt)
    rng = random.Random(seed)
    for group in by_kind.values():
        rng.shuffle(group)
    chosen: list[Prompt] = []
    while len(chosen) < count:
        for group in by_kind.values():
            if group and len(chosen) < count:
                chosen.append(group.pop())
    return chosen


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and JSON value; of a list, each item and its number from 1."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise PromptFileError(f"{path}:1: {error}") from None
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except json.JSONDecodeError as error:
            raise PromptFileError(f"{path}:{error.lineno}: {error.msg}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 in a string ends no line
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise PromptFileError(f"{path}:{number}: {error.msg}") from None


def _prompt(record: Any, number: int) -> Prompt | None:
    """None: a conversation in which nobody asks. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if "kind" in record:
        return Prompt(_text(record, "id"), _text(record, "kind"), _text(record, "prompt"))
    if "question" in record:
        return Prompt(f"gsm8k-{number}", "math", _text(record, "question"))
    if "task_id" in record:
        return Prompt(_text(record, "task_id"), "code", _text(record, "prompt"))
    if "conversations" in record:
        return _first_question(record, number)
    raise ValueError("has neither kind, question, task_id nor conversations")


def _first_question(record: dict[str, Any], number: int) -> Prompt | None:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise ValueError("conversations is not a list")
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn is not a JSON object")
        if turn.get("from", turn.get("role")) in HUMAN:
            text = _text(turn, "value" if "value" in turn else "content")
            return Prompt(f"sharegpt-{number}", "chat", text)
    return None


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is not a text, or empty")
    return value
