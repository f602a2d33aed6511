"""Who is let in: before a route is looked for, and for as long as an answer takes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.cluster.serving.async_engine import RETRY_SECONDS
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.http import patient, refuse
from headrace.cluster.serving.keys import ApiKey, ApiKeys
from headrace.cluster.serving.metrics import Metrics
from headrace.cluster.serving.openapi import PATH as DESCRIPTION
from headrace.cluster.serving.page import PATHS as PAGE_PATHS
from headrace.cluster.serving.rates import Rates

OPEN = frozenset({"/health/live", "/health/ready", DESCRIPTION}) | PAGE_PATHS
"""What needs no key: it tells nothing of the model or of who uses it."""

UNCOUNTED = frozenset({"/ring"})
"""Answered at once from what is known, and asked for every second by a page that is open: not one of
the requests that a key may have at once."""

RATED = frozenset({"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"})
"""What counts as one of the requests that a key may have a minute: what takes work, and not looking after
batches, whose lines have shares of their own."""

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})

CLIENT_GONE = 499
"""What nginx writes for a client that did not wait for the end of its answer."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Without `keys` everybody is let in. `hosts` are the names under which clients may ask for the
    server, None any: a web page elsewhere can have its own name lead to this machine."""

    keys: ApiKeys | None = None
    hosts: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, its share, and whether it may look into the ring, as all may where there are no
    keys."""

    tenant: str = ""
    weight: int = 1
    operator: bool = True


class Gate:
    """Checks keys and counts the requests of each, however they come."""

    def __init__(self, rules: Rules, rates: Rates, metrics: Metrics) -> None:
        self.rules, self.rates, self._metrics = rules, rates, metrics
        self._running: Counter[str] = Counter()

    def check(self, authorization: str) -> ApiKey | None:
        """Whose key this is; None where none is needed. ApiError 401 for one that is not known."""
        if self.rules.keys is None:
            return None
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise ApiError(
                401, "give an API key: Authorization: Bearer KEY", code="missing_api_key"
            )
        key = self.rules.keys.find(secret.strip())
        if key is None:
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        return key

    @contextmanager
    def running(
        self, key: ApiKey | None, *, counts: bool = True, is_rated: bool = False
    ) -> Iterator[Caller]:
        """For as long as a request runs. ApiError 429 when it `counts` and its key has as many as it may,
        or when it `is_rated` and its key has had as many in the last minute."""
        caller = Caller() if key is None else Caller(key.name, key.weight, key.operator)
        if not counts:
            yield caller
            return
        if key is not None:
            try:
                self._admit(key, is_rated=is_rated)
            except ApiError as error:
                self._metrics.turned_away(error.code or "")
                raise
        self._running[caller.tenant] += 1
        try:
            yield caller
        finally:
            self._running[caller.tenant] -= 1

    def _admit(self, key: ApiKey, *, is_rated: bool) -> None:
        if key.limit is not None and self._running[key.name] >= key.limit:
            raise ApiError(
                429,
                f"this API key has {key.limit} requests running, as many as it may",
                code="too_many_requests",
                retry_after=RETRY_SECONDS,
            )
        if is_rated:
            self.rates.take_request(key.name)


class Guard:
    """Lets HTTP requests through the gate, and counts answers by path and status."""

    def __init__(self, app: ASGIApp, gate: Gate, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._gate, self._metrics, self._paths = app, gate, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, has_ended = 0, False

        async def counted(message: Message) -> None:
            nonlocal status, has_ended
            await send(message)
            status = message.get("status", status)
            has_ended = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._let_in(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answered(path, status if has_ended else CLIENT_GONE)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts, is_rated = scope["path"] not in UNCOUNTED, scope["path"] in RATED
        with ExitStack() as stack:
            try:
                key = self._check(scope)
                if key is not None:
                    send = _telling(send, partial(self._gate.rates.headers, key.name))
                running = self._gate.running(key, counts=counts, is_rated=is_rated)
                caller = stack.enter_context(running)
            except ApiError as error:
                await refuse(error)(scope, receive, send)
                return
            scope.setdefault("state", {}).update(
                tenant=caller.tenant, weight=caller.weight, operator=caller.operator
            )
            await self._app(scope, patient(receive), send)

    def _check(self, scope: Scope) -> ApiKey | None:
        headers, hosts = Headers(scope=scope), self._gate.rules.hosts
        if hosts is not None and _host(headers) not in hosts:
            raise ApiError(403, "this server answers to local names only", code="unknown_host")
        if scope["path"] in OPEN:
            return None
        return self._gate.check(headers.get("authorization", ""))


def _telling(send: Send, headers: Callable[[], dict[str, str]]) -> Send:
    """Sends answers with headers that are asked for when they begin."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in headers().items()]
            message["headers"] = [*message["headers"], *more]
        await send(message)

    return told


def _host(headers: Headers) -> str:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
