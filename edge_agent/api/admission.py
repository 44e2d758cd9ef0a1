"""Who is let in, for how long, and what is read of them: the bounds of one request."""

import asyncio
import hmac
import re
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Send

from edge_agent.api.errors import ClientGone
from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    DeadlineExceeded,
    PicoSpecError,
    Unauthenticated,
)

T = TypeVar("T")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BODY_TIMEOUT_S = 30.0  # a body that trickles in holds a place


class Ticket:
    """One admitted request: its deadline, which may be moved to now."""

    def __init__(self, timeout_s: float) -> None:
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._reason: PicoSpecError = DeadlineExceeded(f"The request took over {timeout_s:g} s.")
        self._scope: asyncio.Timeout | None = None

    @asynccontextmanager
    async def in_time(self, at_most_s: float | None = None) -> AsyncIterator[None]:
        """Raises DeadlineExceeded, or what `abort` said, once the time is up."""
        now = asyncio.get_running_loop().time()
        until_s = self._deadline_s if at_most_s is None else min(self._deadline_s, now + at_most_s)
        self._scope = scope = asyncio.timeout_at(until_s)
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            if asyncio.get_running_loop().time() < self._deadline_s:
                raise DeadlineExceeded(f"The body took over {at_most_s:g} s to arrive.") from None
            raise self._reason from None
        finally:
            self._scope = None

    def abort(self, reason: PicoSpecError) -> None:
        self._reason = reason
        self._deadline_s = asyncio.get_running_loop().time()
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(self._deadline_s)


class Admission:
    """Counts the requests that are being answered, and closes the door at shutdown."""

    def __init__(self, max_concurrent: int, timeout_s: float, api_key: str = "") -> None:
        self._max_concurrent = max_concurrent
        self._timeout_s = timeout_s
        self._api_key = api_key.encode()
        self._tickets: set[Ticket] = set()
        self._request_ids: set[str] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.closing = False

    @property
    def active(self) -> int:
        return len(self._tickets)

    @contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Raises CapacityError when all places are taken, CloudUnavailable at shutdown."""
        if self.closing:
            raise CloudUnavailable("The server is shutting down.")
        if len(self._tickets) >= self._max_concurrent:
            raise CapacityError(
                f"The server is answering {self._max_concurrent} requests, as many as it may."
            )
        ticket = Ticket(self._timeout_s)
        self._tickets.add(ticket)
        self._empty.clear()
        try:
            yield ticket
        finally:
            self._tickets.discard(ticket)
            if not self._tickets:
                self._empty.set()

    async def drained(self) -> None:
        """Returns once no request is being answered."""
        await self._empty.wait()

    def abort_all(self) -> None:
        """Ends every running request now; its client is told."""
        for ticket in self._tickets:
            ticket.abort(CloudUnavailable("The server is shutting down."))

    def check_key(self, headers: Headers) -> None:
        """Raises Unauthenticated unless the bearer token is the configured one."""
        if not self._api_key:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._api_key):
            raise Unauthenticated("The API key is missing or wrong.")

    @contextmanager
    def request_id(self, headers: Headers) -> Iterator[str]:
        """The client's X-Request-Id if it is one and unique at present, else one of ours."""
        given = headers.get("x-request-id", "")
        valid = _REQUEST_ID.fullmatch(given) and given not in self._request_ids
        request_id = given if valid else secrets.token_hex(12)
        self._request_ids.add(request_id)
        try:
            yield request_id
        finally:
            self._request_ids.discard(request_id)


class Client:
    """The other end of one exchange: reads the body, sends, and notices when it goes away."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._answered = False

    async def read_body(self, headers: Headers, ticket: Ticket, max_bytes: int) -> bytes:
        """Raises HTTPException 413 or 415, ClientGone, DeadlineExceeded."""
        # Also what keeps other sites' pages out: a browser asks before it sends this type.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "The body must be sent as Content-Type: application/json.")
        too_large = HTTPException(413, f"The body is larger than {max_bytes} bytes.")
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
            raise too_large
        parts: list[bytes] = []
        num_bytes = 0
        async with ticket.in_time(_BODY_TIMEOUT_S):
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                parts.append(part)
                num_bytes += len(part)
                if num_bytes > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._answered = True
        await self._send(message)

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`'s result; cancels it and raises ClientGone when the client goes away first."""
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            # The server also reports a disconnect at the end of every answer.
            if not task.done() and not self._answered:
                raise ClientGone
            return await task
        finally:
            for future in (task, watch):
                future.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
