"""The two generating endpoints: one request from its first byte to its last."""

import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_agent.api.admission import Admission, Client, Ticket
from edge_agent.api.answers import Answer, ChatAnswer, TextAnswer, encode, usage
from edge_agent.api.errors import ClientGone, failure_of
from edge_agent.api.host import Host
from edge_agent.api.preparation import prepare
from edge_agent.api.schema import ChatBody, CompletionBody, TextBody, parse
from edge_agent.api.streaming import EventStream
from edge_agent.api.text import TextChunk, TextGeneration
from edge_agent.detokenizer import StopScanner
from edge_agent.metrics import EdgeMetrics
from picospec.errors import DeadlineExceeded, PicoSpecError
from picospec.logs import request_id as current_request_id
from picospec.protocol.messages import FinishReason, ModelCard

logger = logging.getLogger(__name__)

_PROMPT_TAIL = 16  # tokens of context for the first token's text


@dataclass(frozen=True, slots=True)
class Dialect:
    """What tells chat and text completions apart."""

    endpoint: str
    body: type[CompletionBody]
    answer: type[Answer]


CHAT = Dialect("chat_completions", ChatBody, ChatAnswer)
TEXT = Dialect("completions", TextBody, TextAnswer)


class CompletionEndpoint:
    """An ASGI application. A client that goes away at any moment cancels its generation."""

    def __init__(
        self,
        dialect: Dialect,
        host: Host,
        gate: Admission,
        metrics: EdgeMetrics,
        *,
        max_body_bytes: int,
    ) -> None:
        self._dialect = dialect
        self._host = host
        self._gate = gate
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.monotonic()
        headers = Headers(scope=scope)
        client = Client(receive, send)
        outcome = "cancelled"  # unless something else is known to have happened
        try:
            self._gate.check_key(headers)
            with self._gate.ticket() as ticket:
                body = await client.read_body(headers, ticket, self._max_body_bytes)
                work = self._answer(body, ticket, client.send, started_s)
                outcome = await client.while_connected(work)
        except ClientGone:
            logger.info("the client went away")
        except (PicoSpecError, HTTPException) as error:
            outcome = outcome_of(error)
            await failure_of(error).response()(scope, receive, send)
        except Exception:
            outcome = "error"
            raise
        finally:
            duration_s = time.monotonic() - started_s
            self._metrics.request_finished(self._dialect.endpoint, outcome, duration_s)

    async def _answer(self, raw: bytes, ticket: Ticket, send: Send, started_s: float) -> str:
        """Generates and sends; returns the outcome. Raises only before anything was sent."""
        body = parse(self._dialect.body, raw)
        card = self._host.card()
        async with ticket.in_time():
            request = await prepare(
                body, tokenizer=self._host.tokenizer, card=card, request_id=current_request_id.get()
            )
        tail = [int(token_id) for token_id in request.prompt_token_ids[-_PROMPT_TAIL:]]
        generation = TextGeneration(
            self._host.generator.generate(request),
            detokenizer=self._host.tokenizer.detokenizer(tail),
            stops=StopScanner(body.stop),
            stop_token_ids=request.stop_token_ids,
            metrics=self._metrics,
            started_s=started_s,
        )
        answer = self._dialect.answer(
            request.request_id,
            card.model_id,
            int(time.time()),
            system_fingerprint(card, generation.stats.mode),
        )
        try:
            chunks = aiter(generation)
            if body.stream:
                events = EventStream(send, answer, include_usage=body.include_usage)
                return await _stream(events, chunks, generation, ticket)
            return await _whole(answer, chunks, generation, ticket, send)
        finally:
            await generation.aclose()
            _log(generation)


async def _whole(
    answer: Answer,
    chunks: AsyncIterator[TextChunk],
    generation: TextGeneration,
    ticket: Ticket,
    send: Send,
) -> str:
    texts: list[str] = []
    finish_reason = FinishReason.STOP
    async with ticket.in_time():
        async for chunk in chunks:
            texts += chunk.deltas
            finish_reason = chunk.finish_reason or finish_reason
    counts = usage(generation.stats, generation.completion_tokens)
    content = encode(answer.whole("".join(texts), finish_reason, counts))
    response = Response(content, media_type="application/json")
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": content})
    return finish_reason.value


async def _stream(
    events: EventStream,
    chunks: AsyncIterator[TextChunk],
    generation: TextGeneration,
    ticket: Ticket,
) -> str:
    """The response is opened when the first chunk is there: until then an error has a status."""
    try:
        async with ticket.in_time():
            first = await anext(chunks)
            return (await events.run(first, chunks, generation)).value
    except Exception as error:
        if not events.started:
            raise
        if not isinstance(error, PicoSpecError):
            logger.exception("the answer broke off")
        else:
            logger.warning("the answer broke off: %s", error)
        await events.fail(error)
        return outcome_of(error)


def outcome_of(error: Exception) -> str:
    """The metrics' word for a failure."""
    if isinstance(error, DeadlineExceeded):
        return "timeout"
    status = failure_of(error).status
    if status < 500:
        return "rejected"
    return "unavailable" if status == 503 else "error"


def system_fingerprint(card: ModelCard, mode: str) -> str:
    """Equal while everything is equal that, with a seed, determines an answer of the target."""
    identity = [
        card.model_id,
        card.tokenizer_fingerprint,
        card.chat_template_fingerprint,
        card.protocol_version,
        mode,
    ]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return f"picospec-{mode or 'cloud'}-{digest[:12]}"


def _log(generation: TextGeneration) -> None:
    stats = generation.stats
    logger.info(
        "generation ended",
        extra={
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
            "verdicts": stats.verdicts,
            "resumes": stats.resumes,
        },
    )
