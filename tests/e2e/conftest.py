"""One cloud with the real target and an edge of each mode, shared by the whole session."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from picospec_cli import prepare
from picospec_cli.model_folder import model_home
from tests.support.daemons import Cloud, Daemons, Edge, until

HERE = Path(__file__).parent
TIMEOUT_S = 900  # a machine without models makes them first
DAEMONS = pytest.StashKey[Daemons]()
MODES = {
    "auto": ("--speculation.mode", "auto"),
    # The cloud waits, so that a seed says what the text is.
    "split": ("--speculation.mode", "split", "--speculation.assist", "never"),
    "coupled": ("--speculation.mode", "coupled"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the daemons' logs."""
    report = yield
    if report.failed and DAEMONS in item.config.stash:
        report.sections += item.config.stash[DAEMONS].tails()
    return report


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the prepared models."""
    prepare.prepare_pair(names=["draft-int4"])  # at once if they are there
    return model_home()


@pytest.fixture(scope="session")
def daemons(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemons]:
    with Daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        request.config.stash[DAEMONS] = daemons
        yield daemons


@pytest.fixture(scope="session")
def cloud(daemons: Daemons, models: Path) -> Cloud:
    return daemons.start_cloud("cloud", models / "target")


@pytest.fixture(scope="session")
def edges(daemons: Daemons, models: Path, cloud: Cloud) -> dict[str, Edge]:
    """By mode; ready to answer."""
    edges = {
        mode: daemons.start_edge(
            f"edge-{mode}", cloud,
            "--drafter.model", str(models / "draft-int4"), *flags,
        )
        for mode, flags in MODES.items()
    }  # fmt: skip
    for edge in edges.values():
        until(edge.is_healthy)
    return edges


@pytest.fixture(params=MODES)
def edge(request: pytest.FixtureRequest, edges: dict[str, Edge]) -> Edge:
    """The test runs in both modes."""
    edge: Edge = edges[request.param]
    return edge
