"""Conventions of the tests, read off the source."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from picospec.protocol import drafting, messages
from picospec.protocol.draft_queue import Work

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "tests").rglob("*.py"))
POSITIONAL_MAX = 2
VALUES = {
    name
    for module in (messages, drafting)
    for name, value in vars(module).items()
    if dataclasses.is_dataclass(value) and len(dataclasses.fields(value)) > POSITIONAL_MAX
} | {Work.__name__}
# What our code overrides in vLLM is private there, and pinned by this test.
PINS = "tests/integration/test_vllm_adapter.py"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_values_of_the_protocol_are_made_by_keyword(path: Path) -> None:
    riddles = [
        f"{node.func.id} in line {node.lineno}"
        for node in nodes(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in VALUES
        and len(node.args) > POSITIONAL_MAX
    ]
    assert riddles == []


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path) != PINS], ids=name)
def test_tests_read_no_private_attributes(path: Path) -> None:
    read = [
        f"{ast.unparse(node)} in line {node.lineno}"
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in ("_replace", "_asdict")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os"))
        and not isinstance(node.value, ast.Call)  # super()._method() of a double
    ]
    assert read == []
