"""How pages of a KV log come back from the drive: read, verified, decrypted."""

import threading
import time
from collections.abc import Iterator

from headrace.runtime.kv_log.catalog import Catalog
from headrace.runtime.kv_log.cohort import Stored
from headrace.runtime.kv_log.record import BLOCK, Miss, aligned
from headrace.runtime.kv_log.segment import Buffers, Disk, decode, record_bytes
from headrace.runtime.kv_log.stats import Counts
from headrace.runtime.memory.held import Holding, named


class PageReader:
    """Reads for a `Catalog`. `changed` is its lock, notified when a pin goes."""

    def __init__(
        self,
        catalog: Catalog,
        changed: threading.Condition,
        disk: Disk,
        buffers: Buffers,
        counts: Counts,
    ) -> None:
        self._catalog = catalog
        self._changed = changed
        self._disk = disk
        self._buffers = buffers
        self._counts = counts

    def fetch(self, key: bytes, place: Stored, dest: memoryview) -> Miss | None:
        """Fill `dest`, or say why not and forget the page. The segment is pinned; it is unpinned here."""
        miss: Miss | None = Miss.IO
        try:
            miss = self._read(key, place, dest)
        except OSError:
            miss = Miss.IO
        finally:
            with self._changed:
                if miss is not None:
                    self._catalog.forget(key, place)
                self._catalog.unpin(place.segment)
                self._changed.notify_all()
        return miss

    def _read(self, key: bytes, place: Stored, dest: memoryview) -> Miss | None:
        segment, cipher = place.segment, place.segment.cipher
        nbytes = record_bytes(place.nbytes, encrypted=cipher is not None)
        start = place.offset // BLOCK * BLOCK
        before = place.offset - start
        with self._buffers.take(aligned(before + nbytes)) as memory:
            if self._timed_read(place, start, memory) < before + nbytes:
                return Miss.DAMAGED
            hidden = key if cipher is None else cipher.hide(key)
            record = memory[before : before + nbytes]
            return decode(record, segment.header, hidden, place.nbytes, cipher, dest)

    def _timed_read(self, place: Stored, start: int, memory: memoryview) -> int:
        begun = time.perf_counter()
        count = self._disk.read(place.segment.path, start, memory)
        seconds = time.perf_counter() - begun
        with self._changed:
            self._counts.seconds_reading += seconds
        return count

    def memory(self) -> Iterator[Holding]:
        return named("host_log", self._buffers.kept())

    def close(self) -> None:
        self._buffers.close()


def check_size(dest: memoryview, nbytes: int) -> None:
    if dest.nbytes != nbytes:
        raise ValueError(f"the page has {nbytes} bytes, what it is to be read into {dest.nbytes}")
