"""The service of batches: those of /v1/batches, whose lines come and go in messages instead of files."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec

from headrace.cluster.serving.batches.file_store import Upload
from headrace.cluster.serving.batches.manager import Batches
from headrace.cluster.serving.batches.records import Batch
from headrace.cluster.serving.batches.requests import BatchOptions, BatchPage
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.guard import Gate
from headrace.cluster.serving.rpc import batch_pb2 as pb
from headrace.cluster.serving.rpc.batch_pb2_grpc import BatchServicer
from headrace.cluster.serving.rpc.door import Door, unreadable
from headrace.scheduler.errors import RequestError

NAME: str = pb.DESCRIPTOR.services_by_name["Batch"].full_name

CHUNK = 1 << 20
"""Bytes of an input in memory at once, besides a message."""


class BatchService(BatchServicer):
    """Calls count among the requests that a key may have at once, as those of the routes do."""

    def __init__(self, batches: Batches | None, gate: Gate, door: Door) -> None:
        self._batches, self._gate, self._door = batches, gate, door

    async def Submit(self, requests: AsyncIterator[pb.SubmitRequest], context: Any) -> pb.BatchJob:
        async with self._call(context, "Submit", requests) as (batches, owner):
            # At once: if a thread made it, and the call was cancelled then, nobody would close it.
            upload = batches.upload()
            try:
                options = await _receive(requests, upload)
                await asyncio.to_thread(upload.sync)
                return _job(await batches.submit(owner, upload, options))
            finally:
                await asyncio.to_thread(upload.close)

    async def Get(self, request: pb.GetBatchRequest, context: Any) -> pb.BatchJob:
        async with self._call(context, "Get", request) as (batches, owner):
            return _job(await batches.find(owner, request.id))

    async def List(self, request: pb.ListBatchesRequest, context: Any) -> pb.ListBatchesResponse:
        async with self._call(context, "List", request) as (batches, owner):
            given = {field.name: value for field, value in request.ListFields()}
            query = BatchPage.model_validate(given).query
            found = await batches.listed(owner, replace(query, limit=query.limit + 1))
            jobs = [_job(each) for each in found[: query.limit]]
            return pb.ListBatchesResponse(batches=jobs, has_more=len(found) > query.limit)

    async def Cancel(self, request: pb.CancelBatchRequest, context: Any) -> pb.BatchJob:
        async with self._call(context, "Cancel", request) as (batches, owner):
            return _job(await batches.cancel(owner, request.id))

    async def Results(self, request: pb.ResultsRequest, context: Any) -> None:
        async with self._call(context, "Results", request) as (batches, owner):
            batch = await batches.ended(owner, request.id, wait=request.wait)
            results = await batches.results(batch, request.offset)
            try:
                while lines := await asyncio.to_thread(results.read):
                    found = [
                        pb.Result(line=line[:-1].decode(), next_offset=offset)
                        for line, offset in lines
                    ]
                    await context.write(pb.ResultsResponse(results=found))
            finally:
                results.close()

    @asynccontextmanager
    async def _call(
        self, context: Any, method: str, request: object
    ) -> AsyncIterator[tuple[Batches, str]]:
        async with self._door.call(context, f"{NAME}/{method}", request):
            if self._batches is None:
                told = "this server keeps no files: start it with --files DIR for batches"
                raise ApiError(501, told, code="files_not_kept")
            with self._gate.running(self._door.key(context)) as caller:
                yield self._batches, caller.tenant


async def _receive(requests: AsyncIterator[pb.SubmitRequest], upload: Upload) -> BatchOptions:
    """All lines into a file; what is wrong with the options is said before."""
    options: BatchOptions | None = None
    held = bytearray()
    async for request in requests:
        if request is None:
            raise unreadable(f"{NAME}/Submit")
        if request.HasField("options") == (options is not None):
            raise RequestError("the first message must have options, and no other may", "options")
        options = options or _options(request.options)
        for line in request.lines:
            if "\n" in line:
                raise RequestError("a line may have no line break in it", "lines")
            held += line.encode() + b"\n"
        if len(held) >= CHUNK:
            taken, held = bytes(held), bytearray()
            await asyncio.to_thread(upload.write, taken)
    if options is None:
        raise RequestError("the first message must have options", "options")
    await asyncio.to_thread(upload.write, bytes(held))
    return options


def _options(options: pb.BatchOptions) -> BatchOptions:
    given: dict[str, Any] = {field.name: value for field, value in options.ListFields()}
    if "metadata" in given:
        given["metadata"] = dict(options.metadata)
    if "output_expires_after" in given:
        seconds = given["output_expires_after"]
        given["output_expires_after"] = {"anchor": "created_at", "seconds": seconds}
    return BatchOptions.model_validate(given)


def _job(batch: Batch) -> pb.BatchJob:
    return pb.BatchJob(
        id=batch.id,
        status=pb.BatchStatus.Value(f"BATCH_STATUS_{batch.status.name}"),
        endpoint=batch.endpoint,
        model=batch.model,
        metadata=batch.metadata or {},
        counts=pb.LineCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        errors=[pb.LineError(**msgspec.to_builtins(fault)) for fault in batch.errors],
        input_file_id=batch.input_file_id,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        expires_at=batch.expires_at,
        **batch.times,
    )
