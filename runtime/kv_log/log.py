"""Pages of KV on NVMe: an append-only log of segments, checksummed and encrypted, capped in bytes.

A page is put once under its key and is immutable. Small pages of a cohort are gathered in memory until
they make a write of 256 KiB; each cohort has segment files of its own, so that what goes together is
deleted by unlinking files: nothing is ever copied or rewritten, and a byte of page costs little more than
a byte of drive. Every record is verified when it is read. Whatever is wrong with it, the page is computed
again: a miss is an answer, never an error.

Threads may put and get at once. One lock guards what is in memory (`Catalog`); it is never held during
I/O, encryption or copies of whole pages. A put waits only for the deletion of what it displaces. Nothing
can wait in a circle: a put holds no pin while it waits, and who holds one never waits.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from headrace.runtime.kv_log.catalog import Catalog
from headrace.runtime.kv_log.cohort import Cohort, Stored, Waiting
from headrace.runtime.kv_log.deletion import delete_cohorts
from headrace.runtime.kv_log.directory_lock import DirectoryLock
from headrace.runtime.kv_log.endurance import WriteBudget
from headrace.runtime.kv_log.extents import ExtentWriter
from headrace.runtime.kv_log.intake import Intake
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.reader import PageReader, check_size
from headrace.runtime.kv_log.receipt import Receipt, receipt
from headrace.runtime.kv_log.record import Miss, identity_digest
from headrace.runtime.kv_log.segment import Buffers, Disk, copy
from headrace.runtime.kv_log.start import LEDGER_NAME, check_options, load, make_directory, max_page
from headrace.runtime.kv_log.stats import Counts, KVLogStats
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.stage_config import TENANT
from headrace.scheduler.errors import KVLogError
from headrace.scheduler.kv_room import SEGMENT_BYTES


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a log was opened with."""

    directory: Path
    created: bool  # the directory, by us
    identity: bytes  # its digest
    keys: KeyRing | None
    keep: bool
    ttl: float | None
    clock: Callable[[], float]


