"""Bodies in, errors and events out: what HTTP asks for whatever is served."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Send

from headrace.cluster.serving.errors import ApiError, of_request, of_validation
from headrace.cluster.serving.reading_room import Held
from headrace.scheduler.errors import RequestError

_DRAINED = 4
"""How much of a body that is too large is read all the same, as a multiple of what may be: a client
that is still sending would not see the answer."""

BODY_SECONDS = 20.0
"""For a body to come in, and `_PACE` bytes a second more."""

_PACE = 1024

IDLE_SECONDS = 15.0
"""How long a stream is silent at most: a pass may take longer than proxies wait."""


class JSON(JSONResponse):
    """A lone surrogate, which UTF-8 cannot hold, becomes its escape."""

    def render(self, content: Any) -> bytes:
        return encode(content)


def encode(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error that it caused. Raises any other one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return of_request(error)
    if isinstance(error, ValidationError):
        return of_validation(error)
    raise error


def refuse(error: ApiError) -> Response:
    return JSON(error.body, status_code=error.status, headers=error.headers)


def require_json(request: Request) -> None:
    """ApiError for another type of body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Which a web page of another origin cannot send without asking first.
        raise ApiError(415, "send JSON, with Content-Type: application/json")


async def read_body(request: Request, limit: int, held: Held | None = None) -> bytes:
    """ApiError when it has more than `limit` bytes, of which no more are kept, or than `held` has room for."""
    parts: list[bytes] = []
    size, is_kept = 0, True
    async for part in request.stream():
        size += len(part)
        is_kept = is_kept and size <= limit and (held is None or held.grow(size))
        if is_kept:
            parts.append(part)
        else:
            parts.clear()
        if size > limit * _DRAINED:
            break
    if size > limit:
        raise ApiError(
            413, f"the body has more than {limit} bytes: send less", code="body_too_large"
        )
    if held is not None and not is_kept:
        raise held.refusal()
    return b"".join(parts)


def patient(receive: Receive) -> Receive:
    """Raises ApiError when the body of a request comes too slowly."""
    clock = asyncio.get_running_loop().time
    until, is_whole = clock() + BODY_SECONDS, False

    async def read() -> Message:
        nonlocal until, is_whole
        if is_whole:
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            told = (
                f"a body has to come within {BODY_SECONDS:g} s and a second for each {_PACE} bytes"
            )
            raise ApiError(408, told, code="body_too_slow") from None
        until += len(message.get("body", b"")) / _PACE
        is_whole = not message.get("more_body", False)
        return message

    return read


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do it for as long as the client is there; when it goes away, `work` is cancelled."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended = doing.done()
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
    if ended:
        doing.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_events(
    send: Send, events: AsyncGenerator[dict[str, Any], None], idle: float = IDLE_SECONDS
) -> None:
    """Server-sent events as OpenAI frames them; an error that comes up on the way is the last one.

    Every `idle` seconds there is a comment, too, which clients skip.
    """
    head = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would collect events
    ]
    await send({"type": "http.response.start", "status": 200, "headers": head})

    async def put(line: bytes) -> None:
        await send({"type": "http.response.body", "body": line + b"\n\n", "more_body": True})

    async def comment() -> None:
        while True:
            await asyncio.sleep(idle)
            await put(b": still here")

    commenting = asyncio.ensure_future(comment())
    try:
        async with aclosing(events) as each:
            async for event in each:
                await put(b"data: " + encode(event))
        await put(b"data: [DONE]")
    except (ApiError, RequestError) as error:
        await put(b"data: " + encode(api_error(error).body))
    finally:
        commenting.cancel()
        await asyncio.gather(commenting, return_exceptions=True)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
