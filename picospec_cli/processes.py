"""Child processes that never outlive the command that started them."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """In a child, before its program starts: have the kernel end it when the parent dies.

    SIGTERM, so that a daemon can still stop its own children. Linux only; a no-op elsewhere.
    """
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