class KVLog:
    """One stage's log, in a directory that is no other log's. `KVLog.open` makes one."""

    def __init__(
        self,
        setting: _Setting,
        lock: DirectoryLock,
        catalog: Catalog,
        changed: threading.Condition,
        intake: Intake,
        writer: ExtentWriter,
        reader: PageReader,
        budget: WriteBudget,
        counts: Counts,
    ) -> None:
        self.budget = budget
        self._setting = setting
        self._lock = lock
        self._catalog = catalog
        self._changed = changed  # the lock of the catalog and the counts
        self._intake = intake
        self._writer = writer
        self._reader = reader
        self._counts = counts
        self._expires = 0.0  # nothing does before
        self._active = 0  # calls under way
        self._closed = False
        self._receipt: Receipt | None = None

    @classmethod
    def open(
        cls,
        directory: Path,
        identity: bytes,
        cap: int,
        *,
        keys: KeyRing | None = None,
        keep: bool = False,
        ttl: float | None = None,
        daily_writes: int | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open the log in `directory`, which is created (mode 0700) if it is not there.

        `identity` stands for all that makes a page useless elsewhere: model, format, the stage's layers.
        `cap` bounds the bytes on the drive. With `keys` every page is encrypted. `keep` says whether
        close() leaves the pages there for a log to come; it needs keys in a file, or none. Pages go `ttl`
        seconds after their segment was begun, with the next call of any kind. `daily_writes` are bytes a
        day, in this directory.
        Raises ValueError for arguments that cannot be, KVLogError for a directory that cannot be used.
        """
        check_options(cap, segment_bytes, ttl, keep, keys)
        created = make_directory(directory)
        setting = _Setting(directory, created, identity_digest(identity), keys, keep, ttl, clock)
        try:
            lock = DirectoryLock(directory)
            try:
                log = cls._start(setting, lock, cap, segment_bytes, daily_writes)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise KVLogError(f"cannot keep KV pages in {directory}: {error.strerror}") from error
        with log._operation(), log._changed:
            log._catalog.make_room(0)
        return log

    @classmethod
    def _start(
        cls,
        setting: _Setting,
        lock: DirectoryLock,
        cap: int,
        segment_bytes: int,
        daily_writes: int | None,
    ) -> Self:
        directory, clock = setting.directory, setting.clock
        disk, buffers = Disk.probe(directory), Buffers()
        counts, changed = Counts(), threading.Condition()
        catalog, new = load(
            directory,
            setting.identity,
            setting.keys,
            clock,
            lambda run: Catalog(cap, segment_bytes, run),
            counts,
        )
        budget = WriteBudget(directory / LEDGER_NAME, daily_writes, clock)
        writer = ExtentWriter(catalog, changed, new, disk, buffers, budget, counts)
        reader = PageReader(catalog, changed, disk, buffers, counts)
        intake = Intake(catalog, changed, budget, counts, clock, max_page(segment_bytes))
        return cls(setting, lock, catalog, changed, intake, writer, reader, budget, counts)

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """A call: it starts by forgetting what has expired, and close() waits for its end."""
        with self._changed:
            assert not self._closed, "the KV log is closed"
            self._active += 1
            self._expire()
        try:
            yield
        finally:
            self._writer.work_off()
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def _expire(self) -> None:
        ttl, now = self._setting.ttl, self._setting.clock()
        if ttl is not None and now >= self._expires:
            self._expires = min(now, self._catalog.expire(now - ttl)) + ttl

    def put(
        self, cohort: int, pages: Iterable[tuple[bytes, memoryview]], *, tenant: str = TENANT
    ) -> list[bytes]:
        """Write (key of 16 bytes, page) pairs; returns the keys of them that the log now has.

        Those that it had before are among them. Pages of less than 256 KiB together are copied, and
        written with later ones of the cohort; others are on the drive when this returns, or with another
        put that was first. What is missing was lost (disk full) or refused (daily budget), and counted.
        Raises ValueError for what can be no page, HeadraceError for a file of keys that cannot be used.
        """
        given = [(bytes(key), page.cast("B")) for key, page in pages]
        self._intake.check(given, tenant)
        with self._operation():
            self._writer.key(tenant)  # now, while there is nothing to lose
            with self._changed:
                target = self._catalog.cohort(cohort, tenant)
            batch = self._intake.admit(target, given)
            if batch:
                self._writer.write(target, batch)
            while surplus := self._intake.take_surplus():
                self._writer.write(*surplus)
            with self._changed:
                self._catalog.tidy(target)
                return [key for key, _ in given if key in self._catalog.index]

    def memory(self) -> Iterator[Holding]:
        """Pages that wait for company, and buffers."""
        with self._changed:
            waiting = [mark for mark in self._catalog.index.values() if isinstance(mark, Waiting)]
            payloads = [np.frombuffer(mark.payload, np.uint8) for mark in waiting if mark.payload]
        yield from named("host_log", payloads)
        yield from self._reader.memory()

    def flush(self) -> None:
        """Write the pages that wait for others, in extents as small as they are."""
        with self._operation():
            self._flush()

    def _flush(self) -> None:
        for cohort, batch in self._intake.take_all():
            self._writer.write(cohort, batch)

    def get(self, key: bytes, dest: memoryview) -> bool:
        """Fill `dest` with a page; False, counted by its reason, if it cannot be had.

        `dest` then holds anything. Raises ValueError if it is not of the page's size.
        """
        dest = dest.cast("B")
        with self._operation():
            with self._changed:
                place = self._catalog.index.get(key)
                if isinstance(place, Stored):
                    check_size(dest, place.nbytes)
                    place.segment.pins += 1
                    self._catalog.touch(place.segment.cohort)
            miss: Miss | None = None
            if isinstance(place, Stored):
                miss = self._reader.fetch(key, place, dest)
            elif place is not None and (payload := place.served) is not None:
                check_size(dest, len(payload))
                copy(memoryview(payload), dest)
            else:
                miss = Miss.ABSENT
            self._count(miss)
            return miss is None

    def _count(self, miss: Miss | None) -> None:
        with self._changed:
            if miss is None:
                self._counts.hits += 1
            else:
                self._counts.misses[miss] += 1

    def keys(self) -> list[bytes]:
        """Of all pages that get() would look for, those in memory included."""
        with self._changed:
            return [
                key
                for key, place in self._catalog.index.items()
                if isinstance(place, Stored) or place.served is not None
            ]

    def drop(self, cohort: int, *, tenant: str = TENANT) -> Receipt:
        """Delete a cohort that was put since the log was opened; its tenant's key stays."""
        wanted = (self._catalog.run, tenant, cohort)
        with self._operation():
            return self._delete(
                f"cohort {cohort} of {tenant}",
                lambda found: (found.run, found.tenant, found.number) == wanted,
                key_destroyed=False,
            )

    def purge(self, tenant: str) -> Receipt:
        """Destroy a tenant's key and delete all of its pages, of earlier runs, too."""
        with self._operation():
            # The key first: a put under way finds it gone, and leaves nothing that outlives this.
            keys = self._setting.keys
            if keys is not None:
                keys.destroy(tenant)
            return self._delete(
                f"tenant {tenant}",
                lambda found: found.tenant == tenant,
                key_destroyed=keys is not None,
            )

    def _delete(
        self, what: str, wanted: Callable[[Cohort], bool], *, key_destroyed: bool
    ) -> Receipt:
        deleted, in_memory = delete_cohorts(
            self._catalog, self._changed, self._writer.work_off, wanted
        )
        now = self._setting.clock()
        return receipt(what, deleted, in_memory=in_memory, key_destroyed=key_destroyed, now=now)

    @property
    def stats(self) -> KVLogStats:
        with self._changed:
            return self._counts.snapshot(self._catalog)

    def close(self, *, hand_over: bool = False) -> Receipt | None:
        """Keep the pages, or delete them and give the receipt. May be called again.

        `hand_over` keeps them whatever was said at the start, for a log that is opened here next, with
        the same keys. What was deleted leaves no file but the sums of what was written, if there is a
        daily budget.
        """
        keep = self._setting.keep or hand_over
        with self._changed:
            if self._closed:
                return self._receipt
            self._closed = True
            self._changed.wait_for(lambda: not self._active)
        try:
            if keep:
                self._seal()
            else:
                self._receipt = self._delete_all()
            self.budget.close()
        finally:
            self._reader.close()
            self._lock.close()
        if self._setting.created and not keep:
            with suppress(OSError):  # something else is in it
                self._setting.directory.rmdir()
        return self._receipt

    def _seal(self) -> None:
        self._flush()
        with self._changed:
            for cohort in self._catalog.cohorts.values():
                self._catalog.retire(cohort)
        self._writer.work_off()

    def _delete_all(self) -> Receipt:
        """Of our identity: what another log left here is not ours to delete."""
        keys, ours = self._setting.keys, self._setting.identity
        forgotten = keys is not None and not keys.is_persistent
        made = self._delete(
            "log",
            lambda cohort: all(segment.header.identity == ours for segment in cohort.segments),
            key_destroyed=forgotten,
        )
        if keys is not None and forgotten:
            for tenant in made.tenants:
                keys.destroy(tenant)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
