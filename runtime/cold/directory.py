"""A store's directory while files come to it: one process at a time, names only for what is whole."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.runtime.manifest import Block
from headrace.scheduler.errors import StoreError


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Creates the directory and keeps others out; the lock goes with its holder, however that ends."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StoreError(f"cannot write a store to {store}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def pulling(file: Path) -> Path:
    """What a file is called until it is whole."""
    return file.with_name(file.name + ".pulling")


def has_its_size(block: Block) -> bool:
    try:
        return block.file.stat().st_size == block.data_offset + block.nbytes
    except FileNotFoundError:
        return False


def refuse_small_disk(path: Path, files: Iterable[tuple[Path, int]]) -> None:
    """StoreError when the disk has no room for files of these sizes, beyond what of them is there."""
    disk, needed = os.statvfs(path), 0
    for file, nbytes in files:
        with suppress(FileNotFoundError):  # blocks of a file are taken as it is written
            needed -= pulling(file).stat().st_blocks * 512
        needed += nbytes
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise StoreError(
            f"{needed:,} more bytes are needed in {path}, where {free:,} are free: free"
            f" {needed - free:,} bytes, choose another disk, or bring fewer layers"
        )
