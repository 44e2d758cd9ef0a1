"""Which cores a test's cloud and edge compute on, and where the prepared models are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from picospec_cli.model_folder import is_complete, model_home


def cloud_core() -> int:
    """The core for the cloud's engine."""
    return min(os.sched_getaffinity(0))


def edge_core() -> int:
    """The core for the edge; the cloud's where there is only one."""
    return max(os.sched_getaffinity(0))


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Processes started meanwhile stay on `core`: two thread pools on the same two cores make
    each other wait at every barrier."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def model_folder(name: str) -> Path:
    """A prepared model; `make test` prepares them before it runs a test."""
    folder = model_home() / name
    assert is_complete(folder), f"{folder} is not there: run `picospec prepare`"
    return folder
