"""How failures cross the wire: the gRPC status of each, and what an edge makes of a status.

The failures themselves are one tree, in `picospec/errors.py`. Names are those of grpc.StatusCode,
which the core does not import.
"""

from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    ModelMismatch,
    PicoSpecError,
    RemoteOrderError,
    RemoteProtocolError,
    RequestError,
    Unauthenticated,
)

# Looked up along the class's bases.
GRPC_STATUS: dict[type[PicoSpecError], str] = {
    RemoteOrderError: "FAILED_PRECONDITION",
    RemoteProtocolError: "INVALID_ARGUMENT",
    RequestError: "INVALID_ARGUMENT",
    ModelMismatch: "FAILED_PRECONDITION",
    Unauthenticated: "UNAUTHENTICATED",
    CapacityError: "RESOURCE_EXHAUSTED",
    CloudUnavailable: "UNAVAILABLE",
    DeadlineExceeded: "DEADLINE_EXCEEDED",
    PicoSpecError: "INTERNAL",
}

# Statuses not listed (UNAVAILABLE, RST_STREAM's INTERNAL and CANCELLED ...) mean that the stream
# is lost for reasons of its own, and may be taken up again.
_OF_STATUS: dict[str, type[PicoSpecError]] = {
    "INVALID_ARGUMENT": RemoteProtocolError,
    "OUT_OF_RANGE": RemoteProtocolError,
    "FAILED_PRECONDITION": RemoteOrderError,
    "RESOURCE_EXHAUSTED": CapacityError,
    "DEADLINE_EXCEEDED": CloudUnavailable,
    # The operator's to mend, not the caller's.
    "UNAUTHENTICATED": ConfigError,
    "PERMISSION_DENIED": ConfigError,
    "UNIMPLEMENTED": ConfigError,
}


def status_of(error: PicoSpecError) -> str:
    """The name of the gRPC status that carries `error`."""
    return next(GRPC_STATUS[cls] for cls in type(error).__mro__ if cls in GRPC_STATUS)


RETRY_AFTER_DEFAULT_S, RETRY_AFTER_MAX_S = 1.0, 3600.0


def error_of_status(
    status: str, details: str, address: str, *, retry_after_s: float | None = None
) -> PicoSpecError:
    """The failure that a call to the cloud at `address` ended with.

    `retry_after_s` is the cloud's hint, if it gave one.
    """
    error_type = _OF_STATUS.get(status, CloudUnavailable)
    if retry_after_s is None:
        retry_after_s = RETRY_AFTER_DEFAULT_S
    retry_after_s = min(max(retry_after_s, 0.0), RETRY_AFTER_MAX_S)
    if error_type is CloudUnavailable:
        return CloudUnavailable(
            f"The cloud at {address} is not available: {details or status}", retry_after_s
        )
    if error_type is CapacityError:
        return CapacityError(details or status, retry_after_s)
    if error_type is ConfigError:
        return ConfigError(f"The cloud at {address} refuses this edge: {details or status}")
    return error_type(details or status)
