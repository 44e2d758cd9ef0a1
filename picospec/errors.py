"""Every failure the system names, as one tree that says who is at fault.

    PicoSpecError
    ├── RequestError        the caller's request is wrong; tell them which parameter
    ├── ConfigError         the operator's configuration is wrong; names key, value, allowed
    ├── ModelMismatch       drafter and target do not belong together
    ├── RemoteProtocolError the peer broke the protocol; its session alone ends
    ├── LocalProtocolError  our own code tried something illegal (a bug)
    ├── CloudUnavailable    the cloud cannot be reached; may be tried again
    ├── CapacityError       no room at present; may be tried again
    ├── DeadlineExceeded    a bounded wait is over
    ├── NumericalError      a model's logits do not define a probability distribution
    └── DrafterFailed       the drafter's process died or its backend failed

How a failure travels: as an HTTP status by `HTTP_STATUS`, as a gRPC status by the tables of
`picospec/protocol/errors.py`.
"""


class PicoSpecError(Exception):
    """Base of all named failures. `str(error)` is safe to show to whoever caused it."""


class RequestError(PicoSpecError):
    """A request that can never succeed. `param` is the request's field, None if none is."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModel(RequestError):
    """The model asked for is not the one served."""


class ConfigError(PicoSpecError):
    """A configuration value that is not allowed."""


class ModelMismatch(PicoSpecError):
    """Drafter and target differ in something that must be equal; the message says what."""


class ProtocolError(PicoSpecError):
    """Base of both sides' violations. `field` names the message's field at fault."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class RemoteProtocolError(ProtocolError):
    """A frame whose content can never be right (gRPC INVALID_ARGUMENT)."""


class RemoteOrderError(RemoteProtocolError):
    """A frame that is not allowed in this state (gRPC FAILED_PRECONDITION)."""


class LocalProtocolError(ProtocolError):
    """Our own side attempted an illegal transition."""


class Unauthenticated(PicoSpecError):
    """The credentials are missing or wrong."""


class CloudUnavailable(PicoSpecError):
    """The cloud could not be reached or went away; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CapacityError(PicoSpecError):
    """A bounded resource is used up at present."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NumericalError(PicoSpecError):
    """Logits from which no token can be drawn; only the session they belong to ends."""


class DeadlineExceeded(PicoSpecError):
    """The time allowed for something is used up."""


class DrafterFailed(PicoSpecError):
    """The drafter could not draft."""


# Looked up along the class's bases.
HTTP_STATUS: dict[type[PicoSpecError], int] = {
    UnknownModel: 404,
    RequestError: 400,
    Unauthenticated: 401,
    CapacityError: 503,
    CloudUnavailable: 503,
    ModelMismatch: 503,
    DrafterFailed: 503,
    DeadlineExceeded: 504,
    PicoSpecError: 500,
}


def http_status(error: PicoSpecError) -> int:
    """The HTTP status code for `error`."""
    return next(HTTP_STATUS[cls] for cls in type(error).__mro__ if cls in HTTP_STATUS)
