"""The speculation service: a gRPC stream on one side, a session of the engine on the other.

One call runs two tasks. The reader takes frames from the edge, has `CloudSession` check them and
hands them to the engine; the writer takes the engine's events from the call's bounded queue and
sends them. Whatever ends the generation sets `Call.ended`; the handler waits for nothing else,
then cancels both tasks and has the engine abort the session.

The engine never sees a frame that `CloudSession` refused, nor an Open that waits for room in the
KV cache; the frames behind it wait in gRPC's buffers meanwhile.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from time import monotonic
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cloud_server.admission import AdmittedCalls
from cloud_server.calls import Call
from cloud_server.engine.interface import Prefilled, VerificationEngine
from cloud_server.kv_room import NoRoom
from cloud_server.metrics import CloudMetrics
from cloud_server.status import Context, abort
from picospec.errors import (
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
        calls: AdmittedCalls,
        metrics: CloudMetrics,
    ) -> None:
        self._engine = engine
        self._card = card
        self._calls = calls
        self._metrics = metrics
        self._model_response = codec.encode_model(card)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        try:
            self._calls.check_open()
        except PicoSpecError as error:
            await abort(context, error)
        return self._model_response

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Context
    ) -> None:
        try:
            call = self._calls.admit()
        except NoRoom as refusal:
            self._metrics.session_refused("no_room")
            self._metrics.no_room(refusal.reason)
            await abort(context, refusal)
        except CloudUnavailable as refusal:
            self._metrics.session_refused("refused")
            await abort(context, refusal)
        try:
            error = await self._serve(call, context)
            if error is not None:
                await abort(context, error)
        finally:
            self._calls.release(call)

    async def _serve(self, call: Call, context: Context) -> PicoSpecError | None:
        """Run the call to its end; returns what it failed with."""
        self._metrics.session_started()
        protocol = CloudSession(self._card)
        tasks = [
            asyncio.create_task(_guarded(call, self._read(call, protocol, context))),
            asyncio.create_task(_guarded(call, self._write(call, protocol, context))),
        ]
        try:
            # Shielded: cancelling this handler must not cancel the future that holds the outcome.
            return await asyncio.shield(call.ended)
        except asyncio.CancelledError:
            # The edge went away or cancelled, or the server stopped without grace.
            call.end("cancelled")
            raise
        finally:
            await _to_the_end(self._close(call, protocol, tasks))

    async def _close(
        self, call: Call, protocol: CloudSession, tasks: list[asyncio.Task[None]]
    ) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._engine.abort(call.key)
        except Exception:
            logger.exception("the engine did not abort a session", extra={"session": call.key})
        self._report(call, protocol)

    async def _read(self, call: Call, protocol: CloudSession, context: Context) -> None:
        """Frames of the edge, checked, to the engine."""
        decoder = codec.EdgeDecoder()
        while True:
            message = await _next_message(context)
            if message is None:
                # No frame will come any more. Verdicts may: they, or silence, end the call.
                if protocol.request is None:
                    # A call that is being cancelled looks like this, for a moment.
                    await asyncio.sleep(CANCELLATION_LAG_S)
                    raise RemoteOrderError("The stream ended before its Open", "open")
                return
            arrived_s = call.heard_s = monotonic()
            self._metrics.frame_received(message.ByteSize())
            match protocol.receive(decoder.decode(message)):
                case Draft() as draft:
                    await self._engine.deliver(call.key, draft, arrived_s)
                    self._metrics.draft_handled(monotonic() - arrived_s)
                case Open() as request:
                    await self._open(call, request)
                case Finish():
                    call.end("finished_by_edge")
                    return

    async def _open(self, call: Call, request: Open) -> None:
        call.request_id = request.session_id
        request_id.set(request.session_id)
        call.prefilling = True
        try:
            await self._calls.room.reserve(call.key, self._calls.room.needed(request))
        except NoRoom as refusal:
            self._metrics.no_room(refusal.reason)
            call.end("no_room", refusal)
            return
        except CloudUnavailable as refusal:
            call.end("refused", refusal)
            return
        logger.info(
            "generation opened",
            extra={
                "session": call.key,
                "mode": request.mode.value,
                "prompt_tokens": len(request.prompt_token_ids),
                "committed_tokens": len(request.output_token_ids),
                "max_tokens": request.max_tokens,
                "waited_s": round(monotonic() - call.started_s, 3),
            },
        )
        await self._engine.open(call.key, request, call.offer)

    async def _write(self, call: Call, protocol: CloudSession, context: Context) -> None:
        """Events of the engine to the edge, the last verdict included."""
        while True:
            event = await call.outbound.get()
            frame = self._opened(event, protocol) if isinstance(event, Prefilled) else event
            # Before it is on its way: the edge may answer faster than the write returns.
            protocol.send(frame)
            message = codec.encode_cloud(frame)
            try:
                await context.write(message)
            except (grpc.aio.InternalError, grpc.aio.UsageError):
                # How gRPC says that the edge has gone; the call is cancelled in a moment.
                call.end("cancelled")
                return
            now = call.heard_s = monotonic()
            self._metrics.frame_sent(message.ByteSize())
            if isinstance(frame, Opened):
                self._metrics.opened(frame)
                call.prefilling = False
                call.first_position = call.end_position = frame.first_position
                continue
            self._count(call, frame, now)
            if frame.finish_reason is not None:
                call.end(frame.finish_reason.value)
                return

    def _opened(self, prefilled: Prefilled, protocol: CloudSession) -> Opened:
        """What the engine reports, and the limits that hold for this generation."""
        assert protocol.request is not None
        limits = self._card.limits
        return Opened(
            first_position=prefilled.first_position,
            cached_prompt_tokens=prefilled.cached_prompt_tokens,
            max_draft_tokens=limits.max_draft_tokens,
            window=limits.max_window,
            sparse_k=protocol.request.sparse_k,
        )

    def _count(self, call: Call, verdict: Verdict, now: float) -> None:
        if call.num_verdicts == 0:
            self._metrics.first_token(now - call.started_s)
        else:
            self._metrics.between_verdicts(now - call.verdict_s)
        call.verdict_s = now
        call.num_verdicts += 1
        # What lies between two verdicts was recovered by the edge (split mode).
        num_recovered = verdict.position - call.end_position
        call.end_position = verdict.position + verdict.num_accepted + len(verdict.token_ids)
        self._metrics.verdict(verdict, num_recovered)

    def _report(self, call: Call, protocol: CloudSession) -> None:
        error = call.ended.result()
        self._metrics.session_ended(call.outcome, protocol.stale_tokens)
        if isinstance(error, RemoteProtocolError):
            self._metrics.protocol_error(error.field)
        request_id.set(call.request_id)
        logger.info(
            "generation ended",
            extra={
                "session": call.key,
                "outcome": call.outcome,
                "output_tokens": call.end_position - call.first_position,
                "verdicts": call.num_verdicts,
                "seconds": round(monotonic() - call.started_s, 3),
            }
            | ({"error": str(error)} if error is not None else {}),
        )


async def _guarded(call: Call, work: Coroutine[Any, Any, None]) -> None:
    """Whatever breaks `work` ends this call, and nothing else."""
    try:
        await work
    except RemoteProtocolError as error:
        call.end("protocol_error", error)
    except PicoSpecError as error:
        call.end("engine_error", error)
    except Exception:
        logger.exception("a call failed", extra={"session": call.key})
        call.end("internal_error", PicoSpecError("Internal error"))


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
