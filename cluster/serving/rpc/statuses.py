"""Errors as gRPC tells them: a status, with details of google.rpc."""

from dataclasses import dataclass

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

from headrace.cluster.serving.errors import ApiError

DETAILS = "grpc-status-details-bin"
"""The trailer that has the whole google.rpc.Status."""

DOMAIN = "headrace"

_SHOWN = 1000
"""Bytes of a message at most: it travels twice, and clients take no more than 8 KiB of trailers."""

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.ALREADY_EXISTS,
    412: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class Status:
    """What a call is aborted with."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, bytes], ...]


def status_of(error: ApiError) -> Status:
    code = _CODES[error.status]
    message = error.message.encode("utf-8", "backslashreplace")[:_SHOWN].decode("utf-8", "ignore")
    whole = status_pb2.Status(code=code.value[0], message=message)
    reason = (error.code or code_pb2.Code.Name(code.value[0])).upper()
    whole.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    if error.param is not None:
        wrong = error_details_pb2.BadRequest()
        field = error.param.encode("utf-8", "backslashreplace").decode()[:_SHOWN]
        wrong.field_violations.add(field=field, description=message)
        whole.details.add().Pack(wrong)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(error.retry_after)
        whole.details.add().Pack(retry)
    return Status(code, message, ((DETAILS, whole.SerializeToString()),))
