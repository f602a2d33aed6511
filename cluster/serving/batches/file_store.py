"""Files of clients in one directory: nobody else reads them, they have a cap together, and they end.

    lock            held by the server that uses the directory
    catalog.db      which files and batches there are
    files/ID        what uploads and batches left, each with a row in the catalog
    uploads/        what is on its way; nothing of it survives a start
    batches/ID/     the journal and the results of a batch that is unfinished

A file exists when the catalog has it. Content is complete before its row is written, and goes after
it; whatever a crash leaves without a row is deleted at the next start.
"""

import fcntl
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self
from uuid import uuid4

import msgspec

from headrace.cluster.serving.batches.catalog import Catalog, Query
from headrace.cluster.serving.batches.records import BATCH_BYTES, Batch, StoredFile
from headrace.cluster.serving.batches.space import Space
from headrace.cluster.serving.errors import ApiError
from headrace.scheduler.errors import HeadraceError

log = logging.getLogger(__name__)

LOCK, CATALOG, FILES, UPLOADS, BATCHES = "lock", "catalog.db", "files", "uploads", "batches"


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Sizes in bytes, of all files together and of one; `ttl` in seconds."""

    total: int = 10 << 30
    each: int = 512 << 20
    ttl: int = 30 * 86400


class FileStore:
    """One directory. After it was opened, its `disk` thread alone uses the catalog and deletes files.

    HeadraceError for a directory that others can read, that another server uses or that is none of ours.
    """

    def __init__(
        self, directory: Path, limits: FileLimits, clock: Callable[[], float] = time.time
    ) -> None:
        self.directory, self.limits, self._clock = directory, limits, clock
        self.space = Space(limits.total)
        try:
            _make_private(directory)
            self._lock = _locked(directory)
            try:
                for name in (FILES, UPLOADS, BATCHES):
                    _make_private(directory / name)
                self.catalog = Catalog(directory / CATALOG)
                self._sweep()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise HeadraceError(f"cannot use --files {directory}: {error.strerror}") from error
        self.disk = ThreadPoolExecutor(1, "headrace-files")

    def close(self) -> None:
        """Safe to call twice."""
        if self._lock >= 0:
            self.disk.shutdown()
            self.catalog.close()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def now(self) -> int:
        return int(self._clock())

    def path(self, file_id: str) -> Path:
        """Where the content of a file in the catalog is."""
        return self.directory / FILES / file_id

    def folder(self, batch_id: str) -> Path:
        """Where an unfinished batch has its journal."""
        return self.directory / BATCHES / batch_id

    def upload(self) -> "Upload":
        return Upload(self)

    def find(self, owner: str, file_id: str) -> StoredFile:
        """ApiError 404 for a file that is not there or another one's."""
        file = self.catalog.file(file_id)
        if file is None or file.owner != owner or file.expires_at <= self.now:
            raise ApiError(404, f"there is no file {file_id[:80]!r}", param="id", code="not_found")
        return file

    def listed(self, owner: str, query: Query) -> list[StoredFile]:
        return [file for file in self.catalog.files(owner, query) if file.expires_at > self.now]

    def read(self, owner: str, file_id: str) -> tuple[StoredFile, BinaryIO]:
        file = self.find(owner, file_id)
        return file, self.path(file.id).open("rb")

    def delete(self, owner: str, file_id: str) -> None:
        file = self.find(owner, file_id)
        if self.catalog.is_read(file.id):
            raise ApiError(
                400,
                f"{file.id} is the input of a batch that is unfinished: cancel the batch first",
                param="id",
                code="file_in_use",
            )
        self._remove(file)

    def expire(self) -> None:
        """Delete the files and forget the batches whose time is over."""
        for file in self.catalog.expired_files(self.now):
            self._remove(file)
        self.space.give(BATCH_BYTES * self.catalog.remove_batches(self.now))

    def settle(self, batch: Batch, results: list[tuple[StoredFile, Path]]) -> None:
        """Write that a batch has ended, and have its results be files, at once."""
        with self.catalog.transaction():
            for file, origin in results:
                placed = str(origin.relative_to(self.directory))
                self.catalog.add_file(msgspec.structs.replace(file, origin=placed))
            self.catalog.put_batch(batch)
        for file, origin in results:
            self.space.count(file.space)
            origin.rename(self.path(file.id))
        if results:
            _sync_folder(self.directory / FILES)
        shutil.rmtree(self.folder(batch.id), ignore_errors=True)

    def admit(self, file: StoredFile, content: Path) -> None:
        """Have the content of an upload, whose space is taken already, be a file."""
        content.rename(self.path(file.id))
        _sync_folder(self.directory / FILES)
        try:
            self.catalog.add_file(file)
        except BaseException:
            self.path(file.id).unlink()
            raise

    def _remove(self, file: StoredFile) -> None:
        self.catalog.remove_file(file.id)
        self.path(file.id).unlink(missing_ok=True)
        self.space.give(file.space)

    def _sweep(self) -> None:
        """Delete what a crash left half done, and count what is there."""
        known = self.catalog.all_files()
        for file in known:
            self._recover(file)
        open_ids = {batch.id for batch in self.catalog.open_batches()}
        ids = {file.id for file in known}
        for folder, kept in ((UPLOADS, set()), (FILES, ids), (BATCHES, open_ids)):
            for path in (self.directory / folder).iterdir():
                if path.name not in kept:
                    log.warning("%s is left of a server that died: deleted", path)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.space.count(sum(file.space for file in self.catalog.all_files()))
        self.space.count(BATCH_BYTES * self.catalog.num_batches())
        self.expire()

    def _recover(self, file: StoredFile) -> None:
        path = self.path(file.id)
        if path.exists():
            return
        if file.origin is not None and (self.directory / file.origin).exists():
            (self.directory / file.origin).rename(path)
            return
        log.error("the content of %s is gone: it is forgotten", path)
        self.catalog.remove_file(file.id)


