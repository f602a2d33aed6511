"""A client that waits."""

from collections.abc import Callable, Iterator
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
from headrace.cluster.client.batches import Batches
from headrace.cluster.client.channel import Target
from headrace.cluster.client.errors import server_error
from headrace.cluster.client.requests import Prompt, generate_request
from headrace.cluster.serving.rpc import inference_pb2 as pb
from headrace.cluster.serving.rpc.inference_pb2_grpc import InferenceStub


class Stream(Iterator[Piece]):
    """An answer as it comes. Iterating raises ServerError; leaving its `with` block gives the rest up."""

    def __init__(self, call: Any, request_id: str, address: str) -> None:
        self._call, self._address = call, address
        self._gathering = Gathering(request_id)

    @property
    def request_id(self) -> str:
        return self._gathering.request_id

    @property
    def usage(self) -> Usage | None:
        """None before the end."""
        return self._gathering.usage

    def __next__(self) -> Piece:
        try:
            while (piece := self._gathering.take(next(self._call))) is None:
                pass
        except grpc.RpcError as error:
            raise server_error(error, self._address) from error
        self._gathering.add(piece)
        return piece

    def whole(self) -> Answer:
        """All of it, when it has ended."""
        for _ in self:
            pass
        return self._gathering.answer

    def cancel(self) -> None:
        """Its pages are free when the passes that are under way have returned."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Client:
    """Of a server's gRPC port; any thread may use it.

    >>> with Client("127.0.0.1:9000") as client:
    ...     for piece in client.generate("Once upon a time", max_tokens=32):
    ...         print(piece.text, end="", flush=True)

    `address` is HOST:PORT. TLS with `tls`, or with a `ca_file` in PEM. Calls raise ServerError.
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
        self._channel = self._target.channel()
        self._stub: Any = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self.batches = Batches(self._channel, self._target)

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **params: Any) -> Stream:
        """Continue a text, token ids or a conversation; `timeout` seconds are all that it may take.

        `params` are those of HTTP, and `request_id`, for `abort`. RequestError for one that is unknown.
        """
        request = generate_request(prompt, params)
        metadata = self._target.metadata
        call = self._stub.Generate(request, timeout=timeout, metadata=metadata)
        return Stream(call, request.request_id, self._target.address)

    def abort(self, request_id: str) -> bool:
        """Give up a request of the same key; whether it was running."""
        return bool(self._ask(self._stub.Abort, pb.AbortRequest(request_id=request_id)).was_running)

    def model_info(self) -> ModelInfo:
        return model_info(self._ask(self._stub.GetModelInfo, pb.GetModelInfoRequest()))

    def server_info(self) -> ServerInfo:
        return server_info(self._ask(self._stub.GetServerInfo, pb.GetServerInfoRequest()))

    def loads(self) -> Loads:
        return loads(self._ask(self._stub.GetLoads, pb.GetLoadsRequest()))

    def _ask(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, metadata=self._target.metadata)
        except grpc.RpcError as error:
            raise server_error(error, self._target.address) from error

    def close(self) -> None:
        """Safe to call twice."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
