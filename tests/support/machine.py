"""Which cores a test's cloud and edge compute on, and where the prepared models are."""

from __future__ import annotations

import socket
from pathlib import Path

from bench.machine import cloud_core, edge_core, pinned
from picospec_cli.model_folder import is_complete, model_home

__all__ = ["cloud_core", "edge_core", "free_port", "model_folder", "pinned"]


def model_folder(name: str) -> Path:
    """A prepared model; `make test` prepares them before it runs a test."""
    folder = model_home() / name
    assert is_complete(folder), f"{folder} is not there: run `picospec prepare`"
    return folder


def free_port() -> int:
    """One on loopback that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
