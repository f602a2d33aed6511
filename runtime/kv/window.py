"""Slots on NVMe for full KV pages of requests that go on decoding over them.

Unlike the log, which is written once and read page by page, this is memory: a file of fixed size without
a name, gone with its process however that ends, in which slots are written again and again. It lies
layer by layer, and each part of a page, which is what one layer has of it, begins at a block:

    layer 0: part of slot 0, part of slot 1, ...     layer 1: part of slot 0, ...

so that what a layer needs of consecutive slots is one read. All that tells a good part from a bad one is
kept in RAM: its checksum and, encrypted (AES-256-GCM), its tag and its nonce. The key is drawn at start and
never leaves memory, and the nonce is the number of the write, counted up over the whole file: none is used
twice with the key, not after a failed write either. An old part that the drive gives for a new one fails
its checksum like any other damage.
"""

import errno
import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from headrace.runtime.kv_log.record import BLOCK, TAG_BYTES, aligned
from headrace.runtime.kv_log.segment import Buffers, Disk, copy, read_blocks, write_blocks
from headrace.runtime.memory.held import Holding, named
from headrace.scheduler.errors import DoesNotFitError, KVLogError
from headrace.scheduler.sizes import format_size

log = logging.getLogger(__name__)

_KEY_BYTES = 32
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


class Blocks(Protocol):
    """Whole blocks by their offset. Several threads call it at once."""

    def write(self, offset: int, data: memoryview) -> None:
        """Raises OSError."""

    def read(self, offset: int, memory: memoryview) -> int:
        """Bytes read, fewer than asked for where there are no more. Raises OSError."""

    def close(self) -> None: ...


