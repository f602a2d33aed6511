"""Who is let in: before a route is looked for, and for as long as an answer takes."""

from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.cluster.serving.async_engine import RETRY_SECONDS
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.http import refuse
from headrace.cluster.serving.keys import ApiKey, ApiKeys
from headrace.cluster.serving.metrics import Metrics
from headrace.cluster.serving.page import PATHS as PAGE_PATHS

OPEN = frozenset({"/health/live", "/health/ready"}) | PAGE_PATHS
"""What needs no key: it tells nothing of the model or of who uses it."""

UNCOUNTED = frozenset({"/ring"})
"""Answered at once from what is known, and asked for every second by a page that is open: not one of
the requests that a key may have at once."""

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})

CLIENT_GONE = 499
"""What nginx writes for a client that did not wait for the end of its answer."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Without `keys` everybody is let in. `hosts` are the names under which clients may ask for the
    server, None any: a web page elsewhere can have its own name lead to this machine."""

    keys: ApiKeys | None = None
    hosts: frozenset[str] | None = None


class Guard:
    """Checks keys and counts the requests of each, and all answers by path and status."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._rules, self._metrics, self._paths = app, rules, metrics, paths
        self._running: Counter[str] = Counter()

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
        try:
            key = self._check(scope)
        except ApiError as error:
            await refuse(error)(scope, receive, send)
            return
        name = "" if key is None else key.name
        scope.setdefault("state", {}).update(tenant=name, weight=1 if key is None else key.weight)
        counts = scope["path"] not in UNCOUNTED
        self._running[name] += counts
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[name] -= counts

    def _check(self, scope: Scope) -> ApiKey | None:
        headers = Headers(scope=scope)
        hosts = self._rules.hosts
        if hosts is not None and _host(headers) not in hosts:
            raise ApiError(403, "this server answers to local names only", code="unknown_host")
        if scope["path"] in OPEN or self._rules.keys is None:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise ApiError(
                401, "give an API key: Authorization: Bearer KEY", code="missing_api_key"
            )
        key = self._rules.keys.find(secret.strip())
        if key is None:
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        is_full = key.limit is not None and self._running[key.name] >= key.limit
        if is_full and scope["path"] not in UNCOUNTED:
            raise ApiError(
                429,
                f"this API key has {key.limit} requests running, as many as it may",
                code="too_many_requests",
                retry_after=RETRY_SECONDS,
            )
        return key


def _host(headers: Headers) -> str:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
