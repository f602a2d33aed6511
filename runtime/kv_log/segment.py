"""Files of KV segments: aligned reads and writes, and what is found in them at start."""

import errno
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from headrace.runtime.kv_log.keys import SegmentCipher
from headrace.runtime.kv_log.record import (
    BLOCK,
    HEAD_BYTES,
    TAG_BYTES,
    Entry,
    Head,
    Miss,
    SegmentHeader,
    aligned,
    digest_of,
    footer_place,
    pack_head,
    unpack_footer,
    unpack_head,
)

log = logging.getLogger(__name__)

EXTENT_BYTES = 256 << 10
"""Least bytes of pages in a write, but for what a flush finds waiting."""

_PROBE_NAME = "headrace-kv.probe"
_KEPT_BUFFERS = 8
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class Buffers:
    """Page-aligned memory for reads and writes, handed out again rather than mapped again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []

    @contextmanager
    def take(self, nbytes: int) -> Iterator[memoryview]:
        """`nbytes` writable bytes, whatever is in them."""
        memory = self._find(nbytes) or mmap.mmap(-1, aligned(nbytes))
        try:
            with memoryview(memory) as whole, whole[:nbytes] as view:
                yield view
        finally:
            with self._lock:
                if len(self._free) < _KEPT_BUFFERS:
                    self._free.append(memory)

    def _find(self, nbytes: int) -> mmap.mmap | None:
        """The smallest that is large enough; a smaller one makes room for what is needed now."""
        with self._lock:
            self._free.sort(key=len)
            for i, memory in enumerate(self._free):
                if len(memory) >= nbytes:
                    return self._free.pop(i)
            if len(self._free) == _KEPT_BUFFERS:
                del self._free[0]
            return None

    def kept(self) -> list[np.ndarray]:
        """Those that nobody has at the moment."""
        with self._lock:
            return [np.frombuffer(memory, np.uint8) for memory in self._free]

    def close(self) -> None:
        with self._lock:
            self._free.clear()


class Disk:
    """Reads and writes of whole blocks; a file is open only as long as one of them takes.

    Nothing is flushed: pages that a power cut takes are computed again, and checksums show which. What
    was written survives the process in any case.
    """

    def __init__(self, *, direct: bool) -> None:
        self.direct = direct
        self._flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)

    @classmethod
    def probe(cls, directory: Path) -> "Disk":
        """O_DIRECT if a file there takes it. Logged, once a log. Raises OSError for an unusable folder."""
        try:
            direct = _takes_direct(directory)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            direct = True  # it was opened; that there is no room for it shows soon enough
        log.info(
            "KV pages in %s are written %s",
            directory,
            "with O_DIRECT" if direct else "through the page cache: no O_DIRECT on this filesystem",
        )
        return cls(direct=direct)

    def write(self, file: Path, offset: int, data: memoryview) -> None:
        """Create the file with the first of it. Raises OSError; what was written until then is garbage."""
        assert offset % BLOCK == 0 and len(data) % BLOCK == 0
        create = 0 if offset else os.O_CREAT | os.O_EXCL
        descriptor = os.open(file, os.O_WRONLY | create | self._flags, 0o600)
        try:
            write_blocks(descriptor, offset, data, direct=self.direct)
        finally:
            os.close(descriptor)

    def read(self, file: Path, offset: int, memory: memoryview) -> int:
        """Bytes read, fewer than asked for only where the file ends."""
        assert offset % BLOCK == 0 and len(memory) % BLOCK == 0
        descriptor = os.open(file, os.O_RDONLY | self._flags)
        try:
            return read_blocks(descriptor, offset, memory, direct=self.direct)
        finally:
            os.close(descriptor)


def write_blocks(descriptor: int, offset: int, data: memoryview, *, direct: bool) -> None:
    """Write whole blocks. Raises OSError; what was written until then is garbage."""
    done = 0
    while done < len(data):
        count = os.pwrite(descriptor, data[done:], offset + done)
        if count % BLOCK and done + count < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count
    if not direct:  # clean pages alone can be dropped
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)


def read_blocks(descriptor: int, offset: int, memory: memoryview, *, direct: bool) -> int:
    """Bytes read of whole blocks, fewer than asked for only where the file ends. Raises OSError."""
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        done += count
        if count == 0 or count % BLOCK:
            break
    if not direct:
        os.posix_fadvise(descriptor, offset, len(memory), os.POSIX_FADV_DONTNEED)
    return done


def _takes_direct(directory: Path) -> bool:
    file = directory / _PROBE_NAME
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return False
        raise
    finally:
        file.unlink(missing_ok=True)  # some filesystems make it, and refuse then
    try:
        with mmap.mmap(-1, BLOCK) as block:
            return os.pwrite(descriptor, block, 0) == BLOCK
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return False
        raise
    finally:
        os.close(descriptor)


def record_bytes(nbytes: int, *, encrypted: bool) -> int:
    return HEAD_BYTES + nbytes + (TAG_BYTES if encrypted else 0)


def encode(cipher: SegmentCipher | None, head: Head, page: memoryview, out: memoryview) -> int:
    """Fill `out` with a record; returns the checksum of what is stored after its head."""
    body = head.body()
    stored = out[HEAD_BYTES:]
    if cipher is None:
        copy(page, stored)
    else:
        cipher.encrypt(head.number, page, body, stored)
    packed, checksum = pack_head(body, stored)
    out[:HEAD_BYTES] = packed
    return checksum


def decode(
    record: memoryview,
    header: SegmentHeader,
    key: bytes,
    nbytes: int,
    cipher: SegmentCipher | None,
    page: memoryview | None,
) -> Miss | None:
    """Why `record` is not the page that it should be; None when it is, and `page` holds it.

    `key` is the hidden one. Without a `page`, checksums alone are verified. On a miss, what `page` holds
    is undefined.
    """
    found = unpack_head(record)
    if found is None:
        return Miss.DAMAGED
    head, body, checksum = found
    if head.generation != header.generation or head.identity != header.identity:
        return Miss.STALE
    if head.key != key or head.nbytes != nbytes or head.cohort != header.cohort:
        return Miss.DAMAGED
    stored = record[HEAD_BYTES : record_bytes(nbytes, encrypted=bool(header.salt))]
    if xxhash.xxh3_64_intdigest(stored) != checksum:
        return Miss.DAMAGED
    if page is None:
        return None
    if cipher is None:
        copy(stored, page)
        return None
    return None if cipher.decrypt(head.number, stored, body, page) else Miss.UNAUTHENTIC


def copy(source: memoryview, dest: memoryview) -> None:
    """By numpy, because it lets other threads run meanwhile."""
    np.copyto(np.frombuffer(dest, np.uint8), np.frombuffer(source, np.uint8))


@dataclass(frozen=True, slots=True)
class Found:
    """A segment as it lies on disk."""

    path: Path
    number: int
    header: SegmentHeader
    nbytes: int  # of the file
    entries: tuple[Entry, ...]
    sealed: bool

    @property
    def payload(self) -> int:
        """Bytes of pages."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def encrypted(self) -> bool:
        return bool(self.header.salt)

    @property
    def digest(self) -> bytes:
        return digest_of(self.header.generation, self.entries)