class NamelessFile:
    """A file of `nbytes` in `directory` that no name leads to, with all its blocks reserved.

    Raises DoesNotFitError when the drive has no such room, KVLogError for a folder that takes no file.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        try:
            self._direct = Disk.probe(directory).direct
            self._descriptor = _open_nameless(directory)
        except OSError as error:
            raise _unusable(directory, error) from error
        try:
            os.posix_fallocate(self._descriptor, 0, nbytes)
            if self._direct:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            os.close(self._descriptor)
            if error.errno in _NO_ROOM:
                raise _no_room(directory, nbytes) from error
            raise _unusable(directory, error) from error

    def write(self, offset: int, data: memoryview) -> None:
        write_blocks(self._descriptor, offset, data, direct=self._direct)

    def read(self, offset: int, memory: memoryview) -> int:
        return read_blocks(self._descriptor, offset, memory, direct=self._direct)

    def close(self) -> None:
        os.close(self._descriptor)


def _open_nameless(directory: Path) -> int:
    try:
        return os.open(directory, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_NAMELESS:
            raise
    return open_unlinked(directory)


def open_unlinked(directory: Path) -> int:
    """For a filesystem that has no files without a name: one that loses its name at once."""
    path = directory / "headrace-kv-window.tmp"
    path.unlink(missing_ok=True)  # of a process that was killed just there
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    return descriptor


def _no_room(directory: Path, nbytes: int) -> DoesNotFitError:
    free = os.statvfs(directory)
    return DoesNotFitError(
        f"{directory} has {format_size(free.f_bavail * free.f_frsize)} free, but KV pages that requests"
        f" decode over from there (--kv-hot-window) take {format_size(nbytes, up=True)} of --kv-disk from"
        " the start: make room, or lower --kv-disk"
    )


def _unusable(directory: Path, error: OSError) -> KVLogError:
    return KVLogError(
        f"cannot make a file for KV pages in {directory}: {error.strerror}; give --kv-directory"
        " another folder, or leave --kv-hot-window out"
    )


class PageWindow:
    """`count` slots, each for a page of all of a stage's layers, `page_bytes` by layer.

    A slot is written by one thread at a time and read by any number of them when it has been. Nothing
    here raises for damage: it is found, and said. `may_write` is asked for each page, of so many bytes.
    Owns `blocks`.
    """

    def __init__(
        self,
        page_bytes: Mapping[int, int],
        count: int,
        blocks: Blocks,
        *,
        encrypted: bool,
        may_write: Callable[[int], bool] = lambda _: True,
    ) -> None:
        assert count > 0
        self.num_slots, self.page_bytes = count, dict(page_bytes)
        self._blocks, self._may_write = blocks, may_write
        self._index = {layer: i for i, layer in enumerate(page_bytes)}
        self._strides = [aligned(nbytes) for nbytes in page_bytes.values()]
        self._starts = [0, *accumulate(count * stride for stride in self._strides)]
        self._buffers = Buffers()
        self._cipher = AESGCM(secrets.token_bytes(_KEY_BYTES)) if encrypted else None
        self._lock = threading.Lock()
        self._writes = 0
        self._closed = False
        shape = len(self._strides), count
        self._numbers = np.zeros(shape, np.uint64)  # of the writes of the parts; 0: none
        self._sums = np.zeros(shape, np.uint64)
        self._tags = np.zeros((*shape, TAG_BYTES), np.uint8)

    @property
    def page_size(self) -> int:
        """Bytes of a page of all layers, as they are read."""
        return sum(self._strides)

    def stride(self, layer: int) -> int:
        """Bytes from a slot's part of the layer to the next slot's."""
        return self._strides[self._index[layer]]

    def write(self, slot: int, parts: Sequence[memoryview]) -> bool:
        """A page, layer by layer; False where no more may be written today. OSError: the slot holds
        nothing."""
        if not self._may_write(self.page_size):
            return False
        for i, part in enumerate(parts):
            with self._buffers.take(self._strides[i] + BLOCK) as memory:
                self._write_part(i, slot, part, memory)
        return True

    def _write_part(self, i: int, slot: int, part: memoryview, memory: memoryview) -> None:
        nbytes, stride = part.nbytes, self._strides[i]
        with self._lock:
            self._writes += 1
            number = self._writes
        if self._cipher is None:
            copy(part, memory[:nbytes])
        else:
            self._cipher.encrypt_into(_nonce(number), part, None, memory[: nbytes + TAG_BYTES])
            self._tags[i, slot] = np.frombuffer(memory[nbytes : nbytes + TAG_BYTES], np.uint8)
        self._sums[i, slot] = xxhash.xxh3_64_intdigest(memory[:nbytes])
        self._numbers[i, slot] = 0
        self._blocks.write(self._starts[i] + slot * stride, memory[:stride])
        self._numbers[i, slot] = number

    def read(self, layer: int, first: int, dest: np.ndarray) -> list[int]:
        """Fill dest, uint8 [n, page_bytes[layer]], with the layer's parts of n slots from `first` on.

        Returns the rows that could not be had; what they hold is undefined.
        """
        i, count = self._index[layer], len(dest)
        stride = self._strides[i]
        with self._buffers.take(count * stride + BLOCK) as memory:
            if self._fill(self._starts[i] + first * stride, memory[: count * stride]):
                return [
                    row
                    for row in range(count)
                    if not self._take(i, first + row, memory[row * stride :], dest[row].data)
                ]
        if count == 1:
            return [0]
        # Not all of them have to be lost.
        return [row for row in range(count) if self.read(layer, first + row, dest[row : row + 1])]

    def _fill(self, offset: int, memory: memoryview) -> bool:
        try:
            return self._blocks.read(offset, memory) == len(memory)
        except OSError as error:
            log.warning("KV pages on NVMe cannot be read: %s", error.strerror)
            return False

    def _take(self, i: int, slot: int, stored: memoryview, page: memoryview) -> bool:
        """Whether what was read is what was written last; `page` is filled with it then.

        `stored` goes on behind the part, where its tag is put for a moment.
        """
        nbytes, number = page.nbytes, int(self._numbers[i, slot])
        if not number or xxhash.xxh3_64_intdigest(stored[:nbytes]) != int(self._sums[i, slot]):
            log.warning("a KV page on NVMe is damaged")
            return False
        if self._cipher is None:
            copy(stored[:nbytes], page)
            return True
        end = slice(nbytes, nbytes + TAG_BYTES)
        behind = bytes(stored[end])
        stored[end] = self._tags[i, slot].tobytes()
        try:
            self._cipher.decrypt_into(_nonce(number), stored[: end.stop], None, page)
        except InvalidTag:
            log.warning("a KV page on NVMe was tampered with")
            return False
        finally:
            stored[end] = behind
        return True

    def memory(self) -> Iterator[Holding]:
        """What tells good parts from bad ones, and buffers that nobody has at the moment."""
        tables = self._numbers, self._sums, self._tags
        return named("host_window", [*tables, *self._buffers.kept()])

    def close(self) -> None:
        """Nothing is read or written any more. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._blocks.close()
            self._buffers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
