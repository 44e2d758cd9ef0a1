"""The benchmarks' prompts: our own, those of data sets' files, and samples of them."""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.prompts import Prompt, PromptFileError, load, own_prompts, sample


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_our_own_prompts_are_enough_of_each_kind_and_all_different() -> None:
    prompts = own_prompts()
    kinds = Counter(prompt.kind for prompt in prompts)
    assert set(kinds) == {"math", "code", "chat"}
    assert min(kinds.values()) >= 16
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize(
    "prompt", [prompt for prompt in own_prompts() if prompt.kind == "code"], ids=lambda p: p.id
)
def test_our_function_heads_are_python_with_an_example(prompt: Prompt) -> None:
    assert prompt.prompt.endswith('"""\n')
    function = ast.parse(prompt.prompt).body[-1]
    assert isinstance(function, ast.FunctionDef)
    assert function.name in prompt.id
    docstring = ast.get_docstring(function)
    assert docstring is not None
    assert f"{function.name}(" in docstring
    assert ">>> " in docstring


def test_gsm8k_and_humaneval(tmp_path: Path) -> None:
    gsm8k = write(tmp_path / "a.jsonl", {"question": "2 + 2?", "answer": "#### 4"})
    assert load(gsm8k) == [Prompt("gsm8k-1", "math", prompt="2 + 2?")]
    task = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "", "entry_point": "f"}
    humaneval = write(tmp_path / "b.jsonl", task)
    assert load(humaneval) == [Prompt("HumanEval/0", "code", prompt="def f():\n")]


@pytest.mark.parametrize("as_list", [True, False])
def test_sharegpt_gives_the_first_question(tmp_path: Path, as_list: bool) -> None:
    records = [
        {
            "id": "x",
            "conversations": [
                {"from": "gpt", "value": "Welcome"},
                {"from": "human", "value": "Why?"},
                {"from": "human", "value": "And how?"},
            ],
        },
        {"conversations": []},
        {"conversations": [{"role": "user", "content": "When?"}]},
    ]
    path = write(tmp_path / "chats.json", *([records] if as_list else records))
    assert load(path) == [
        Prompt("sharegpt-1", "chat", prompt="Why?"),
        Prompt("sharegpt-3", "chat", prompt="When?"),
    ]


def test_gzip_blank_lines_and_other_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('\n{"question": "a\u2028b"}\n\n{"question": "ä"}\n')
    assert [prompt.prompt for prompt in load(path)] == ["a\u2028b", "ä"]
    assert [prompt.id for prompt in load(path)] == ["gsm8k-2", "gsm8k-4"]


GOOD = '{"question": "a"}\n'


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "no prompts"),
        ("[]", 1, "no prompts"),
        (GOOD + "{", 2, "Expecting"),
        ('[\n{"question": "a"},\n}]', 3, "Expecting"),
        (GOOD + "5", 2, "not a JSON object"),
        (GOOD + "{}", 2, "neither kind"),
        ('{"question": 5}', 1, "question is not a text"),
        ('{"question": " "}', 1, "or empty"),
        ('{"task_id": "a"}', 1, "prompt is not a text"),
        ('{"conversations": 5}', 1, "not a list"),
        ('{"conversations": [5]}', 1, "a turn"),
        ('{"kind": "chat", "prompt": "a"}', 1, "id is not a text"),
        ('{"task_id": "a", "prompt": "b"}\n' * 2, 2, "id 'a' is that of 1"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(PromptFileError, match=re.escape(f"{path}:{line}: ") + f".*{reason}"):
        load(path)


def test_what_is_no_text_is_told(tmp_path: Path) -> None:
    for name, data in (
        ("a.jsonl.gz", b"plain"),
        ("b.jsonl", b"\xff\xfe"),
        ("c.jsonl.gz", gzip.compress(b"x" * 1000)[:-9]),
        ("d.jsonl.gz", gzip.compress(b"x" * 1000)[:10] + b"\xff" * 20),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PromptFileError, match=f"{name}:1: "):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.jsonl")


def test_samples_are_balanced_and_fixed_by_their_seed() -> None:
    prompts = own_prompts()
    for count in (0, 1, 7, 48):
        chosen = sample(prompts, count, seed=4)
        assert len(set(chosen)) == count
        kinds = Counter(prompt.kind for prompt in chosen)
        assert count < 3 or max(kinds.values()) - min(kinds.values()) <= 1
        assert chosen == sample(prompts, 48, seed=4)[:count]
    assert sample(prompts, 7, seed=4) != sample(prompts, 7, seed=5)
    assert prompts == own_prompts()


def test_a_scarce_kind_is_used_up_and_too_many_are_refused() -> None:
    prompts = [
        Prompt("a", "math", prompt="a"),
        *(Prompt(str(n), "chat", prompt=str(n)) for n in range(5)),
    ]
    assert Counter(prompt.kind for prompt in sample(prompts, 4, 1)) == {"math": 1, "chat": 3}
    for count in (7, -1):
        with pytest.raises(ValueError, match="from 0 to 6"):
            sample(prompts, count, 1)
