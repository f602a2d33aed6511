"""The page cache of this machine: its room, what it holds, and reading into it ahead of use."""

import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from headrace.runtime.manifest import ALIGN_BLOCK

log = logging.getLogger(__name__)

THREADS = 4
PIECE_BYTES = 8 << 20


def available_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path | None = None) -> int:
    """Bytes that the page cache may grow to: the machine's, or this container's if it is less."""
    lines = dict(line.split(":", 1) for line in proc.read_text().splitlines())
    machine = int(lines["MemAvailable"].split()[0]) * 1024
    limit = cgroup or Path("/sys/fs/cgroup/memory.max")
    try:
        room = int(limit.read_text()) - int(limit.with_name("memory.current").read_text())
        used = limit.with_name("memory.stat").read_text()
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return machine
    sizes = dict(line.split() for line in used.splitlines())
    cached = int(sizes["active_file"]) + int(sizes["inactive_file"])  # counted as used
    return min(machine, room + cached)


def cached_share(file: Path, offset: int, nbytes: int, samples: int = 64) -> float | None:
    """The share of evenly spread pages that a read finds without waiting; None if unknown."""
    step = max(nbytes // samples // ALIGN_BLOCK, 1) * ALIGN_BLOCK
    places = range(offset, offset + nbytes, step)
    try:
        with file.open("rb", buffering=0) as opened:
            found = sum(_is_cached(opened.fileno(), place) for place in places)
    except OSError:  # a filesystem that cannot tell
        return None
    return found / len(places)


def _is_cached(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(ALIGN_BLOCK)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


class ReadAhead:
    """Threads that read files into the page cache, in order, until all is there or `close`.

    Nothing depends on it: whoever reads these bytes finds them sooner. A file that cannot be read is
    left to them, who will say so.
    """

    def __init__(self, files: Sequence[Path], threads: int = THREADS) -> None:
        self._pieces: queue.SimpleQueue[tuple[Path, int]] = queue.SimpleQueue()
        for file in files:
            for offset in range(0, file.stat().st_size, PIECE_BYTES):
                self._pieces.put((file, offset))
        self._may_begin = threading.Event()
        self._may_begin.set()
        self._reading = threading.Semaphore(threads)
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"headrace-ahead-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Read nothing meanwhile: somebody measures the drive."""
        self._may_begin.clear()
        for _ in self._threads:
            self._reading.acquire()
        try:
            yield
        finally:
            self._reading.release(len(self._threads))
            self._may_begin.set()

    def wait(self) -> None:
        """Return when everything has been read."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        memory = bytearray(PIECE_BYTES)
        try:
            while self._may_begin.wait() and not self._closed.is_set():
                with self._reading:
                    file, offset = self._pieces.get_nowait()
                    with file.open("rb", buffering=0) as opened:
                        os.preadv(opened.fileno(), [memory], offset)
        except queue.Empty:
            pass
        except OSError as error:
            log.info("reading ahead ended: %s", error)

    def close(self) -> None:
        self._closed.set()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
