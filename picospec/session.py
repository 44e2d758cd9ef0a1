"""The protocol's state machines (docs/protocol.md), sans I/O.

- `EdgeSession` (edge_session.py): the edge's side of a generation;
- `CloudSession` (cloud_session.py): the order of frames on one stream, in the gRPC process;
- `DraftQueue` (draft_queue.py): the drafts that wait for their verdict, in the engine.
"""

from __future__ import annotations

from picospec.cloud_session import CloudSession
from picospec.draft_queue import DraftQueue, Work
from picospec.edge_machine import (
    Allow,
    Commit,
    Effect,
    Finished,
    Recover,
    Rollback,
    Send,
    SpeculationPolicy,
)
from picospec.edge_session import EdgeSession

__all__ = [
    "Allow",
    "CloudSession",
    "Commit",
    "DraftQueue",
    "EdgeSession",
    "Effect",
    "Finished",
    "Recover",
    "Rollback",
    "Send",
    "SpeculationPolicy",
    "Work",
]
