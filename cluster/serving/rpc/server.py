"""A gRPC server's life, beside the HTTP server of the same engine."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.batches.manager import Batches
from headrace.cluster.serving.connections import HEAD_SECONDS
from headrace.cluster.serving.guard import Gate
from headrace.cluster.serving.metrics import Metrics
from headrace.cluster.serving.reader import Model, Reader
from headrace.cluster.serving.reading_room import ReadingRoom
from headrace.cluster.serving.rpc import batch
from headrace.cluster.serving.rpc.batch_pb2_grpc import add_BatchServicer_to_server
from headrace.cluster.serving.rpc.calls import Calls
from headrace.cluster.serving.rpc.door import Door
from headrace.cluster.serving.rpc.inference import NAME, Inference, Limits
from headrace.cluster.serving.rpc.inference_pb2_grpc import add_InferenceServicer_to_server
from headrace.scheduler.errors import HeadraceError

_LAST_SECONDS = 0.5
"""For the ends of calls to be sent, and for those who watch the server's health."""

_STREAMS = 1024
"""Calls at once on a connection: more wait at the client."""

_IDLE_MS = 300_000
"""After which a connection without calls is closed: clients open another by themselves."""

_LARGEST = 2**31 - 1
"""Bytes that protobuf can hold in a message."""

_IDENTITY = 1
"""The only compression that is understood: a small message can become a very large one, which is measured
when it has."""


class RpcServer:
    """Serves one engine at an address, on the event loop where it is started."""

    def __init__(
        self,
        engine: AsyncEngine,
        reader: Reader,
        room: ReadingRoom,
        model: Model,
        gate: Gate,
        metrics: Metrics,
        batches: Batches | None,
        *,
        max_waiting: int,
        max_body: int,
        max_connections: int,
    ) -> None:
        """As many sequences of a key may wait and requests have as many bytes as over HTTP. Without
        `batches` the service for them refuses all calls."""
        self._options, self._calls = _options(max_body, max_connections), Calls(engine)
        self._door = Door(gate, metrics)
        limits = Limits(max_waiting, max_body)
        self._inference = Inference(
            engine, reader, room, model, gate, self._door, self._calls, limits
        )
        self._batch = batch.BatchService(batches, gate, self._door)
        self._names = [NAME] if batches is None else [NAME, batch.NAME]
        self._health = health.aio.HealthServicer()
        self._server: Any = None
        self._hurrying = asyncio.Event()

    async def start(self, address: str, tls: tuple[Path, Path] | None) -> None:
        """`tls` is a certificate chain and its key, in PEM. HeadraceError for an address that is taken."""
        made = aio.server(interceptors=[self._door], options=self._options)
        add_InferenceServicer_to_server(self._inference, made)  # type: ignore[no-untyped-call]
        add_BatchServicer_to_server(self._batch, made)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, made)
        names = (NAME, batch.NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, made)
        try:
            if tls is None:
                made.add_insecure_port(address)
            else:
                made.add_secure_port(address, _credentials(*tls))
        except RuntimeError as error:
            raise HeadraceError(f"cannot serve gRPC at {address}: {error}") from error
        for name in self._names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await made.start()
        self._server = made

    async def drain(self) -> None:
        """Tell those who ask for its health that the server ends. The engine refuses new requests then."""
        await self._health.enter_graceful_shutdown()

    def give_up(self) -> None:
        """Let `close` wait no longer."""
        self._hurrying.set()

    async def close(self) -> None:
        """Return when all requests have ended, or soon after they were given up. Safe to call twice."""
        made, self._server = self._server, None
        if made is None:
            return
        waits = [self._calls.all_ended(), self._hurrying.wait()]
        tasks = [asyncio.ensure_future(each) for each in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await made.stop(_LAST_SECONDS)


def _options(max_body: int, max_connections: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.server_handshake_timeout_ms", round(1000 * HEAD_SECONDS)),
        ("grpc.max_receive_message_length", min(max_body, _LARGEST)),
        ("grpc.max_send_message_length", -1),
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY),
        (
            "grpc.so_reuseport",
            0,
        ),  # or two servers could share a port, and its clients, without a word
        ("grpc.keepalive_time_ms", 30_000),  # a pass may take longer than what is between us waits
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _credentials(certificate: Path, key: Path) -> Any:
    return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
