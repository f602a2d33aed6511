"""A real server on a real socket, over an engine in this process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cluster.bench.local import local_engine
from headrace.cluster.cli.options import Device, RunOptions
from headrace.cluster.engine import Engine
from headrace.cluster.serving.server import Listener, Server, ServerOptions

MODEL = "stories"


@dataclass
class Served:
    """Where a server is, and its engine, which is its own thread's: to look at between requests."""

    url: str
    engine: Any


@contextmanager
def serving(engine: Any, **options: Any) -> Iterator[Served]:
    """Serve an engine in a thread; stops the server at the end and has it raise what it raises."""
    ready = threading.Event()
    urls: list[str] = []
    failures: list[Exception] = []
    loop = asyncio.new_event_loop()
    with Listener(ServerOptions(**{"model_name": MODEL, "port": 0, "grace": 5.0, **options})) as at:
        server = Server(at, engine)

        def on_ready(url: str) -> None:
            urls.append(url)
            ready.set()

        def run() -> None:
            try:
                loop.run_until_complete(server.run(on_ready, signals=False))
            except Exception as error:
                failures.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert ready.wait(30.0)
            assert urls, failures
            yield Served(urls[0], engine)
        finally:
            if not failures:
                loop.call_soon_threadsafe(server.stop)
            thread.join(30.0)
            assert not thread.is_alive()
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
    if failures:
        raise failures[0]


@contextmanager
def stories_engine(store: Path, **options: Any) -> Iterator[Engine]:
    """One stage in this process, with everything resident."""
    given = {"device": Device.CPU, "device_memory": "64MiB", "context": 256, **options}
    with local_engine(RunOptions(**given).engine(store)) as engine:
        yield engine
