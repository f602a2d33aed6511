"""A server's life: what is checked before anything starts, its socket, signals and end."""

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import uvicorn
from starlette.types import ASGIApp

from headrace.cluster.serving.addresses import address, bind, check_protected, check_tls
from headrace.cluster.serving.batches.file_store import FileLimits, FileStore
from headrace.cluster.serving.connections import Acceptor, Connections, check_room
from headrace.cluster.serving.guard import LOCAL, Rules
from headrace.cluster.serving.keys import ApiKeys, load_keys
from headrace.cluster.serving.served_engine import ServedEngine
from headrace.cluster.serving.service import Service
from headrace.cluster.serving.shadow.messages import Setup
from headrace.cluster.serving.shadow.options import ShadowOptions
from headrace.scheduler.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.cluster.serving.rpc.server import RpcServer

log = logging.getLogger(__name__)

_LAST_SECONDS = 10.0
"""For answers to end in, once their requests have been given up."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a user chooses of a server. `port` 0 takes a free one, as `grpc_port` does, which is
    None for no gRPC; `max_body` is in bytes, `max_connections`
    are of each port, `grace` is in seconds: how long requests that run may go on once the server is told to stop. `max_ttft`, in seconds,
    is what interactive requests that do not say wait for their first token at most; None: for ever. `batch_window`, in
    seconds, is how long an idle ring holds its first pass for others to join; 0: not at all, None: by what passes take. `files` is the
    directory of what clients upload and batches write, None for none; its `limits` say how much that may be. `shadow`: what
    answers are compared with, None for nothing."""

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    api_keys: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    max_waiting: int = 256
    max_ttft: float | None = None
    batch_window: float | None = None
    max_body: int = 4 << 20
    max_connections: int = 1000
    grace: float = 30.0
    files: Path | None = None
    limits: FileLimits = field(default_factory=FileLimits)
    shadow: ShadowOptions | None = None

    def rules(self, keys: ApiKeys | None) -> Rules:
        """A local server without keys answers to local names alone."""
        is_open = keys is not None or self.insecure
        return Rules(keys, None if is_open else LOCAL | {self.host})


