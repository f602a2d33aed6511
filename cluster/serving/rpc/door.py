"""Who is let in, before a request's message is read, and how calls end."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio
from pydantic import ValidationError

from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.guard import Gate
from headrace.cluster.serving.http import api_error
from headrace.cluster.serving.keys import ApiKey
from headrace.cluster.serving.metrics import Metrics
from headrace.cluster.serving.rpc.statuses import status_of
from headrace.scheduler.errors import RequestError

log = logging.getLogger(__name__)

OURS = "/headrace.v1."

OPEN = "/grpc.health.v1.Health/"
"""What needs no key."""


class Door(aio.ServerInterceptor):  # type: ignore[misc]
    """Has each call show its key, that of a method that is not there, too."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate, self._metrics = gate, metrics

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        details = handler_call_details
        if not details.method.startswith(OPEN):
            try:
                self._gate.check(authorization(details.invocation_metadata))
            except ApiError as error:
                self._metrics.answered("grpc", status_of(error).code.name)
                return _refusing(error)
        handler = await continuation(details)
        if handler is None:
            return None
        method = details.method
        return _lenient(handler) if method.startswith(OURS) else _checking(handler, method)

    def key(self, context: Any) -> ApiKey | None:
        """Of a call that was let in."""
        return self._gate.check(authorization(context.invocation_metadata()))

    @asynccontextmanager
    async def call(self, context: Any, method: str, request: object) -> AsyncIterator[None]:
        """Ends a call with what was raised in it, and counts it."""
        code = grpc.StatusCode.CANCELLED.name
        try:
            try:
                if request is None:
                    raise unreadable(method)
                yield
                code = grpc.StatusCode.OK.name
            except (ApiError, RequestError, ValidationError) as error:
                status = status_of(api_error(error))
            except (asyncio.CancelledError, aio.BaseError):
                raise
            except Exception:
                log.exception("%s failed", method)
                status = status_of(ApiError(500, "the server failed at this request"))
            else:
                return
            code = status.code.name
            await context.abort(status.code, status.message, status.trailers)
        finally:
            self._metrics.answered(method, code)


def unreadable(method: str) -> ApiError:
    return ApiError(400, f"this is no message of {method}", code="invalid_value")


def authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """What a call says of who it is; nothing where it says so twice."""
    found = [value for name, value in metadata or () if name == "authorization"]
    return found[0] if len(found) == 1 and isinstance(found[0], str) else ""


def _lenient(handler: Any) -> Any:
    """With None for a message that cannot be read: gRPC would log it as a failure of the server's."""
    parse = handler.request_deserializer

    def read(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError:
            return None

    return handler._replace(request_deserializer=read)


def _checking(handler: Any, method: str) -> Any:
    """Of a service that is not ours, and knows of no such message."""
    status = status_of(unreadable(method))

    async def check(request: Any, context: Any) -> Any:
        if request is None:
            await context.abort(status.code, status.message, status.trailers)
        return request

    async def unary(request: Any, context: Any) -> Any:
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return await inner(await check(request, context), context)

    async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        checked = (await check(request, context) async for request in requests)
        async for answer in handler.stream_stream(checked, context):
            yield answer

    kind = "unary_stream" if handler.response_streaming else "unary_unary"
    if handler.request_streaming:
        return _lenient(handler)._replace(stream_stream=stream)
    return _lenient(handler)._replace(**{kind: unary})


def _refusing(error: ApiError) -> Any:
    """Reads no message: it may be long."""
    status = status_of(error)

    async def refuse(_requests: Any, context: Any) -> None:
        await context.abort(status.code, status.message, status.trailers)

    return grpc.stream_stream_rpc_method_handler(refuse)
