"""A server's HTTP door, for what watches it. `headrace.client` is for what uses it."""

import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from headrace.scheduler.errors import HeadraceError

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Door:
    """A server by its URL. `key` is an API key, if it wants one; `ca_file` has certificates that HTTPS trusts
    beside the machine's."""

    url: str
    key: str = ""
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        """HeadraceError for what is no URL of a server."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HeadraceError(f"{self.url!r} is no URL of a server: give http://HOST:PORT")

    def get(self, path: str, timeout: float = 10.0) -> Any:
        """JSON. HeadraceError when there is no such server, or it does not let us in."""
        with self._open("GET", path, None, timeout) as answer:
            raw = answer.read()
        try:
            return json.loads(raw)
        except ValueError as error:
            raise HeadraceError(f"{self.url}{path} is no page of a headrace server") from error

    def post(self, path: str, body: Any, timeout: float) -> Iterator[bytes]:
        """What is answered, in pieces."""
        with self._open("POST", path, json.dumps(body).encode(), timeout) as answer:
            while piece := answer.read(_CHUNK):
                yield piece

    @contextmanager
    def _open(
        self, method: str, path: str, body: bytes | None, timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = self.url.rstrip("/").removesuffix("/v1")
        asked = Request(f"{url}{path}", body, headers, method=method)
        try:
            with urlopen(asked, timeout=timeout, context=self._context()) as answer:
                yield answer
        except HTTPError as error:
            with error:
                raise HeadraceError(self._refusal(path, error)) from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            told = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise HeadraceError(
                f"no server answers at {url}: {told}. Does `headrace serve` run there, and is this the"
                " address that it printed?"
            ) from error

    def _context(self) -> ssl.SSLContext | None:
        if self.ca_file is None:
            return None
        try:
            context = ssl.create_default_context()
            context.load_verify_locations(self.ca_file)
        except OSError as error:
            told = f"--ca-file {self.ca_file} cannot be used: {error.strerror or error}"
            raise HeadraceError(told) from error
        return context

    def _refusal(self, path: str, error: HTTPError) -> str:
        if error.code == 401:
            return (
                f"{self.url} wants an API key: give --key-file FILE, or HEADRACE_API_KEY in the"
                " environment"
            )
        if error.code == 404:
            return f"{self.url} has no {path}: it is no server of headrace's, or of another version"
        try:
            told = json.loads(error.read(1 << 16))["error"]["message"]
        except (OSError, ValueError, KeyError, TypeError):
            told = error.reason
        return f"{self.url}{path}: {error.code}, {told}"
