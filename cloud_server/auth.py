"""Who may call: a shared bearer token, or nobody is asked.

The token guards the speculation service and reflection. Health stays open, as probes carry no
credentials and learn nothing from it.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from cloud_server.status import Context, abort
from picospec.errors import Unauthenticated

# As text: grpc's classes are generic in its stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"

_OPEN_PREFIX = "/grpc.health.v1.Health/"


class BearerAuth(grpc.aio.ServerInterceptor):
    """Lets a call through if its `authorization` metadata is `Bearer <token>`."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        if handler_call_details.method.startswith(_OPEN_PREFIX):
            return await continuation(handler_call_details)
        presented = dict(handler_call_details.invocation_metadata or ()).get("authorization")
        if presented is None:
            return _QUESTION
        # In constant time, so that the answer's delay tells nothing about the token.
        if hmac.compare_digest(str(presented).encode(), self._expected):
            return await continuation(handler_call_details)
        return _REFUSAL


class NoAuth(grpc.aio.ServerInterceptor):
    """Lets every call through: for a loopback or an otherwise guarded network."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        return await continuation(handler_call_details)


def interceptor(token: str) -> grpc.aio.ServerInterceptor:
    """The interceptor for the configured token; an empty one asks for nothing."""
    return BearerAuth(token) if token else NoAuth()


def _refusing(message: str) -> Handler:
    async def refuse(_request_iterator: Any, context: Context) -> None:
        await abort(context, Unauthenticated(message))

    # Stream to stream whatever was called: it runs before any request has arrived.
    return grpc.stream_stream_rpc_method_handler(refuse)


_QUESTION = _refusing("A bearer token is required in the `authorization` metadata")
_REFUSAL = _refusing("The bearer token is wrong")
