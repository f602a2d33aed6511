"""A cold tier: a place that fsspec knows, with models' records and the objects that they are made of.

    models/NAME.json             a record; written last, so that a model is whole or not there
    objects/ab/abcdef...         a chunk, by the SHA-256 of its bytes
    objects/ab/abcdef....0123... the difference of that chunk from the one after the dot
    leases/...                   who is pushing or removing (lease.py)

Whatever is written has its name when it is whole: object stores do that by themselves, elsewhere it
gets another name first.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import fsspec
from aiohttp import ClientError
from fsspec.implementations.local import LocalFileSystem

from headrace.runtime.block_file import sync_directory
from headrace.scheduler.errors import ColdTierError

T = TypeVar("T")

MODELS = "models"
OBJECTS = "objects"
TRIES = 4
PAUSE_SECONDS = 0.5
"""Before another try; twice as long each time."""

PARTIAL = ".partial-"
WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory", "r2"}
"""Protocols of object stores, where what is being written cannot be seen."""

_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)


@dataclass(frozen=True, slots=True)
class Found:
    """An entry of a folder."""

    name: str
    nbytes: int


class ColdTier:
    """Bytes by paths below `url`. Any thread may use it. Raises ColdTierError, naming what it was doing."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            # A listing from before another machine wrote would be of no use.
            self._fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ColdTierError(f"cannot use {url}: {error}") from error
        self._root = root.rstrip("/")
        protocols = (
            {self._fs.protocol} if isinstance(self._fs.protocol, str) else {*self._fs.protocol}
        )
        self._puts_are_whole = bool(protocols & WHOLE_PUTS)
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def read(self, path: str) -> bytes | None:
        """All bytes; None where there is no such file."""
        with self._doing("read", path):
            try:
                return self._tried(lambda: bytes(self._fs.cat_file(self._at(path))))
            except FileNotFoundError:
                return None

    def write(self, path: str, data: bytes) -> None:
        """Replaces what is there."""
        with self._doing("write", path):
            self._tried(lambda: self._write(path, data))

    def remove(self, path: str) -> None:
        """No error if it is gone already."""
        with self._doing("remove", path), suppress(FileNotFoundError):
            self._tried(lambda: self._fs.rm_file(self._at(path)))

    def entries(self, folder: str) -> list[Found]:
        """The files in a folder; none if there is no such folder."""
        with self._doing("list", folder):
            try:
                self._fs.invalidate_cache(self._at(folder))
                listed = self._tried(lambda: self._fs.ls(self._at(folder), detail=True))
            except FileNotFoundError:
                return []
        return [
            Found(entry["name"].rstrip("/").rpartition("/")[2], entry["size"] or 0)
            for entry in listed
            if entry["type"] == "file"
        ]

    def age(self, path: str) -> float:
        """Seconds since the file was written; 0 if it is gone."""
        with self._doing("look at", path):
            try:
                written: datetime = self._tried(lambda: self._fs.modified(self._at(path)))
            except FileNotFoundError:
                return 0.0
        return (datetime.now(UTC) - written.astimezone(UTC)).total_seconds()

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _write(self, path: str, data: bytes) -> None:
        where = self._at(path)
        if self._puts_are_whole:
            self._fs.pipe_file(where, data)
            return
        folder = where.rpartition("/")[0]
        partial = f"{folder}/{PARTIAL}{uuid4().hex}"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            if self._is_local:
                _write_durably(partial, data)
                os.replace(partial, where)
                sync_directory(Path(folder))
            else:
                self._fs.pipe_file(partial, data)
                self._fs.mv(partial, where)
        except BaseException:
            if self._fs.exists(partial):
                self._fs.rm_file(partial)
            raise

    def _tried(self, work: Callable[[], T]) -> T:
        """Networks fail for moments. What lasts is raised at once."""
        for trial in range(TRIES - 1):
            try:
                return work()
            except _LASTING:
                raise
            except (OSError, ClientError):
                time.sleep(PAUSE_SECONDS * 2**trial)
        return work()

    @contextmanager
    def _doing(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ClientError, NotImplementedError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ColdTierError(f"cannot {verb} {path} in {self.url}: {why}") from error


def _write_durably(file: str, data: bytes) -> None:
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
