"""What a server refuses, as exceptions."""

from typing import Any

from google.rpc import error_details_pb2, status_pb2

from headrace.scheduler.errors import HeadraceError

_DETAILS = "grpc-status-details-bin"


class ServerError(HeadraceError):
    """A call that failed. `code` is gRPC's, `reason` the server's own word for it, as over HTTP; `param` names
    the field that is wrong, `retry_after` is in seconds."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason
        self.param, self.retry_after = param, retry_after


class InvalidRequestError(ServerError):
    """A field is wrong; `param` says which."""


class AuthenticationError(ServerError):
    """The server wants an API key, or another one."""


class NotFoundError(ServerError):
    """There is no such model, or batch of this key."""


class RequestExistsError(ServerError):
    """A request of this request_id is running."""


class OverloadedError(ServerError):
    """Too much waits, or a time could not be kept: try again after `retry_after` seconds."""


class DeadlineError(ServerError):
    """A time has passed."""


class PreconditionError(ServerError):
    """A batch that has not ended has no results yet, or the server has no room for files."""


class AbortedError(ServerError):
    """The request was aborted by its request_id, or its call cancelled."""


class UnavailableError(ServerError):
    """The server cannot be reached, or takes no requests."""


_KINDS: dict[str, type[ServerError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": AuthenticationError,
    "NOT_FOUND": NotFoundError,
    "FAILED_PRECONDITION": PreconditionError,
    "ALREADY_EXISTS": RequestExistsError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "CANCELLED": AbortedError,
    "UNAVAILABLE": UnavailableError,
}


def server_error(error: Any, address: str) -> ServerError:
    """What a grpc.RpcError says."""
    code, message = error.code().name, error.details() or ""
    reason = param = retry_after = None
    for detail in _details(error):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason = info.reason.lower()
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            wrong = error_details_pb2.BadRequest()
            detail.Unpack(wrong)
            param = wrong.field_violations[0].field if wrong.field_violations else None
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    if reason is None:  # not of the server's own making
        message = f"{address}: {message or code}"
    is_large = (
        code == "RESOURCE_EXHAUSTED" and reason is None
    )  # gRPC's own limit: it is no use later
    kind = InvalidRequestError if is_large else _KINDS.get(code, ServerError)
    return kind(message, code=code, reason=reason, param=param, retry_after=retry_after)


def _details(error: Any) -> list[Any]:
    for name, value in error.trailing_metadata() or ():
        if name == _DETAILS:
            return list(status_pb2.Status.FromString(value).details)
    return []
