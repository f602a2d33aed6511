"""Connections of HTTP clients: how many there may be, and how long they may say nothing.

uvicorn bounds neither. A body's pace is the guard's to watch: it answers.
"""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from headrace.scheduler.errors import HeadraceError

log = logging.getLogger(__name__)

HEAD_SECONDS = 20.0
"""For a TLS handshake, and for the head of a request: from when the connection waits for it."""

_RETRY_SECONDS = 1.0

_SPARE_FILES = 512
"""Descriptors for all that is no client's connection."""


class Connections:
    """All of a server's, `most` at once. One more closes the one that has waited longest for a request; where
    all have one under way, it is closed itself."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[object, Callable[[], object]] = {}
        self._waiting: dict[object, None] = {}  # in the order in which they began to

    def enter(self, key: object, close: Callable[[], object]) -> bool:
        """Whether there is room for it. It waits."""
        if len(self._open) >= self._most:
            oldest = next(iter(self._waiting), None)
            if oldest is None:
                return False
            self._open[oldest]()
            self.leave(oldest)
        self._open[key] = close
        self.waits(key)
        return True

    def renew(self, key: object, close: Callable[[], object]) -> bool:
        """Closed otherwise from now on. False for one that had to go."""
        if key in self._open:
            self._open[key] = close
        return key in self._open

    def waits(self, key: object) -> None:
        if key in self._open:
            self._waiting[key] = None

    def works(self, key: object) -> None:
        self._waiting.pop(key, None)

    def leave(self, key: object) -> None:
        """Safe to call twice."""
        self._open.pop(key, None)
        self._waiting.pop(key, None)


class Connection(H11Protocol):
    """One that is closed when it has waited too long for the head of a request."""

    def __init__(self, connections: Connections, key: object, **given: Any) -> None:
        super().__init__(**given)
        self._among, self._key = connections, key
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._among.renew(self._key, transport.abort):
            self._wait()
        else:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        # Before a request that lies here already is begun.
        self._wait()
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._among.leave(self._key)
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)
        self._among.waits(self._key)

    def _look(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
            self._among.works(self._key)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Acceptor:
    """Takes clients of one listening socket in, and keeps count of them from then on: those that are in a
    TLS handshake, too, of which protocols are not told."""

    def __init__(self, connections: Connections, http: uvicorn.Server) -> None:
        self._connections, self._http = connections, http
        self._arriving: set[asyncio.Task[None]] = set()

    async def run(self, listening: socket.socket) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listening)
            except OSError as error:  # such as that there are too many open files
                log.warning("cannot take in clients for now: %s", error.strerror or error)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            task = loop.create_task(self._take_in(client))
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)
            if not self._connections.enter(task, task.cancel):
                task.cancel()
                client.close()
            await asyncio.sleep(0)  # which accepting does not while there are more

    async def _take_in(self, client: socket.socket) -> None:
        config, key = self._http.config, asyncio.current_task()

        def protocol() -> Connection:
            state = self._http.server_state
            return Connection(
                self._connections, key, config=config, server_state=state, app_state={}
            )

        seconds = None if config.ssl is None else HEAD_SECONDS
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol, client, ssl=config.ssl, ssl_handshake_timeout=seconds
            )
        except BaseException as error:
            self._connections.leave(key)
            if not isinstance(error, OSError):  # ssl.SSLError is one, a handshake's timeout, too
                raise


def check_room(most: int, ports: int) -> None:
    """Let this process have so many connections open at each of its ports. HeadraceError when it may not."""
    needed = ports * most + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < needed:
        raise HeadraceError(
            f"--max-connections {most} needs {needed} open files, and this process may have {hard}:"
            " give fewer, or raise `ulimit -n`"
        )
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
