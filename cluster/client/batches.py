"""Batches, for both clients: their calls raise ServerError."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

import grpc

from headrace.cluster.client.batch_values import (
    BatchJob,
    BatchPage,
    Result,
    Row,
    Sending,
    batch_job,
    batch_page,
    results_of,
)
from headrace.cluster.client.channel import Target
from headrace.cluster.client.errors import server_error
from headrace.cluster.serving.rpc import batch_pb2 as pb
from headrace.cluster.serving.rpc.batch_pb2_grpc import BatchStub


class Batches:
    """`client.batches`: rows that are answered when nobody else needs the server."""

    def __init__(self, channel: Any, target: Target) -> None:
        self._stub: Any = BatchStub(channel)  # type: ignore[no-untyped-call]
        self._target = target

    def submit(
        self,
        rows: Iterable[Row],
        endpoint: str,
        *,
        metadata: Mapping[str, str] | None = None,
        output_expires_after: int | None = None,
    ) -> BatchJob:
        """Make a batch of rows whose `url` is the endpoint; they are taken one by one, by another thread.

        RequestError for a row that cannot be sent. After an UnavailableError it may have been made all the same:
        `list` tells by the metadata. Results are kept for `output_expires_after` seconds.
        """
        sending = Sending(rows, endpoint, metadata, output_expires_after)
        call = self._stub.Submit.future(sending, metadata=self._target.metadata)
        sending.bind(call)
        try:
            return batch_job(call.result())
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            if sending.error is not None:
                raise sending.error from None
            raise server_error(call, self._target.address) from error

    def get(self, batch_id: str) -> BatchJob:
        return batch_job(self._ask(self._stub.Get, pb.GetBatchRequest(id=batch_id)))

    def list(self, limit: int | None = None, after: str | None = None) -> BatchPage:
        """Those of the key, the newest first: 20, or up to 100."""
        request = pb.ListBatchesRequest(limit=limit, after=after)
        return batch_page(self._ask(self._stub.List, request))

    def cancel(self, batch_id: str) -> BatchJob:
        """Have lines that have not ended end with an error."""
        return batch_job(self._ask(self._stub.Cancel, pb.CancelBatchRequest(id=batch_id)))

    def results(self, batch_id: str, offset: int = 0, *, wait: bool = False) -> Iterator[Result]:
        """The answers and then the errors of a batch that has ended, or is to be waited for. To go on after a
        call that was cut, give the last `next_offset`."""
        request = pb.ResultsRequest(id=batch_id, offset=offset, wait=wait)
        call = self._stub.Results(request, metadata=self._target.metadata)
        try:
            for message in call:
                yield from results_of(message)
        except grpc.RpcError as error:
            raise server_error(error, self._target.address) from error
        finally:
            call.cancel()

    def _ask(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, metadata=self._target.metadata)
        except grpc.RpcError as error:
            raise server_error(error, self._target.address) from error


class AsyncBatches:
    """`client.batches` of an AsyncClient: the methods of Batches."""

    def __init__(self, channel: Any, target: Target) -> None:
        self._stub: Any = BatchStub(channel)  # type: ignore[no-untyped-call]
        self._target = target

    async def submit(
        self,
        rows: Iterable[Row],
        endpoint: str,
        *,
        metadata: Mapping[str, str] | None = None,
        output_expires_after: int | None = None,
    ) -> BatchJob:
        """As in Batches; rows are taken one by one, on the event loop."""
        sending = Sending(rows, endpoint, metadata, output_expires_after)
        call = self._stub.Submit(sending, metadata=self._target.metadata)
        sending.bind(call)
        try:
            return batch_job(await call)
        except (grpc.RpcError, asyncio.CancelledError) as error:
            if sending.error is not None:
                raise sending.error from None
            if isinstance(error, asyncio.CancelledError):
                raise
            raise server_error(error, self._target.address) from error

    async def get(self, batch_id: str) -> BatchJob:
        return batch_job(await self._ask(self._stub.Get, pb.GetBatchRequest(id=batch_id)))

    async def list(self, limit: int | None = None, after: str | None = None) -> BatchPage:
        request = pb.ListBatchesRequest(limit=limit, after=after)
        return batch_page(await self._ask(self._stub.List, request))

    async def cancel(self, batch_id: str) -> BatchJob:
        return batch_job(await self._ask(self._stub.Cancel, pb.CancelBatchRequest(id=batch_id)))

    async def results(
        self, batch_id: str, offset: int = 0, *, wait: bool = False
    ) -> AsyncIterator[Result]:
        request = pb.ResultsRequest(id=batch_id, offset=offset, wait=wait)
        call = self._stub.Results(request, metadata=self._target.metadata)
        try:
            async for message in call:
                for result in results_of(message):
                    yield result
        except grpc.RpcError as error:
            raise server_error(error, self._target.address) from error
        finally:
            call.cancel()

    async def _ask(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, metadata=self._target.metadata)
        except grpc.RpcError as error:
            raise server_error(error, self._target.address) from error