class Listener:
    """A server's address, keys, certificate and files: checked and taken before the model is loaded, which
    takes long. Clients are refused until `run` is called."""

    def __init__(self, options: ServerOptions) -> None:
        """HeadraceError when others could reach the server unprotected, and for an address, a file of
        keys, a certificate, a directory or a shadow that cannot be used."""
        self.options = options
        check_protected(options.host, options.api_keys, options.tls_cert, insecure=options.insecure)
        check_tls(options.tls_cert, options.tls_key)
        if options.port and options.port == options.grpc_port:
            raise HeadraceError(f"--port and --grpc-port are both {options.port}: choose another")
        check_room(options.max_connections, 1 if options.grpc_port is None else 2)
        self.keys: ApiKeys | None = (
            None if options.api_keys is None else load_keys(options.api_keys)
        )
        self.socket = bind(options.host, options.port)
        self.files: FileStore | None = None
        self.shadow: Setup | None = None
        self._grpc: socket.socket | None = None
        try:
            if options.grpc_port is not None:
                self._grpc = bind(options.host, options.grpc_port, "--grpc-port")
            if options.files is not None:
                self.files = FileStore(options.files, options.limits)
            if options.shadow is not None:
                from headrace.cluster.serving.shadow.check import check_shadow  # loads torch

                self.shadow = check_shadow(options.shadow)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        scheme = "http" if self.options.tls_cert is None else "https"
        return f"{scheme}://{address(self.socket)}"

    @property
    def grpc_address(self) -> str | None:
        """HOST:PORT, which is taken until gRPC listens there; None without gRPC."""
        return None if self._grpc is None else address(self._grpc)

    @property
    def tls(self) -> tuple[Path, Path] | None:
        """The certificate and its key."""
        cert, key = self.options.tls_cert, self.options.tls_key
        return None if cert is None or key is None else (cert, key)

    def close(self) -> None:
        """Safe to call twice."""
        self.socket.close()
        if self._grpc is not None:
            self._grpc.close()
        if self.files is not None:
            self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """Serves one engine at one address until it is told to stop, or the engine fails."""

    def __init__(self, listener: Listener, engine: ServedEngine) -> None:
        options = listener.options
        rules = options.rules(listener.keys)
        served = Service(engine, options, rules, listener.files, listener.shadow)
        self._listener, self._grace = listener, options.grace
        self._engine, self._batches, self._room = served.engine, served.batches, served.room
        self._shadow = served.shadow
        self._config = _config(options, served.app)
        self._rpc: RpcServer | None = None
        if listener.grpc_address is not None:
            from headrace.cluster.serving.rpc import server as rpc  # loads gRPC

            limits = {
                "max_waiting": options.max_waiting,
                "max_body": options.max_body,
                "max_connections": options.max_connections,
            }
            self._rpc = rpc.RpcServer(
                served.engine,
                served.reader,
                served.room,
                served.model,
                served.gate,
                served.metrics,
                served.batches,
                **limits,
            )
        self._stops = 0
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()

    async def run(self, on_ready: Callable[[str], None], *, signals: bool = True) -> None:
        """Serve until `stop` is called, which SIGINT and SIGTERM do. `on_ready` gets the URL.

        Raises what the engine failed with, after clients have been told that it did.
        """
        self._engine.start()
        if self._batches is not None:
            await self._batches.start()
        if self._shadow is not None:
            self._shadow.start()
        most = self._listener.options.max_connections
        http = _Uvicorn(self._config, most, lambda: on_ready(self._listener.url))
        ending = asyncio.ensure_future(self._end(http))
        try:
            with _handling(self.stop) if signals else nullcontext():
                try:
                    if self._rpc is not None:
                        assert self._listener.grpc_address is not None
                        await self._rpc.start(self._listener.grpc_address, self._listener.tls)
                    await http.serve([self._listener.socket])
                finally:
                    if self._shadow is not None:
                        await self._shadow.close()
                    if self._rpc is not None:
                        await self._rpc.close()
                    if self._batches is not None:
                        await self._batches.close()
                    await self._engine.close()
        finally:
            self._room.close()
            ending.cancel()
        if self._engine.error is not None:
            raise self._engine.error

    def stop(self) -> None:
        """Take no more requests and finish those that run, for `grace` seconds at most; a second call
        gives them up. Called on the event loop."""
        self._stops += 1
        (self._stopping if self._stops == 1 else self._hurrying).set()

    async def _end(self, http: uvicorn.Server) -> None:
        told = [asyncio.ensure_future(e.wait()) for e in (self._stopping, self._engine.failed)]
        try:
            await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in told:
                each.cancel()
        if self._batches is not None:
            self._batches.stop()
        self._engine.drain()
        if self._rpc is not None:
            await self._rpc.drain()
        http.should_exit = True
        if self._engine.error is None:
            if self._engine.num_open:
                log.warning(
                    "stopping: %d requests may finish within %g s; again to give them up",
                    self._engine.num_open,
                    self._grace,
                )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurrying.wait(), self._grace)
        if self._engine.num_open:
            log.warning("%d requests are given up", self._engine.num_open)
        self._engine.give_up()
        if self._rpc is not None:
            self._rpc.give_up()


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: it would raise them again at its end, and the exit code would be another. And
    clients: it would take in any number of them."""

    def __init__(
        self, config: uvicorn.Config, max_connections: int, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._acceptor = Acceptor(Connections(max_connections), self)
        self._accepting: list[asyncio.Task[None]] = []
        self._on_ready = on_ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        for each in sockets or []:
            each.setblocking(False)
            each.listen(self.config.backlog)
            self._accepting.append(asyncio.create_task(self._acceptor.run(each)))
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)


def _config(options: ServerOptions, app: ASGIApp) -> uvicorn.Config:
    # A line for each request that is malformed: clients could fill disks with them.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="info" if log.isEnabledFor(logging.INFO) else "error",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(options.grace + _LAST_SECONDS),
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )


@contextmanager
def _handling(stop: Callable[[], None]) -> Iterator[None]:
    """The first two signals stop the server, in order and at once; a third has its default effect."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    left = 2

    def restore() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    def told() -> None:
        nonlocal left
        left -= 1
        stop()
        if not left:
            restore()

    for number in numbers:
        loop.add_signal_handler(number, told)
    try:
        yield
    finally:
        restore()
