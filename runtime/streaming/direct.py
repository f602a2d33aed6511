"""Reads by threads of ours: O_DIRECT, or buffered where a filesystem or the page cache asks for it.

Each thread takes the next chunk in order of asking. On its way to the device a chunk passes one of
the thread's two page-aligned pinned buffers, so that one is read into while the other is copied.
"""

import errno
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from headrace.runtime.manifest import ALIGN_BLOCK
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.loads import CopyStream, Load, PendingLoad, check_extent, too_short
from headrace.runtime.streaming.tiers import AlignedBuffer
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.errors import StoreError

THREADS = 8
CHUNK_BYTES = 8 << 20


class OpenFiles:
    """File descriptors by path, opened once, and exact reads from them."""

    def __init__(self, *, direct: bool, drop_behind: bool) -> None:
        self._flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        self._direct = direct
        self._drop_behind = drop_behind
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}

    def read(self, file: Path, offset: int, memory: memoryview) -> None:
        """Fill `memory` from `offset` on. Raises StoreError for whatever prevents it."""
        try:
            descriptor = self._descriptor(file)
            self._read(descriptor, file, offset, memory)
            if self._drop_behind:
                os.posix_fadvise(descriptor, offset, len(memory), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._explained(error, file) from error

    def _read(self, descriptor: int, file: Path, offset: int, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            count = os.preadv(descriptor, [memory[done:]], offset + done)
            done += count
            # O_DIRECT reads an odd number of bytes only where the file ends.
            ended = count == 0 or (self._direct and done % ALIGN_BLOCK != 0)
            if ended and done < len(memory):
                raise too_short(file, offset + done, offset + len(memory))

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            descriptor = self._descriptors.get(file)
            if descriptor is None:
                descriptor = self._descriptors[file] = os.open(file, self._flags)
            return descriptor

    def _explained(self, error: OSError, file: Path) -> StoreError:
        if self._direct and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return StoreError(
                f"{file}: this filesystem refuses O_DIRECT ({error.strerror}); use storage "
                "'buffered', or move the store to a local disk"
            )
        return StoreError(f"{file}: reading failed: {error.strerror or error}")

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])


class _Staging:
    """One thread's two buffers, allocated when first used, taken in turns."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._nbytes = nbytes
        self._pinned = pinned
        self._buffers: list[AlignedBuffer] = []
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """The other buffer, as soon as the copy out of it is done."""
        self._turn = 1 - self._turn
        while len(self._buffers) <= self._turn:
            self._buffers.append(AlignedBuffer(self._nbytes, pinned=self._pinned))
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._buffers[self._turn].tensor[:nbytes]

    def in_use_until(self, copied: torch.cuda.Event) -> None:
        self._copied[self._turn] = copied

    def memory(self) -> Iterator[Holding]:
        return named("readers", [buffer.tensor for buffer in self._buffers])

    def close(self) -> None:
        for copied in self._copied:
            if copied is not None:
                copied.synchronize()
        while self._buffers:
            self._buffers.pop().close()


@dataclass(frozen=True, slots=True)
class _Part:
    load: PendingLoad
    file: Path
    offset: int
    dest: torch.Tensor


class ThreadedStorage:
    """The reading threads; `files` says how the bytes leave the disk."""

    def __init__(
        self,
        name: str,
        files: OpenFiles,
        device: torch.device,
        *,
        alignment: int,
        threads: int,
        chunk_bytes: int,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        assert chunk_bytes % ALIGN_BLOCK == 0
        self.name = name
        self._files = files
        self._alignment = alignment
        self._chunk_bytes = chunk_bytes
        self._tracer = tracer
        self._copies = CopyStream(device, tracer) if device.type == "cuda" else None
        self._parts: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._staging: list[_Staging] = []
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"headrace-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def load(self, file: Path, offset: int, dest: torch.Tensor) -> Load:
        assert not self._closed.is_set()
        check_extent(offset, dest)
        starts = range(0, dest.nbytes, self._chunk_bytes)
        load = PendingLoad(file, dest, len(starts), self._copies)
        for start in starts:
            piece = dest[start : start + self._chunk_bytes]
            self._parts.put(_Part(load, file, offset + start, piece))
        return load

    def _work(self) -> None:
        if self._copies is not None:
            self._copies.enter_thread()
        staging = _Staging(self._chunk_bytes, pinned=self._copies is not None)
        self._staging.append(staging)
        try:
            while self._take(staging):
                pass
        finally:
            staging.close()

    def _take(self, staging: _Staging) -> bool:
        """Finish the next part; False at the end. A thread that waits holds no part: its buffer may
        be the probe's, whose memory belongs to the plan."""
        part = self._parts.get()
        if part is None:
            return False
        self._finish(part, staging)
        return True

    def _finish(self, part: _Part, staging: _Staging) -> None:
        """Errors travel in the load: a part that is never finished would hang its reader."""
        try:
            if self._closed.is_set():
                raise StoreError(f"{part.file}: not read, the storage is closed")
            if not part.load.failed:
                self._read(part, staging)
        except Exception as error:  # noqa: BLE001 - raised again by Load.wait
            part.load.fail(error)
        finally:
            part.load.finish_part()

    def _read(self, part: _Part, staging: _Staging) -> None:
        if not part.dest.is_cuda and part.dest.data_ptr() % self._alignment == 0:
            self._fill(part, part.dest)
            return
        chunk = staging.take(part.dest.nbytes)
        self._fill(part, chunk)
        if part.load.after is None:
            with torch.inference_mode(), self._tracer.span(Kind.COPY, nbytes=chunk.nbytes):
                part.dest.copy_(chunk)
        else:
            assert self._copies is not None, "a storage for a CPU was given a CUDA tensor"
            staging.in_use_until(self._copies.copy(part.dest, chunk, part.load.after))

    def _fill(self, part: _Part, memory: torch.Tensor) -> None:
        with self._tracer.span(Kind.READ, part.file.stem, nbytes=memory.nbytes):
            self._files.read(part.file, part.offset, memory.numpy().data)

    def memory(self) -> Iterator[Holding]:
        """The buffers that have been used."""
        for staging in [*self._staging]:
            yield from staging.memory()

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            for _ in self._threads:
                self._parts.put(None)
        for thread in self._threads:
            thread.join()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DirectStorage(ThreadedStorage):
    """O_DIRECT: no page cache, no second copy in RAM; what a model larger than RAM wants."""

    def __init__(
        self,
        device: torch.device,
        threads: int = THREADS,
        chunk_bytes: int = CHUNK_BYTES,
        *,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        super().__init__(
            "direct",
            OpenFiles(direct=True, drop_behind=False),
            device,
            alignment=ALIGN_BLOCK,
            threads=threads,
            chunk_bytes=chunk_bytes,
            tracer=tracer,
        )


class BufferedStorage(ThreadedStorage):
    """Reads through the page cache, and drops behind itself what the cache cannot keep anyway.

    With `keep_cache` it leaves the pages there: right only if RAM holds everything that a pass
    streams, since a cycle larger than an LRU cache never hits it.
    """

    def __init__(
        self,
        device: torch.device,
        threads: int = THREADS,
        chunk_bytes: int = CHUNK_BYTES,
        *,
        keep_cache: bool = False,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        super().__init__(
            "buffered",
            OpenFiles(direct=False, drop_behind=not keep_cache),
            device,
            alignment=1,
            threads=threads,
            chunk_bytes=chunk_bytes,
            tracer=tracer,
        )
