"""The HTTP surface: which path does what, and what every response has in common."""

import logging
import time

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_agent import metrics as prometheus
from edge_agent.api.admission import Admission
from edge_agent.api.answers import Json, encode
from edge_agent.api.completion import CHAT, TEXT, CompletionEndpoint
from edge_agent.api.errors import failure_of
from edge_agent.api.host import Host
from edge_agent.metrics import EdgeMetrics
from picospec.errors import PicoSpecError, UnknownModel
from picospec.logs import request_id as current_request_id

logger = logging.getLogger(__name__)


def create_app(
    host: Host, gate: Admission, metrics: EdgeMetrics, *, max_body_bytes: int
) -> ASGIApp:
    """The edge agent's API as an ASGI application."""
    pages = _Pages(host, gate, metrics)
    generating = [
        CompletionEndpoint(dialect, host, gate, metrics, max_body_bytes=max_body_bytes)
        for dialect in (CHAT, TEXT)
    ]
    routes = [
        Route("/v1/chat/completions", generating[0], methods=["POST"]),
        Route("/v1/completions", generating[1], methods=["POST"]),
        Route("/v1/models", pages.models, methods=["GET"]),
        Route("/v1/models/{model_id:path}", pages.model, methods=["GET"]),
        Route("/health", pages.health, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
    ]
    handlers = dict.fromkeys((HTTPException, PicoSpecError, Exception), _refuse)
    return RequestScope(Starlette(routes=routes, exception_handlers=handlers), gate)


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.detail in ("Not Found", "Method Not Allowed"):
        what = "does not exist" if error.status_code == 404 else "does not take this method"
        message = f"{request.method} {request.url.path[:200]} {what}."
        error = HTTPException(error.status_code, message, error.headers)
    return failure_of(error).response()


class _Pages:
    """The endpoints that generate nothing."""

    def __init__(self, host: Host, gate: Admission, metrics: EdgeMetrics) -> None:
        self._host = host
        self._gate = gate
        self._metrics = metrics

    async def models(self, request: Request) -> Response:
        self._gate.check_key(request.headers)
        return _json({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        self._gate.check_key(request.headers)
        description = self._describe()
        asked = request.path_params["model_id"]
        if asked != description["id"]:
            raise UnknownModel(
                f"The model {asked[:200]!r} does not exist.", "model", "model_not_found"
            )
        return _json(description)

    async def health(self, request: Request) -> Response:
        health = self._host.health()
        body = health.body(self._gate.active)
        if self._gate.closing:
            body |= {"status": "unavailable", "problem": "The server is shutting down."}
        return _json(body, 200 if health.ok and not self._gate.closing else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), media_type=prometheus.CONTENT_TYPE)

    def _describe(self) -> Json:
        card = self._host.card()
        return {
            "id": card.model_id,
            "object": "model",
            "created": 0,  # unknown, and the field must be there
            "owned_by": "picospec",
            "max_model_len": card.max_model_len,
        }


def _json(body: Json, status: int = 200) -> Response:
    return Response(encode(body), status, media_type="application/json")


class RequestScope:
    """Around every request: its id, its line in the log, and an answer to what nobody caught."""

    def __init__(self, app: ASGIApp, gate: Admission) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._gate.request_id(Headers(scope=scope)) as request_id:
            bound = current_request_id.set(request_id)
            try:
                await self._serve(scope, receive, send, request_id)
            finally:
                current_request_id.reset(bound)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started_s = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Starlette has answered with a 500 and passes on what nobody expected.
            logger.exception("the request failed in an unexpected way")
        finally:
            # Health checks and scrapes come every few seconds and say nothing.
            quiet = scope["path"] in ("/health", "/metrics")
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s",
                scope["method"],
                scope["path"][:200],
                extra={
                    "status": status,
                    "duration_ms": round(1e3 * (time.monotonic() - started_s), 1),
                },
            )
