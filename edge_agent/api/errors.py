"""Failures in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import json
import math
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    DrafterFailed,
    ModelMismatch,
    PicoSpecError,
    RequestError,
    Unauthenticated,
    http_status,
)


class ClientGone(Exception):
    """The client closed its connection; nobody is left to answer."""


_TYPES = {500: "server_error", 503: "service_unavailable", 504: "timeout"}
_CODES: dict[type[PicoSpecError], str] = {
    CloudUnavailable: "cloud_unavailable",
    ModelMismatch: "model_mismatch",
    CapacityError: "overloaded",
    DrafterFailed: "drafter_failed",
    Unauthenticated: "invalid_api_key",
}
_RETRY_AFTER_S = 5.0  # where the error does not say


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure as HTTP sees it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return Response(
            json.dumps(self.body(), ensure_ascii=False),
            self.status,
            dict(self.headers),
            "application/json",
        )


def failure_of(error: BaseException) -> Failure:
    """Whatever went wrong, for the client. What has no name shows none of its details."""
    if isinstance(error, HTTPException):
        headers = tuple((error.headers or {}).items())
        return Failure(error.status_code, error.detail, code=_code(error), headers=headers)
    if not isinstance(error, PicoSpecError):
        return Failure(500, "The server failed in an unexpected way.", code="internal_error")
    status = http_status(error)
    headers = ()
    if status == 503:
        retry_after_s = getattr(error, "retry_after_s", _RETRY_AFTER_S)
        headers = (("Retry-After", str(max(1, math.ceil(retry_after_s)))),)
    elif status == 401:
        headers = (("WWW-Authenticate", "Bearer"),)
    if isinstance(error, RequestError):
        return Failure(status, str(error), error.param, error.code, headers)
    code = next((_CODES[cls] for cls in type(error).__mro__ if cls in _CODES), None)
    return Failure(status, str(error), code=code, headers=headers)


def _code(error: HTTPException) -> str | None:
    return {404: "unknown_url", 405: "method_not_allowed", 413: "body_too_large"}.get(
        error.status_code
    )
