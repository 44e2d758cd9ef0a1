"""The drafter in a process of its own, seen from the event loop.

Why a process: a runtime's forward holds the GIL, so drafting in this one would stall every
answer at every token (docs/architecture.md). The rules of this file:
1. Nothing here blocks the event loop; what waits to be written is bounded.
2. A worker that dies is replaced, and every open context is rebuilt from its mirror
   (context.py) where its events left off. No chat is lost. A worker that finishes no turn for
   `turn_timeout_s` is hung, and killed: that is a death like any other.
3. Deaths are bounded: after more than RESTARTS_MAX within RESTART_WINDOW_S all contexts fail and
   new ones are refused, until a start succeeds; the next is tried after RETRY_AFTER_S.
4. Nobody has to wait for a drafter: contexts may be opened before one is loaded. `trouble` says why
   none drafts.
5. A context that fails is trouble until another drafts, for FAILURE_REST_S at most: then one may
   try again. A worker of which FAILURES_MAX fail in a row is replaced: devices break for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, cast

import edge_agent
from edge_agent.drafting.context import DraftContext, OnEvent
from edge_agent.drafting.ipc import Decoder, encode
from edge_agent.drafting.messages import (
    CloseContext,
    Command,
    ContextFailed,
    ContextSpec,
    DrafterSpec,
    LoadFailed,
    Ping,
    Ready,
)
from picospec.errors import CapacityError, DrafterFailed
from picospec.protocol.drafting import Drafted

RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
RETRY_AFTER_S = 60.0
BACKOFF_FIRST_S = 0.05  # doubles with each death in the window
EXIT_GRACE_S = 2.0  # from the end of the stream to SIGKILL
PENDING_BYTES_MAX = 16 << 20  # a worker that reads nothing for so long hangs
TURN_TIMEOUT_S = 15.0  # a turn is a token, or a bounded piece of a prompt
PINGS_PER_TIMEOUT = 4
FAILURE_REST_S = 10.0
FAILURES_MAX = 3

_NO_CONTEXT = 0  # contexts count from 1

logger = logging.getLogger(__name__)


class DraftingProcess:
    """A `context.Drafting` over a worker process. Use it from one event loop."""

    def __init__(
        self,
        spec: DrafterSpec,
        max_contexts: int = 64,
        load_timeout_s: float = 120.0,
        turn_timeout_s: float = TURN_TIMEOUT_S,
    ) -> None:
        self.restarts = 0
        self.logits_width = 0
        self.drafted_tokens = 0
        self.timed_tokens = 0
        self.drafting_s = 0.0
        self._spec = spec
        self._max_contexts = max_contexts
        self._load_timeout_s = load_timeout_s
        self._turn_timeout_s = turn_timeout_s
        self._unanswered_pings = 0
        self._contexts: dict[int, DraftContext] = {}
        self._opened = 0
        self._worker: _Worker | None = None  # loaded and connected
        self._supervisor: asyncio.Task[None] | None = None
        self._given_up = False
        self._absence = "it is loading"  # why there is no worker
        self._failure = ""  # why the last context failed, if no other has drafted since
        self._rests_until_s = 0.0  # after it
        self._num_failures = 0  # of this worker's contexts, in a row
        self._troubled_s = 0.0  # in all, but for ...
        self._trouble_since_s: float | None = None  # ... what is under way

    @property
    def alive(self) -> bool:
        return self._worker is not None

    @property
    def pid(self) -> int | None:
        return self._worker.pid if self._worker is not None else None

    @property
    def problem(self) -> str:
        """Why the watchdog is not to be fed: the worker is long due to be killed. Else ""."""
        hangs = self._unanswered_pings > 2 * PINGS_PER_TIMEOUT
        return "the drafter hangs and cannot be replaced" if hangs else ""

    @property
    def trouble(self) -> str:
        """Why nothing is drafted now; "" while the drafter works."""
        if self._worker is None:
            return f"The drafter is not running: {self._absence}."
        if self._unanswered_pings > 1:
            return "The drafter answers nothing."
        return self._failure if time.monotonic() < self._rests_until_s else ""

    @property
    def troubled_s(self) -> float:
        """Seconds without a drafter that works, since the start."""
        since_s = self._trouble_since_s
        return self._troubled_s + (0.0 if since_s is None else time.monotonic() - since_s)

    @property
    def open_contexts(self) -> int:
        return len(self._contexts)

    async def start(self) -> None:
        self.begin(await self._launch())

    def begin(self, worker: _Worker | None = None) -> None:
        """Keep a drafter alive from now on, beginning with `worker` or a new one. Does not wait."""
        self._supervisor = asyncio.create_task(self._supervise(worker), name="drafting")
        if worker is not None:
            self._attach(worker)
        self._note_trouble()

    async def stop(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervisor
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.end()

    def open(self, spec: ContextSpec, on_event: OnEvent, *, branch: int = 0) -> DraftContext:
        if self._supervisor is None or self._given_up:
            raise DrafterFailed("the drafter is not running")
        if len(self._contexts) >= self._max_contexts:
            raise CapacityError(f"all {self._max_contexts} drafting contexts are in use")
        self._opened += 1
        context = DraftContext(self._opened, spec, on_event, self._send, branch=branch)
        self._contexts[context.context_id] = context
        return context

    def _send(self, context_id: int, command: Command) -> None:
        if isinstance(command, CloseContext):
            self._contexts.pop(context_id, None)
        if self._worker is not None:  # else the mirror tells the next one
            self._worker.send((context_id, command))

    def _receive(self, message: Any) -> None:
        context_id, event, drafting_s = message
        if isinstance(event, ContextFailed):
            self._context_failed(event.error)
        elif isinstance(event, Drafted):
            if self._failure:
                self._context_worked()
            self.drafted_tokens += len(event.token_ids)
            if drafting_s:
                self.timed_tokens += len(event.token_ids)
                self.drafting_s += drafting_s
        context = self._contexts.get(context_id)
        if context is not None:
            context.deliver(event)

    def _context_failed(self, error: DrafterFailed) -> None:
        logger.error("a chat loses the drafter: %s", error)
        self._failure = f"A chat lost the drafter: {error}."
        self._rests_until_s = time.monotonic() + FAILURE_REST_S
        self._note_trouble()
        asyncio.get_running_loop().call_later(FAILURE_REST_S, self._note_trouble)
        self._num_failures += 1
        if self._num_failures >= FAILURES_MAX and self._worker is not None:
            logger.error("the drafter's worker %d is killed: all fails", self._worker.pid)
            self._worker.kill()

    def _context_worked(self) -> None:
        self._failure, self._rests_until_s, self._num_failures = "", 0.0, 0
        self._note_trouble()

    async def _supervise(self, worker: _Worker | None) -> None:
        """Replaces the worker whenever it dies, until cancelled."""
        deaths: deque[float] = deque()
        if worker is None:
            try:
                worker = await self._launch()
            except DrafterFailed as error:
                self._is_absent(str(error))
                worker = await self._replace(deaths)
            self._attach(worker)
        while True:
            await self._until_death(worker)
            self._worker = None
            status = await worker.end()
            self._is_absent(f"its worker died (status {status})")
            logger.warning("the drafter's worker %d died (status %s)", worker.pid, status)
            worker = await self._replace(deaths)
            self._attach(worker)

    def _is_absent(self, reason: str) -> None:
        self._absence = reason
        self._note_trouble()

    def _note_trouble(self) -> None:
        """Keep the account of time without a drafter that works."""
        now, since_s = time.monotonic(), self._trouble_since_s
        if self.trouble and since_s is None:
            self._trouble_since_s = now
        elif not self.trouble and since_s is not None:
            self._troubled_s += now - since_s
            self._trouble_since_s = None

    async def _until_death(self, worker: _Worker) -> None:
        """Returns when `worker` has died, of itself or for finishing no turn in its time."""
        self._unanswered_pings = 0
        while True:
            num_heard = worker.num_heard
            worker.send((_NO_CONTEXT, Ping()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._turn_timeout_s / PINGS_PER_TIMEOUT):
                    await worker.ended.wait()
                    return
            # Pings are counted, not seconds: when this process was stopped for long, the answer
            # may lie there unread.
            self._unanswered_pings += 1
            if worker.num_heard != num_heard:
                self._unanswered_pings = 0
            self._note_trouble()
            if not self._unanswered_pings:
                continue
            if self._unanswered_pings >= PINGS_PER_TIMEOUT:
                logger.error(
                    "the drafter's worker %d is killed: it has finished no turn for %g s",
                    worker.pid,
                    self._turn_timeout_s,
                )
                worker.kill()

    def _attach(self, worker: _Worker) -> None:
        """Makes a loaded worker the current one: every open context moves in."""
        self._worker = worker
        self._unanswered_pings = self._num_failures = 0
        self._note_trouble()
        worker.on_message = self._receive
        for context_id, context in self._contexts.items():
            for command in context.rebuild():
                worker.send((context_id, command))

    async def _replace(self, deaths: deque[float]) -> _Worker:
        """A new worker after the last one's death, within the budget."""
        while True:
            now = asyncio.get_running_loop().time()
            deaths.append(now)
            while deaths[0] < now - RESTART_WINDOW_S:
                deaths.popleft()
            if len(deaths) > RESTARTS_MAX:
                self._fail_all(f"the drafter died {len(deaths)} times in {RESTART_WINDOW_S:.0f} s")
                await asyncio.sleep(RETRY_AFTER_S)
                deaths.clear()
            else:
                await asyncio.sleep(BACKOFF_FIRST_S * 2.0 ** (len(deaths) - 1))
            try:
                worker = await self._launch()
            except DrafterFailed as error:
                logger.error("%s", error)
                self._is_absent(str(error))
                continue
            self.restarts += 1
            self._given_up = False
            return worker

    def _fail_all(self, reason: str) -> None:
        logger.error("%s; all chats lose it", reason)
        self._given_up = True
        for context in list(self._contexts.values()):
            context.deliver(ContextFailed(DrafterFailed(reason)))

    async def _launch(self) -> _Worker:
        """Starts a worker and waits until its drafter is loaded. Raises DrafterFailed."""
        worker = await _Worker.spawn()
        try:
            worker.send(self._spec)
            answer = await asyncio.wait_for(worker.first_message(), self._load_timeout_s)
            if not isinstance(answer, Ready):
                message = answer.message if isinstance(answer, LoadFailed) else "it died loading"
                raise DrafterFailed(f"the drafter did not start: {message}")
        except BaseException as error:
            await worker.end(grace_s=0.0)
            if isinstance(error, TimeoutError):
                raise DrafterFailed(
                    f"the drafter did not load within {self._load_timeout_s} s"
                ) from None
            raise
        self.logits_width = answer.logits_width
        logger.info("drafter %s loaded in worker %d", self._spec.backend, worker.pid)
        return worker


