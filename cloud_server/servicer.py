"""The speculation service: a gRPC stream on one side, a session of the engine on the other.

One call runs two tasks. The reader takes frames from the edge, has `CloudSession` check them and
hands them to the engine; the writer takes the engine's events from the session's bounded queue
and sends them. Whatever ends the generation sets `Session.ended`; the call itself waits for
nothing else, then cancels both tasks and lets the engine forget the session.

The engine never sees a frame that `CloudSession` refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from time import monotonic
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cloud_server.calls import Session, SessionTable
from cloud_server.engine.interface import VerificationEngine
from cloud_server.metrics import CloudMetrics
from cloud_server.status import Context, abort
from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    PicoSpecError,
    RemoteOrderError,
    RemoteProtocolError,
)
from picospec.logs import request_id
from picospec.protocol import codec
from picospec.protocol.cloud_session import CloudSession
from picospec.protocol.messages import Draft, Finish, ModelCard, Open, Opened, Verdict
from picospec.v1 import speculation_pb2 as pb
from picospec.v1 import speculation_pb2_grpc

logger = logging.getLogger(__name__)

CANCELLATION_LAG_S = 0.1  # gRPC reports the end of the stream first; measured: below 1 ms


class SpeculationServicer(speculation_pb2_grpc.SpeculationServiceServicer):
    """`picospec.v1.SpeculationService` over a `VerificationEngine`."""

    def __init__(
        self,
        engine: VerificationEngine,
        card: ModelCard,
        sessions: SessionTable,
        metrics: CloudMetrics,
    ) -> None:
        self._engine = engine
        self._card = card
        self._sessions = sessions
        self._metrics = metrics
        self._model_response = codec.encode_model(card)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        try:
            self._sessions.check_open()
        except PicoSpecError as error:
            await abort(context, error)
        return self._model_response

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Context
    ) -> None:
        try:
            session = self._sessions.admit()
        except (CapacityError, CloudUnavailable) as refusal:
            self._metrics.session_refused(
                "no_room" if isinstance(refusal, CapacityError) else "refused"
            )
            await abort(context, refusal)
        try:
            error = await self._serve(session, context)
            if error is not None:
                await abort(context, error)
        finally:
            self._sessions.release(session)

    async def _serve(self, session: Session, context: Context) -> PicoSpecError | None:
        """Run the session to its end; returns what it failed with."""
        self._metrics.session_started()
        protocol = CloudSession(self._card)
        tasks = [
            asyncio.create_task(_guarded(session, self._read(session, protocol, context))),
            asyncio.create_task(_guarded(session, self._write(session, protocol, context))),
        ]
        try:
            # Shielded: cancelling this call must not take the outcome from the session.
            return await asyncio.shield(session.ended)
        except asyncio.CancelledError:
            # The edge went away or cancelled, or the server stopped without grace.
            session.end("cancelled")
            raise
        finally:
            await _to_the_end(self._close(session, protocol, tasks))

    async def _close(
        self, session: Session, protocol: CloudSession, tasks: list[asyncio.Task[None]]
    ) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._engine.abort(session.key)
        except Exception:
            logger.exception("the engine did not abort a session", extra={"session": session.key})
        self._report(session, protocol)

    async def _read(self, session: Session, protocol: CloudSession, context: Context) -> None:
        """Frames of the edge, checked, to the engine."""
        decoder = codec.EdgeDecoder()
        while True:
            message = await _next_message(context)
            if message is None:
                # No frame will come any more. Verdicts may: they, or silence, end the session.
                if protocol.request is None:
                    # A call that is being cancelled looks like this, for a moment.
                    await asyncio.sleep(CANCELLATION_LAG_S)
                    raise RemoteOrderError("The stream ended before its Open", "open")
                return
            arrived_s = session.heard_s = monotonic()
            self._metrics.frame_received(message.ByteSize())
            match protocol.receive(decoder.decode(message)):
                case Draft() as draft:
                    await self._engine.deliver(session.key, draft, arrived_s)
                    self._metrics.draft_handled(monotonic() - arrived_s)
                case Open() as request:
                    await self._open(session, request)
                case Finish():
                    session.end("finished_by_edge")
                    return

    async def _open(self, session: Session, request: Open) -> None:
        session.request_id = request.session_id
        request_id.set(request.session_id)
        session.prefilling = True
        logger.info(
            "generation opened",
            extra={
                "session": session.key,
                "mode": request.mode.value,
                "prompt_tokens": len(request.prompt_token_ids),
                "committed_tokens": len(request.output_token_ids),
                "max_tokens": request.max_tokens,
            },
        )
        await self._engine.open(session.key, request, session.offer)

    async def _write(self, session: Session, protocol: CloudSession, context: Context) -> None:
        """Events of the engine to the edge, the last verdict included."""
        while True:
            event = await session.outbound.get()
            if isinstance(event, Opened):
                # `protocol` keeps the window, so its size is not the engine's to know.
                event = replace(event, window=self._card.limits.max_window)
            # Before it is on its way: the edge may answer faster than the write returns.
            protocol.send(event)
            message = codec.encode_cloud(event)
            try:
                await context.write(message)
            except (grpc.aio.InternalError, grpc.aio.UsageError):
                # How gRPC says that the edge has gone; the call is cancelled in a moment.
                session.end("cancelled")
                return
            now = session.heard_s = monotonic()
            self._metrics.frame_sent(message.ByteSize())
            if isinstance(event, Opened):
                self._metrics.opened(event)
                session.prefilling = False
                session.first_position = session.end_position = event.first_position
                continue
            self._count(session, event, now)
            if event.finish_reason is not None:
                session.end(event.finish_reason.value)
                return

    def _count(self, session: Session, verdict: Verdict, now: float) -> None:
        if session.num_verdicts == 0:
            self._metrics.first_token(now - session.started_s)
        else:
            self._metrics.between_verdicts(now - session.verdict_s)
        session.verdict_s = now
        session.num_verdicts += 1
        # What lies between two verdicts was recovered by the edge (split mode).
        num_recovered = verdict.position - session.end_position
        session.end_position = verdict.position + verdict.num_accepted + len(verdict.token_ids)
        self._metrics.verdict(verdict, num_recovered)

    def _report(self, session: Session, protocol: CloudSession) -> None:
        error = session.ended.result()
        self._metrics.session_ended(session.outcome, protocol.stale_tokens)
        if isinstance(error, RemoteProtocolError):
            self._metrics.protocol_error(error.field)
        request_id.set(session.request_id)
        logger.info(
            "generation ended",
            extra={
                "session": session.key,
                "outcome": session.outcome,
                "output_tokens": session.end_position - session.first_position,
                "verdicts": session.num_verdicts,
                "seconds": round(monotonic() - session.started_s, 3),
            }
            | ({"error": str(error)} if error is not None else {}),
        )


async def _guarded(session: Session, work: Coroutine[Any, Any, None]) -> None:
    """Whatever breaks `work` ends the session, and nothing but the session."""
    try:
        await work
    except RemoteProtocolError as error:
        session.end("protocol_error", error)
    except PicoSpecError as error:
        session.end("engine_error", error)
    except Exception:
        logger.exception("a session failed", extra={"session": session.key})
        session.end("internal_error", PicoSpecError("Internal error"))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` even when cancelled (again) meanwhile; the cancellation follows it."""
    task = asyncio.create_task(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        raise cancellation


async def _next_message(context: Context) -> pb.GenerateRequest | None:
    """The edge's next message; None when it has sent its last."""
    try:
        message = await context.read()
    except DecodeError:
        raise RemoteProtocolError("The message cannot be parsed", "frame") from None
    return None if message is grpc.aio.EOF else message