def scan(path: Path, number: int) -> Found | None:
    """What a segment holds; None for a file that no log wrote. Raises OSError.

    A segment without a footer is of a process that was killed, or is being written. It is walked from
    head to head rather than thrown away: the last segments of each cohort are what was used last. What
    the heads promise is verified when it is read, as everything is. A failed write leaves a hole, behind
    which the next head starts at a block.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        header = SegmentHeader.unpack(os.pread(descriptor, BLOCK, 0))
        if header is None:
            return None
        size = os.fstat(descriptor).st_size
        entries = _read_footer(descriptor, size, header)
        sealed = entries is not None
        if entries is None:
            entries = tuple(_walk(descriptor, size, header))
        return Found(path, number, header, size, entries, sealed)
    finally:
        os.close(descriptor)


def _read_footer(descriptor: int, size: int, header: SegmentHeader) -> tuple[Entry, ...] | None:
    place = footer_place(os.pread(descriptor, BLOCK, max(size - BLOCK, 0)), size)
    if place is None:
        return None
    footer = unpack_footer(os.pread(descriptor, size - place[0], place[0]))
    if footer is None or footer.generation != header.generation:
        return None
    return footer.entries


def _walk(descriptor: int, size: int, header: SegmentHeader) -> Iterator[Entry]:
    offset = BLOCK
    while offset < size:
        found = unpack_head(os.pread(descriptor, HEAD_BYTES, offset))
        if found is None or found[0].generation != header.generation:
            offset = aligned(offset + 1)
            continue
        head, _, checksum = found
        end = offset + record_bytes(head.nbytes, encrypted=bool(header.salt))
        if end <= size:
            yield Entry(head.key, offset, head.nbytes, checksum)
        offset = end
