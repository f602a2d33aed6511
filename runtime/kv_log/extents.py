"""How pages of a KV log reach the drive: extents of records, seals of segments, deletions."""

import errno
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headrace.runtime.kv_log.catalog import Catalog, NoRoom
from headrace.runtime.kv_log.cohort import Cohort, Placement, Segment, Stored, Waiting
from headrace.runtime.kv_log.endurance import WriteBudget
from headrace.runtime.kv_log.record import (
    BLOCK,
    KEY_BYTES,
    Entry,
    Footer,
    Head,
    aligned,
    footer_bytes,
)
from headrace.runtime.kv_log.segment import Buffers, Disk, encode, record_bytes
from headrace.runtime.kv_log.start import NewSegments
from headrace.runtime.kv_log.stats import Counts

log = logging.getLogger(__name__)

MAX_EXTENT = 8 << 20
"""Bytes of pages in one write, and a quarter of a segment at most; a larger page is one of its own."""


class Page(NamedTuple):
    """A page to be written, and what stands for it in the index until then."""

    key: bytes
    payload: memoryview | bytes
    mark: Waiting


class ExtentWriter:
    """Writes for a `Catalog`. `changed` is its lock, notified whenever a pin or a file goes."""

    def __init__(
        self,
        catalog: Catalog,
        changed: threading.Condition,
        new: NewSegments,
        disk: Disk,
        buffers: Buffers,
        budget: WriteBudget,
        counts: Counts,
    ) -> None:
        self._catalog = catalog
        self._changed = changed
        self._new = new
        self._disk = disk
        self._buffers = buffers
        self._budget = budget
        self._counts = counts
        self._max_extent = min(MAX_EXTENT, catalog.segment_bytes // 4)
        self._warned = False

    def key(self, tenant: str) -> bytes | None:
        """To encrypt with; None for a log in clear. Raises HeadraceError for an unusable file of keys."""
        return None if self._new.keys is None else self._new.keys.key(tenant)

    def write(self, cohort: Cohort, pages: Sequence[Page]) -> None:
        """Write pages of a cohort. Those that cannot be are lost: counted, and out of the index."""
        extents = list(_extents(pages, self._max_extent))
        try:
            key = self.key(cohort.tenant)
            while extents:
                self._write_extent(cohort, extents.pop(0), key)
        finally:
            for extent in extents:  # after an error of the keys' file, or one that nobody expected
                self._settle(None, extent, [])

    def _write_extent(self, cohort: Cohort, extent: Sequence[Page], key: bytes | None) -> None:
        placement = None
        entries: list[Entry] = []
        try:
            placement = self._place(cohort, extent, key)
            if placement is not None:
                entries = self._write(placement, extent)
        finally:
            self._settle(placement, extent, entries)
            self.work_off()

    def _place(self, cohort: Cohort, extent: Sequence[Page], key: bytes | None) -> Placement | None:
        """Room for an extent; waits until what has to go for it is gone. None if there will be none."""
        nbytes = aligned(
            sum(record_bytes(len(page.payload), encrypted=key is not None) for page in extent)
        )
        while True:
            with self._changed:
                try:
                    placement = self._try_place(cohort, nbytes, len(extent), key)
                except NoRoom:
                    return None
                if placement is not None:
                    return placement
                if not self._catalog.to_unlink and not self._catalog.to_seal:
                    self._changed.wait()
            self.work_off()

    def _try_place(
        self, cohort: Cohort, nbytes: int, records: int, key: bytes | None
    ) -> Placement | None:
        """With the lock held."""
        if cohort.dropped or (key is not None and not self._is_current(cohort.tenant, key)):
            raise NoRoom  # deleted meanwhile: what follows must not be written any more
        catalog, now = self._catalog, self._catalog.back(cohort)
        if now.open is not None and not now.open.has_header:
            return None  # its first extent is being written, and the header with it
        fits = catalog.room_in(now, nbytes, records)
        if not catalog.make_room(nbytes if fits else nbytes + BLOCK, now):
            return None
        now = catalog.back(now)
        if not fits:
            catalog.retire(now)
            now.open = self._new.make(now, key)
            catalog.add(now.open)
        assert now.open is not None
        return catalog.place(now.open, nbytes, records)

    def _is_current(self, tenant: str, key: bytes) -> bool:
        return self._new.keys is not None and self._new.keys.find(tenant) == key

    def _write(self, placement: Placement, extent: Sequence[Page]) -> list[Entry]:
        """What was written; nothing when the drive refuses."""
        segment, start = placement.segment, placement.offset
        header = b"" if start else segment.header.pack()
        nbytes = len(header) + placement.nbytes
        self._budget.add(nbytes - sum(len(page.payload) for page in extent))
        with self._buffers.take(nbytes) as memory:
            memory[: len(header)] = header
            entries = _fill(memory, len(header), placement, extent)
            try:
                self._timed_write(segment, start, memory)
            except OSError as error:
                segment.is_foreign = not start and isinstance(error, FileExistsError)
                self._warn(segment, error)
                return []
        return entries

    def _timed_write(self, segment: Segment, offset: int, memory: memoryview) -> None:
        start = time.perf_counter()
        try:
            self._disk.write(segment.path, offset, memory)
        finally:
            seconds = time.perf_counter() - start
            with self._changed:
                self._counts.seconds_writing += seconds
                self._counts.bytes_written += len(memory)

    def _settle(
        self, placement: Placement | None, extent: Sequence[Page], entries: Sequence[Entry]
    ) -> None:
        catalog = self._catalog
        with self._changed:
            written = bool(entries)
            for i, page in enumerate(extent):
                if catalog.index.get(page.key) is not page.mark:
                    continue  # dropped meanwhile
                if placement is None or not written or placement.segment.is_doomed:
                    del catalog.index[page.key]
                    self._counts.lost += 1
                else:
                    stored = Stored(placement.segment, entries[i].offset, entries[i].nbytes)
                    catalog.hold(page.key, stored)
            if placement is not None:
                self._account(placement, extent, entries, written)
                catalog.unpin(placement.segment)
            self._changed.notify_all()

    def _account(
        self,
        placement: Placement,
        extent: Sequence[Page],
        entries: Sequence[Entry],
        written: bool,
    ) -> None:
        segment = placement.segment
        if written:
            payload = sum(entry.nbytes for entry in entries)
            segment.has_header = True
            segment.entries.extend(entries)
            segment.pages += len(entries)
            segment.payload += payload
            self._counts.payload_written += payload
        elif placement.offset == 0:
            self._catalog.doom(segment)
        elif segment.cohort.open is segment:  # after a hole nothing is added
            self._catalog.retire(segment.cohort)

    def _warn(self, segment: Segment, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        log.log(
            logging.DEBUG if self._warned else logging.WARNING,
            "%s: KV pages cannot be written (%s%s); they are computed again when they are needed",
            segment.path,
            error.strerror,
            ": make room, or give the log a smaller cap" if full else "",
        )
        self._warned = True

    def work_off(self) -> None:
        """Seal and delete what is due, without the lock."""
        while True:
            with self._changed:
                if self._catalog.to_unlink:
                    work, segment = self._unlink, self._catalog.to_unlink.popleft()
                elif self._catalog.to_seal:
                    work, segment = self._seal, self._catalog.to_seal.popleft()
                else:
                    return
            work(segment)

    def _unlink(self, segment: Segment) -> None:
        left = False
        try:
            if not segment.is_foreign:
                segment.path.unlink(missing_ok=True)
        except OSError as error:
            left = True
            log.warning("%s cannot be deleted: %s", segment.path, error.strerror)
        with self._changed:
            self._catalog.unlinked(segment, left=left)
            self._changed.notify_all()

    def _seal(self, segment: Segment) -> None:
        """Write the footer. A segment that has none is walked instead when it is opened again."""
        with self._changed:
            if segment.is_doomed or segment.is_sealed or segment.pins:
                return
            segment.is_sealed = True
            footer = Footer(segment.header.generation, tuple(segment.entries))
            offset, nbytes = segment.end, footer_bytes(len(segment.entries))
            segment.end += nbytes
            segment.pins += 1
            self._catalog.used += nbytes
        try:
            self._budget.add(nbytes)
            with self._buffers.take(nbytes) as memory:
                memory[:] = footer.pack(offset)
                self._timed_write(segment, offset, memory)
        except OSError as error:
            self._warn(segment, error)
        finally:
            with self._changed:
                segment.digest = segment.deleted().digest
                segment.entries.clear()
                self._catalog.unpin(segment)
                self._changed.notify_all()


def _extents(pages: Sequence[Page], most: int) -> Iterator[list[Page]]:
    """Of about the same size, so that the last one is not much smaller than it has to be."""
    total = sum(len(page.payload) for page in pages)
    enough = total / -(-total // most)
    extent: list[Page] = []
    nbytes = 0
    for page in pages:
        if extent and (nbytes >= enough or nbytes + len(page.payload) > most):
            yield extent
            extent, nbytes = [], 0
        extent.append(page)
        nbytes += len(page.payload)
    yield extent


def _fill(
    memory: memoryview, start: int, placement: Placement, extent: Sequence[Page]
) -> list[Entry]:
    """Records one after the other from `start` on, zeros behind them."""
    segment = placement.segment
    cipher, header = segment.cipher, segment.header
    keys = b"".join(page.key for page in extent)
    hidden = keys if cipher is None else cipher.hide(keys)
    entries = []
    at = start
    for i, page in enumerate(extent):
        nbytes = len(page.payload)
        key = hidden[i * KEY_BYTES : (i + 1) * KEY_BYTES]
        number = placement.number + i
        head = Head(header.identity, key, header.cohort, header.generation, number, nbytes)
        end = at + record_bytes(nbytes, encrypted=cipher is not None)
        checksum = encode(cipher, head, memoryview(page.payload), memory[at:end])
        entries.append(Entry(key, placement.offset + at, nbytes, checksum))
        at = end
    memory[at:] = bytes(len(memory) - at)
    return entries
