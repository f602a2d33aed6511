"""A client for asyncio."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import grpc

from headrace.cluster.client.answers import (
    Answer,
    Gathering,
    Loads,
    ModelInfo,
    Piece,
    ServerInfo,
    Usage,
    loads,
    model_info,
    server_info,
)
from headrace.cluster.client.batches import AsyncBatches
from headrace.cluster.client.channel import Target
from headrace.cluster.client.errors import server_error
from headrace.cluster.client.requests import Prompt, generate_request
from headrace.cluster.serving.rpc import inference_pb2 as pb
from headrace.cluster.serving.rpc.inference_pb2_grpc import InferenceStub


class AsyncStream(AsyncIterator[Piece]):
    """An answer as it comes. Iterating raises ServerError; leaving its `async with` block gives the rest
    up."""

    def __init__(self, call: Any, request_id: str, address: str) -> None:
        self._call, self._responses, self._address = call, aiter(call), address
        self._gathering = Gathering(request_id)

    @property
    def request_id(self) -> str:
        return self._gathering.request_id

    @property
    def usage(self) -> Usage | None:
        """None before the end."""
        return self._gathering.usage

    async def __anext__(self) -> Piece:
        try:
            while (piece := self._gathering.take(await anext(self._responses))) is None:
                pass
        except grpc.RpcError as error:
            raise server_error(error, self._address) from error
        self._gathering.add(piece)
        return piece

    async def whole(self) -> Answer:
        """All of it, when it has ended."""
        async for _ in self:
            pass
        return self._gathering.answer

    def cancel(self) -> None:
        """Its pages are free when the passes that are under way have returned."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class AsyncClient:
    """What Client is, for asyncio; made and used on one event loop.

    >>> async with AsyncClient("127.0.0.1:9000") as client:
    ...     async for piece in client.generate("Once upon a time", max_tokens=32):
    ...         print(piece.text, end="", flush=True)
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: bool = False,
        ca_file: str | Path | None = None,
    ) -> None:
        self._target = Target(address, api_key, tls, None if ca_file is None else Path(ca_file))
        self._channel = self._target.aio_channel()
        self._stub: Any = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self.batches = AsyncBatches(self._channel, self._target)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        **params: Any,
    ) -> AsyncStream:
        """As Client.generate."""
        request = generate_request(prompt, params)
        metadata = self._target.metadata
        call = self._stub.Generate(request, timeout=timeout, metadata=metadata)
        return AsyncStream(call, request.request_id, self._target.address)

    async def abort(self, request_id: str) -> bool:
        """Give up a request of the same key; whether it was running."""
        request = pb.AbortRequest(request_id=request_id)
        return bool((await self._ask(self._stub.Abort, request)).was_running)

    async def model_info(self) -> ModelInfo:
        return model_info(await self._ask(self._stub.GetModelInfo, pb.GetModelInfoRequest()))

    async def server_info(self) -> ServerInfo:
        return server_info(await self._ask(self._stub.GetServerInfo, pb.GetServerInfoRequest()))

    async def loads(self) -> Loads:
        return loads(await self._ask(self._stub.GetLoads, pb.GetLoadsRequest()))

    async def _ask(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, metadata=self._target.metadata)
        except grpc.RpcError as error:
            raise server_error(error, self._target.address) from error

    async def close(self) -> None:
        """Safe to call twice."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
