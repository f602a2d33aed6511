"""The routes of files and batches."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.cluster.rows import load_object
from headrace.cluster.serving.batches.file_store import FileLimits, FileStore, Upload, too_large
from headrace.cluster.serving.batches.form import FileForm
from headrace.cluster.serving.batches.manager import Batches
from headrace.cluster.serving.batches.records import StoredFile
from headrace.cluster.serving.batches.requests import (
    BatchPage,
    BatchRequest,
    FileFields,
    FilePage,
)
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.http import JSON, read_body, require_json
from headrace.cluster.serving.openapi import READS, Method, Route

CHUNK = 1 << 20
"""Bytes of a file in memory at once, of each that is sent or received."""

_FORM_BYTES = 64 << 10
"""What a form may take besides its file."""

_DRAINED = 64 << 20

_CHANGES = (400, 404, 500)

_METHODS: tuple[Method, ...] = ("GET", "POST", "DELETE")

P = TypeVar("P", bound=BaseModel)

PATHS = frozenset({"/v1/files", "/v1/batches"})


class _Listed(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def shown(self) -> dict[str, Any]: ...


class FileRoutes:
    """Takes files in and gives them out; `batches` owns the thread that knows which there are."""

    def __init__(self, store: FileStore, batches: Batches, max_body: int) -> None:
        self._store, self._batches, self._max_body = store, batches, max_body

    @property
    def routes(self) -> list[Route]:
        return [
            Route(
                "POST",
                "/v1/files",
                self.upload,
                "Upload a file",
                form=FileFields,
                errors=(*READS, 500),
            ),
            Route(
                "GET", "/v1/files", self.list_files, "List files", query=FilePage, errors=(400, 404)
            ),
            Route("GET", "/v1/files/{file_id}", self.file, "Look at a file", errors=(404,)),
            Route(
                "GET",
                "/v1/files/{file_id}/content",
                self.content,
                "Download a file",
                kinds=("application/octet-stream",),
                errors=(404, 500),
            ),
            Route("DELETE", "/v1/files/{file_id}", self.delete, "Delete a file", errors=_CHANGES),
            Route(
                "POST",
                "/v1/batches",
                self.create,
                "Start a batch",
                body=BatchRequest,
                errors=(*READS, 404, 500, 503),
            ),
            Route(
                "GET",
                "/v1/batches",
                self.list_batches,
                "List batches",
                query=BatchPage,
                errors=(400, 404),
            ),
            Route("GET", "/v1/batches/{batch_id}", self.batch, "Look at a batch", errors=(404,)),
            Route(
                "POST",
                "/v1/batches/{batch_id}/cancel",
                self.cancel,
                "Cancel a batch",
                errors=_CHANGES,
            ),
        ]

    async def upload(self, request: Request) -> Response:
        _check_origin(request)
        form = FileForm(request.headers.get("content-type", ""))
        upload = await asyncio.to_thread(self._store.upload)
        try:
            await _receive(request, form, upload, self._store.limits)
            form.check_whole()
            fields = FileFields.model_validate(form.fields)
            assert form.filename is not None
            seconds = self._store.limits.ttl if fields.seconds is None else fields.seconds
            if seconds > self._store.limits.ttl:
                raise ApiError(
                    400,
                    f"this server keeps files for {self._store.limits.ttl} seconds at most",
                    param="expires_after",
                    code="invalid_value",
                )
            await asyncio.to_thread(upload.sync)
            file = await self._batches.on_disk(
                upload.finish, _tenant(request), form.filename, fields.purpose, seconds
            )
        finally:
            await asyncio.to_thread(upload.close)
        return JSON(file.shown)

    async def list_files(self, request: Request) -> Response:
        query = _page(FilePage, request).query
        more = replace(query, limit=query.limit + 1)
        found = await self._batches.on_disk(self._store.listed, _tenant(request), more)
        return JSON(_list(found, query.limit))

    async def file(self, request: Request, file_id: str) -> Response:
        found = await self._batches.on_disk(self._store.find, _tenant(request), file_id)
        return JSON(found.shown)

    async def content(self, request: Request, file_id: str) -> Response:
        file, opened = await self._batches.on_disk(self._store.read, _tenant(request), file_id)
        return _Content(file, opened)

    async def delete(self, request: Request, file_id: str) -> Response:
        await self._batches.on_disk(self._store.delete, _tenant(request), file_id)
        return JSON({"id": file_id, "object": "file", "deleted": True})

    async def create(self, request: Request) -> Response:
        require_json(request)
        raw = await read_body(request, self._max_body)
        given = await asyncio.to_thread(load_object, raw, "the body")
        present = {name: value for name, value in given.items() if value is not None}
        wanted = BatchRequest.model_validate(present)
        return JSON((await self._batches.create(_tenant(request), wanted)).shown)

    async def list_batches(self, request: Request) -> Response:
        query = _page(BatchPage, request).query
        more = replace(query, limit=query.limit + 1)
        found = await self._batches.listed(_tenant(request), more)
        return JSON(_list(found, query.limit))

    async def batch(self, request: Request, batch_id: str) -> Response:
        return JSON((await self._batches.find(_tenant(request), batch_id)).shown)

    async def cancel(self, request: Request, batch_id: str) -> Response:
        _check_origin(request)
        return JSON((await self._batches.cancel(_tenant(request), batch_id)).shown)


class NoFiles:
    """The same routes of a server that keeps no files."""

    @property
    def routes(self) -> list[Route]:
        paths = [path for base in PATHS for path in (base, base + "/{rest:path}")]
        return [Route(method, path, self.refuse) for path in paths for method in _METHODS]

    async def refuse(self) -> Response:
        told = "this server keeps no files: start it with --files DIR for /v1/files and /v1/batches"
        raise ApiError(404, told, code="files_not_kept")


class _Content(StreamingResponse):
    """A file from the disk; closes it, however that ends."""

    def __init__(self, file: StoredFile, opened: BinaryIO) -> None:
        self._opened = opened
        headers = {"Content-Length": str(file.bytes)}
        super().__init__(self._chunks(), media_type="application/octet-stream", headers=headers)

    async def __call__(self, *given: Any) -> None:
        with self._opened:
            await super().__call__(*given)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while chunk := await asyncio.to_thread(self._opened.read, CHUNK):
            yield chunk


async def _receive(request: Request, form: FileForm, upload: Upload, limits: FileLimits) -> None:
    """The whole body, a chunk at a time. Of one that is refused some more is read all the same: a client
    that is still sending would not see why."""
    size, held = 0, bytearray()
    error: ApiError | None = None
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.each + _FORM_BYTES:
        raise too_large(limits)
    async for chunk in request.stream():
        size += len(chunk)
        if error is not None:
            if size > _DRAINED:
                break
            continue
        try:
            form.feed(chunk)
            held += form.take()
            if size > limits.each + _FORM_BYTES:
                raise too_large(limits)
            if len(held) >= CHUNK:
                taken, held = bytes(held), bytearray()
                await asyncio.to_thread(upload.write, taken)
        except ApiError as found:
            error = found
            await asyncio.to_thread(upload.close)  # others may have its room meanwhile
    if error is None:
        await asyncio.to_thread(upload.write, bytes(held))
    else:
        raise error


def _check_origin(request: Request) -> None:
    """A page of another origin may send forms, and requests without a body, without asking first."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, "this server takes no files from web pages", code="unknown_origin")


def _page(shape: type[P], request: Request) -> P:
    return shape.model_validate(dict(request.query_params))


def _list(found: Sequence[_Listed], limit: int) -> dict[str, Any]:
    """`found` has one more than was asked for, if there are more."""
    shown = found[:limit]
    return {
        "object": "list",
        "data": [each.shown for each in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": len(found) > limit,
    }


def _tenant(request: Request) -> str:
    tenant: str = request.state.tenant
    return tenant
