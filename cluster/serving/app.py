"""The routes: OpenAI's models, completions and chat, and what operators look at."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.cluster.serving.adapters import (
    AdapterDoor,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    listed_adapter,
)
from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.batches.routes import FileRoutes, NoFiles
from headrace.cluster.serving.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from headrace.cluster.serving.choices import Answer
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.guard import CLIENT_GONE, Gate, Guard
from headrace.cluster.serving.http import (
    JSON,
    api_error,
    encode,
    read_body,
    refuse,
    require_json,
    send_events,
    unless_gone,
)
from headrace.cluster.serving.metrics import CONTENT_TYPE, Metrics
from headrace.cluster.serving.openapi import PATH as DESCRIPTION
from headrace.cluster.serving.openapi import READS, WORKS, Route, describe
from headrace.cluster.serving.page import PATHS as PAGE_PATHS
from headrace.cluster.serving.page import Page
from headrace.cluster.serving.reader import Model, Reader, Work
from headrace.cluster.serving.reading_room import ReadingRoom
from headrace.cluster.serving.ring import ring_state
from headrace.cluster.serving.shadow.metrics import shadow_state
from headrace.cluster.serving.shadow.shadow import Shadow
from headrace.cluster.serving.terms import TIMEOUT_HEADER
from headrace.cluster.serving.tracing import TraceRequest, Tracing
from headrace.scheduler.errors import RequestError

T = TypeVar("T")


class Front:
    """Takes requests of one model to its engine and the answers back. `max_body` is in bytes."""

    def __init__(
        self,
        engine: AsyncEngine,
        reader: Reader,
        room: ReadingRoom,
        model: Model,
        metrics: Metrics,
        *,
        max_body: int,
        shadow: Shadow | None = None,
    ) -> None:
        self._engine, self._reader, self._model, self._metrics = engine, reader, model, metrics
        self._room, self._tracing = room, Tracing(engine)
        self._adapters, self._shadow = AdapterDoor(engine, model.name), shadow
        self._max_body, self._created = max_body, int(time.time())

    @property
    def routes(self) -> list[Route]:
        read, work = (*READS, 404), (*READS, *WORKS)
        answers = partial(
            Route, "POST", kinds=("application/json", "text/event-stream"), errors=work
        )
        tokens = partial(Route, "POST", errors=read)
        adapters = partial(Route, "POST", kinds=("text/plain",))
        return [
            Route("GET", "/v1/models", self.models, "The model and its adapters, in a list"),
            Route("GET", "/v1/models/{name:path}", self.one_model, "A model", errors=(404,)),
            answers("/v1/completions", self.completions, "Complete a text", body=CompletionRequest),
            answers("/v1/chat/completions", self.chat, "Answer a conversation", body=ChatRequest),
            adapters(
                "/v1/load_lora_adapter",
                self.load_adapter,
                "Have requests name a LoRA adapter as their model; operators alone",
                body=LoadAdapterRequest,
                errors=(*READS, 503),
            ),
            adapters(
                "/v1/unload_lora_adapter",
                self.unload_adapter,
                "Forget a LoRA adapter; operators alone",
                body=UnloadAdapterRequest,
                errors=(*read, 503),
            ),
            tokens("/tokenize", self.tokenize, "Text to tokens", body=TokenizeRequest),
            tokens("/detokenize", self.detokenize, "Tokens to text", body=DetokenizeRequest),
            Route("GET", "/health/live", self.live, "Whether it runs", needs_key=False),
            Route(
                "GET",
                "/health/ready",
                self.ready,
                "Whether it takes requests",
                errors=(503,),
                needs_key=False,
            ),
            Route("GET", "/metrics", self.metrics, "For Prometheus", kinds=(CONTENT_TYPE,)),
            Route("GET", "/ring", self.ring, "What the ring does"),
            Route(
                "POST",
                "/trace",
                self.trace,
                "Record what the ring does, for ui.perfetto.dev; operators alone",
                body=TraceRequest,
                errors=(*READS, 409, 500, 503),
            ),
        ]

    async def models(self) -> Response:
        return JSON({"object": "list", "data": [*map(self._listed, self._reader.names)]})

    async def one_model(self, name: str) -> Response:
        if name not in self._reader.names:
            told = f"there is no model {name[:80]!r} here"
            raise ApiError(404, told, param="model", code="model_not_found")
        return JSON(self._listed(name))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self._reader.completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self._reader.chat)

    async def tokenize(self, request: Request) -> Response:
        tenant = str(request.state.tenant)
        return await self._read(request, lambda raw: JSON(self._reader.tokenize(raw, tenant)))

    async def detokenize(self, request: Request) -> Response:
        return await self._read(request, lambda raw: JSON(self._reader.detokenize(raw)))

    async def live(self) -> Response:
        return JSON({"status": "live"})

    async def ready(self) -> Response:
        if self._engine.is_ready:
            return JSON({"status": "ready"})
        return JSON({"status": "not ready"}, status_code=503)

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def ring(self, request: Request) -> Response:
        engine, operator = self._engine, bool(request.state.operator)
        standing = await asyncio.to_thread(engine.standing)
        state = ring_state(engine.plan, engine.state, engine.now(), standing, operator=operator)
        shadow = shadow_state(self._shadow)
        return JSON({"model": self._model.name, **state, "shadow": shadow})

    async def load_adapter(self, request: Request) -> Response:
        _check_operator(request, "load adapters")
        asked = await self._read(request, LoadAdapterRequest.model_validate_json)
        return PlainTextResponse(await self._adapters.load(asked))

    async def unload_adapter(self, request: Request) -> Response:
        _check_operator(request, "unload adapters")
        asked = await self._read(request, UnloadAdapterRequest.model_validate_json)
        return PlainTextResponse(await self._adapters.unload(asked))

    async def trace(self, request: Request) -> Response:
        _check_operator(request, "have the ring recorded")
        asked = await self._read(request, TraceRequest.model_validate_json)
        return _Recording(self._tracing, asked)

    def _listed(self, name: str) -> dict[str, Any]:
        base = {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "headrace",
            "max_model_len": self._model.max_context,
        }
        return base if name == self._model.name else listed_adapter(name, base)

    async def _answer(self, request: Request, read: Callable[[bytes, str], Work]) -> Response:
        since, tenant = self._engine.now(), str(request.state.tenant)
        work = await self._read(request, lambda raw: read(raw, tenant))
        terms = work.terms.of_key(request.state.weight)
        work = replace(work, terms=terms.with_timeout(request.headers.get(TIMEOUT_HEADER)))
        answer = Answer(work, self._model, int(time.time()))
        return _Answering(self._engine, answer, work, since)

    async def _read(self, request: Request, read: Callable[[bytes], T]) -> T:
        require_json(request)
        with self._room.holding() as held:
            raw = await read_body(request, self._max_body, held)
            return await self._room.run(len(raw), partial(read, raw))


def _check_operator(request: Request, what: str) -> None:
    if not request.state.operator:
        raise ApiError(
            403,
            f"this API key is no operator's, who may {what}: headrace serve-key NAME --operator makes one",
            code="not_operator",
        )


class _Answering(Response):
    """Has the work done while the client is there, and gives it up when it goes away."""

    def __init__(self, engine: AsyncEngine, answer: Answer, work: Work, since: float) -> None:
        super().__init__()
        self._engine, self._answer, self._work, self._since = engine, answer, work, since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._respond(scope, receive, send))

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._work
        with self._engine.running(work.orders, work.terms, self._since) as generation:
            if work.streams:
                await send_events(send, self._answer.chunks(generation))
                return
            whole = await self._answer.whole(generation)
        response = Response(await asyncio.to_thread(encode, whole), media_type="application/json")
        await response(scope, receive, send)


class _Recording(Response):
    """Has the ring recorded while the client is there."""

    def __init__(self, tracing: Tracing, asked: TraceRequest) -> None:
        super().__init__()
        self._tracing, self._asked = tracing, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._respond(scope, receive, send))

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        chunks = await self._tracing.record(self._asked)
        response = StreamingResponse(chunks, media_type="application/json")
        await response.stream_response(send)


def create_app(front: Front, files: FileRoutes | NoFiles, gate: Gate, metrics: Metrics) -> ASGIApp:
    """The whole server as an ASGI application; its engine is started by whoever runs it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    page = Page()
    routes = [*front.routes, *files.routes]
    described = encode(describe(routes, with_keys=gate.rules.keys is not None))

    async def description() -> Response:
        return Response(described, media_type="application/json")

    for route in (*routes, Route("GET", DESCRIPTION, description)):
        app.add_api_route(route.path, route.endpoint, methods=[route.method], response_model=None)
    for path in PAGE_PATHS:
        app.add_api_route(path, page.asset, methods=["GET", "HEAD"], response_model=None)
    for kind in (ApiError, RequestError, ValidationError):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    fixed = {route.path for route in routes if "{" not in route.path}
    return Guard(app, gate, metrics, PAGE_PATHS | fixed | {DESCRIPTION})


async def _refused(request: Request, error: Exception) -> Response:
    return refuse(api_error(error))


async def _left(request: Request, error: Exception) -> Response:
    """Of a client that went away in the middle of its request: nobody reads it."""
    return Response(status_code=CLIENT_GONE)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    told = f"{request.method} {request.url.path[:200]}: {error.detail}"
    made = refuse(ApiError(error.status_code, told, code=codes.get(error.status_code)))
    made.headers.update(error.headers or {})
    return made


async def _failed(request: Request, error: Exception) -> Response:
    return refuse(ApiError(500, "the server failed at this request"))
