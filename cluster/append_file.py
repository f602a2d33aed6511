"""A file that grows by whole appends, and frames in it that show when they are torn."""

import errno
import logging
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from headrace.scheduler.errors import JobError

logger = logging.getLogger(__name__)

_FRAME = struct.Struct("<II")  # length and CRC-32 of the payload
_MAX_FRAME = 1 << 20  # bytes; a longer length is garbage


class AppendFile:
    """A regular file, created by `open` or by the first append. OSErrors become JobErrors."""

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self.path, self._mode = path, mode
        self.size = 0
        self._fd: int | None = None

    @property
    def fd(self) -> int:
        assert self._fd is not None
        return self._fd

    def open(self) -> None:
        with explained(self.path, "open"):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, self._mode)
            status = os.fstat(self._fd)
            self.size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise JobError(f"{self.path} is not a regular file, which a resumable job needs")
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the file's name must survive a power cut, too
            finally:
                os.close(folder)

    def append(self, data: bytes) -> int:
        """Write all of `data` or, when the disk refuses, nothing. Returns the offset."""
        if self._fd is None:
            self.open()
        offset = self.size
        with explained(self.path, "write to"):
            try:
                written = 0
                while written < len(data):
                    written += os.write(self.fd, data[written:])
            except OSError:
                os.ftruncate(self.fd, offset)
                raise
        self.size += len(data)
        return offset

    def holds(self, offset: int, length: int, crc: int) -> bool:
        if self._fd is None:
            return False
        with explained(self.path, "read"):
            return zlib.crc32(os.pread(self.fd, length, offset)) == crc

    def cut(self, size: int) -> None:
        if self.size > size:
            logger.warning(
                "%s: %d bytes that were not finished are cut", self.path, self.size - size
            )
            with explained(self.path, "truncate"):
                os.ftruncate(self.fd, size)
            self.size = size

    def frames(self) -> Iterator[tuple[Any, int]]:
        """Yield (payload, offset of its end) up to the first frame that is torn."""
        end = 0
        with explained(self.path, "read"), open(self.fd, "rb", closefd=False) as file:
            file.seek(0)
            while len(head := file.read(_FRAME.size)) == _FRAME.size:
                length, crc = _FRAME.unpack(head)
                if not 0 < length <= _MAX_FRAME:
                    return
                body = file.read(length)
                if len(body) < length or zlib.crc32(body) != crc:
                    return
                end += _FRAME.size + length
                yield msgspec.msgpack.decode(body), end

    def sync(self) -> None:
        if self._fd is not None:
            with explained(self.path, "flush"):
                os.fsync(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def frame(payload: Any) -> bytes:
    """The bytes of one frame around a msgpack payload."""
    body = msgspec.msgpack.encode(payload)
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


@contextmanager
def explained(path: Path, verb: str) -> Iterator[None]:
    """Turn an OSError into a JobError that says what to do."""
    try:
        yield
    except OSError as error:
        message = f"cannot {verb} {path}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += ". Every finished row is safe: make room and repeat the command to go on"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOENT):
            message += ": choose an --output that you may write"
        raise JobError(message) from error
