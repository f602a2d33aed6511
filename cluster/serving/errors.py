"""Errors as OpenAI's API shapes them."""

from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from headrace.cluster.row_models import reasons
from headrace.scheduler.errors import ContextLengthError, RequestError

_SHOWN = 1000
"""Characters of what a client sent that it gets back at most."""


class Error(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: Error


class ApiError(Exception):
    """What a client is told, with an HTTP status. `retry_after` is in seconds; where it `is_final`,
    OpenAI's clients do not try again by themselves."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after
        self._is_final = is_final

    @property
    def body(self) -> dict[str, Any]:
        error = Error(message=self.message, type=self._kind, param=self.param, code=self.code)
        return ErrorAnswer(error=error).model_dump()

    @property
    def _kind(self) -> Literal["invalid_request_error", "rate_limit_error", "server_error"]:
        if self.status >= 500:
            return "server_error"
        return "rate_limit_error" if self.status == 429 else "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.status == 408:
            headers["Connection"] = "close"
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self._is_final:
            headers["X-Should-Retry"] = "false"
        return headers


def of_request(error: RequestError) -> ApiError:
    """What the batch jobs' checks found, for a client."""
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
    return ApiError(400, str(error), param=error.param, code="invalid_value")


def of_validation(error: ValidationError) -> ApiError:
    """What pydantic found, for a client; `param` is the first field that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    unknown = first["type"] == "extra_forbidden"
    code = "unknown_parameter" if unknown else "invalid_value"
    return ApiError(400, reasons(error)[:_SHOWN], param=param and param[:_SHOWN], code=code)
