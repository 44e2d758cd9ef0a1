"""The order of the whole run: quick tests first, those that start a real engine last.

No edge of a test keeps its estimates in the home of who runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of edge agents, in this process and below it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATE_DIRECTORY", str(tmp_path_factory.mktemp("state")))
        yield