class _Worker(asyncio.Protocol):
    """One worker process and the stream to it."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.num_heard = 0  # times something came from it; it answers every Ping
        self.on_message = self._keep_first
        self._first: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process

    @classmethod
    async def spawn(cls) -> _Worker:
        """A new worker process, connected. Raises DrafterFailed if there can be none."""
        ours, theirs = socket.socketpair()
        self = cls()
        root = str(Path(edge_agent.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "edge_agent.drafting.worker_main",
                    str(theirs.fileno()),
                    str(os.getpid()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,  # a terminal's Ctrl-C is for us to handle
                )
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        except BaseException as error:  # cancellation too: the closed stream ends the process
            ours.close()
            if isinstance(error, OSError):
                raise DrafterFailed(f"cannot start the drafter's process: {error}") from error
            raise
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, which a stopped process hears, too."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def send(self, message: object) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(encode(message))
        if self._transport.get_write_buffer_size() > PENDING_BYTES_MAX:
            self._transport.abort()

    async def first_message(self) -> Any:
        """The worker's first message; None if it ends without one."""
        return await self._first

    async def end(self, grace_s: float = EXIT_GRACE_S) -> int | None:
        """Closes the stream, which ends the worker, or kills it; its exit status."""
        if self._transport is not None:
            self._transport.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        finally:
            if self._process.returncode is None:
                self.kill()
        return await self._process.wait()

    def _keep_first(self, message: Any) -> None:
        if not self._first.done():
            self._first.set_result(message)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.num_heard += 1
        for message in self._decoder.feed(data):
            try:
                self.on_message(message)
            except Exception:  # one chat's receiver must not stop the others'
                logger.exception("an event of the drafter was not taken")

    def connection_lost(self, _error: Exception | None) -> None:
        self.ended.set()
        self._keep_first(None)
