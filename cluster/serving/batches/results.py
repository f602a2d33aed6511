"""What came of a batch, read from any of its lines on."""

from contextlib import ExitStack
from typing import BinaryIO

from headrace.cluster.serving.batches.file_store import FileStore
from headrace.cluster.serving.batches.records import Batch
from headrace.scheduler.errors import RequestError

CHUNK = 64 << 10
"""Bytes of lines that are read at once, or one line."""


class Results:
    """The answers of an ended batch and then its errors, as one text, from the byte `offset` on.

    Opened on the store's `disk` thread, and read by one other at a time. ApiError 404 when they are no longer
    kept; RequestError for an offset where no line begins.
    """

    def __init__(self, store: FileStore, batch: Batch, offset: int) -> None:
        self._offset = offset
        self._files: list[BinaryIO] = []
        with ExitStack() as stack:
            sizes = []
            for file_id in (batch.output_file_id, batch.error_file_id):
                if file_id is not None:
                    file, opened = store.read(batch.owner, file_id)
                    self._files.append(stack.enter_context(opened))
                    sizes.append(file.bytes)
            self._seek(offset, sizes)
            self._opened = stack.pop_all()

    def read(self) -> list[tuple[bytes, int]]:
        """Lines, each with the offset behind it; empty at the end."""
        while self._files:
            if lines := self._files[0].readlines(CHUNK):
                return [(line, self._advance(line)) for line in lines]
            del self._files[0]
        return []

    def close(self) -> None:
        """Safe to call twice."""
        self._opened.close()

    def _advance(self, line: bytes) -> int:
        self._offset += len(line)
        return self._offset

    def _seek(self, offset: int, sizes: list[int]) -> None:
        while sizes and offset >= sizes[0]:
            offset -= sizes.pop(0)
            del self._files[0]
        if not offset:
            return
        if offset > 0 and sizes:
            self._files[0].seek(offset - 1)
            if self._files[0].read(1) == b"\n":
                return
        raise RequestError("no line of the results begins at this offset", "offset")