class Upload:
    """A file on its way to the disk: all of it becomes a file by `finish`, or nothing of it stays.

    It may be closed while another thread's call is under way, which then ends first or does nothing. `write`
    raises ApiError when there is no room for more.
    """

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self._path = store.directory / UPLOADS / uuid4().hex
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        self._taken, self._size = 0, 0
        self._lock = threading.Lock()

    def write(self, data: bytes) -> None:
        limits = self._store.limits
        with self._open() as descriptor:
            if self._size + len(data) > limits.each:
                raise too_large(limits)
            self._take(len(data))
            written = 0
            try:
                while written < len(data):
                    written += os.write(descriptor, data[written:])
            except OSError as error:
                log.error("cannot write to %s: %s", self._path, error.strerror)
                raise ApiError(
                    500, "the server cannot store files now", code="storage_failed"
                ) from error
            self._size += len(data)

    def sync(self) -> None:
        """Have all that was written survive a power cut."""
        with self._open() as descriptor:
            os.fsync(descriptor)

    def finish(self, owner: str, filename: str, purpose: str, expires_after: int) -> StoredFile:
        """Called on the store's `disk` thread."""
        now = self._store.now
        with self._open():
            file = StoredFile(
                id=f"file-{uuid4().hex}",
                owner=owner,
                filename=filename,
                purpose=purpose,
                bytes=self._size,
                created_at=now,
                expires_at=now + expires_after,
            )
            self._take(file.space - self._taken)
            self._store.admit(file, self._path)
            self._taken = 0
        return file

    def close(self) -> None:
        """Leave nothing, unless it was finished. Safe to call twice."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                self._path.unlink(missing_ok=True)
                self._store.space.give(self._taken)

    @contextmanager
    def _open(self) -> Iterator[int]:
        """ApiError when it was closed meanwhile, which nobody is there to read."""
        with self._lock:
            if self._fd < 0:
                raise ApiError(499, "the upload was given up")
            yield self._fd

    def _take(self, size: int) -> None:
        space = self._store.space
        if not space.take(size):
            raise ApiError(
                413,
                f"the server keeps {space.limit} bytes of files and has {space.used}: delete some",
                code="storage_full",
            )
        self._taken += size


def too_large(limits: FileLimits) -> ApiError:
    told = f"a file may have {limits.each} bytes: send several"
    return ApiError(413, told, param="file", code="file_too_large")


def _make_private(directory: Path) -> None:
    """HeadraceError for one that others may read or write."""
    directory.mkdir(0o700, exist_ok=True)
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & 0o077:
        raise HeadraceError(
            f"{directory} has mode {mode:04o}: others could read what clients send. Run"
            f" `chmod 700 {directory}`"
        )


def _locked(directory: Path) -> int:
    names = {path.name for path in directory.iterdir()}
    if names and LOCK not in names:
        raise HeadraceError(
            f"--files {directory} has content that is not a server's: choose an empty directory"
        )
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise HeadraceError(
            f"another server uses --files {directory}: choose another directory"
        ) from error
    return lock


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
