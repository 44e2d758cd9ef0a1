"""The order of the whole run: quick tests first, those that start a real engine last."""

from __future__ import annotations

from pathlib import Path

import pytest

ORDER = ("unit", "sim", "integration", "e2e", "deploy")
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)  # stable: a file's tests keep their order


def _rank(item: pytest.Item) -> tuple[int, int]:
    folder = item.path.relative_to(TESTS).parts[0]
    slow = any(item.get_closest_marker(name) for name in ("engine", "slow"))
    return ORDER.index(folder) if folder in ORDER else len(ORDER), int(slow)
