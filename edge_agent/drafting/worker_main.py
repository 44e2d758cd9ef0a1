"""The worker process: `python -m edge_agent.drafting.worker_main FD`.

FD is the inherited end of a socketpair. The first message in is the DrafterSpec; Ready or
LoadFailed answers it. Then (context id, command) come in and (context id, event, drafting_s) go
out; drafting_s is what a draft took, 0 where something else was computed with it. The process ends
with its parent: at the end of the stream, or at once by PR_SET_PDEATHSIG where there is that.
"""

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import time

from edge_agent.drafting import drafter
from edge_agent.drafting.ipc import WorkerChannel
from edge_agent.drafting.messages import DrafterSpec, DraftEvent, LoadFailed, Ping, Pong, Ready
from edge_agent.drafting.worker import DraftWorker
from picospec.errors import DrafterFailed
from picospec.protocol.drafting import Drafted

_PR_SET_PDEATHSIG = 1


def run(channel: WorkerChannel) -> None:
    """Load the drafter, then serve commands until the parent goes. Raises EOFError then."""
    [spec] = channel.receive(block=True)
    try:
        _pin(spec)
        loaded = drafter.load(spec)
    except DrafterFailed as error:
        channel.send(LoadFailed(str(error)))
        return
    # A full collection would walk the whole runtime, tens of ms, in the middle of a chat.
    gc.collect()
    gc.freeze()
    channel.send(Ready(loaded.logits_width))

    started_s = 0.0

    def emit(context_id: int, event: DraftEvent) -> None:
        is_timed = worker.shows_pace and isinstance(event, Drafted)
        channel.send((context_id, event, time.perf_counter() - started_s if is_timed else 0.0))

    worker = DraftWorker(loaded, emit)
    while True:
        for context_id, command in channel.receive(block=not worker.runnable):
            if isinstance(command, Ping):
                channel.send((context_id, Pong(), 0.0))
            else:
                worker.handle(context_id, command)
        started_s = time.perf_counter()
        worker.step()


def _pin(spec: DrafterSpec) -> None:
    if spec.cpu is None or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, {spec.cpu})
    except OSError as error:
        raise DrafterFailed(f"cannot pin the drafter to CPU {spec.cpu}: {error}") from error


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise EOFError


def main() -> None:
    fd, parent_pid = (int(argument) for argument in sys.argv[1:3])
    # The stream ends or breaks when the parent does: nothing is left to do or to tell.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _die_with_parent(parent_pid)
        with socket.socket(fileno=fd) as sock:
            run(WorkerChannel(sock))


if __name__ == "__main__":
    main()
