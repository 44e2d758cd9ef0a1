"""The protocol's state machines, both sides."""

from __future__ import annotations

from picospec.cloud_session import CloudSession
from picospec.draft_queue import DraftQueue, Work

__all__ = ["CloudSession", "DraftQueue", "Work"]
