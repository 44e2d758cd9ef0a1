"""Failures as gRPC statuses with rich details (google.rpc.Status)."""

import asyncio
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from picospec.errors import (
    CapacityError,
    CloudUnavailable,
    PicoSpecError,
    RemoteProtocolError,
    RequestError,
)
from picospec.protocol.errors import status_of

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# Sending a status waits behind the frames that the peer has not read. A peer that reads nothing
# does not get to keep the call: after this wait it is dropped.
STATUS_TIMEOUT_S = 5.0


def to_status(error: PicoSpecError) -> status_pb2.Status:
    """`error` with BadRequest (which field) or RetryInfo (when to try again)."""
    code = grpc.StatusCode[status_of(error)].value[0]
    status = status_pb2.Status(code=code, message=str(error))
    for detail in _details(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: Context, error: PicoSpecError) -> NoReturn:
    """End the call with `error`'s status. Always raises."""
    sending = context.abort_with_status(rpc_status.to_status(to_status(error)))
    async with asyncio.timeout(STATUS_TIMEOUT_S):
        await sending
    raise AssertionError("abort_with_status returned")


def _details(error: PicoSpecError) -> list[message.Message]:
    match error:
        case RemoteProtocolError(field=str(field)) | RequestError(param=str(field)) if field:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=field, description=str(error)
            )
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case CapacityError(retry_after_s=seconds) | CloudUnavailable(retry_after_s=seconds):
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(seconds * 1e9))
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
    return []
