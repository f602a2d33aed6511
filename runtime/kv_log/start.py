"""How a KV log starts: its directory, what earlier runs left there, and segments to come."""

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from headrace.runtime.kv_log.catalog import Catalog
from headrace.runtime.kv_log.cohort import Cohort, Segment, Stored
from headrace.runtime.kv_log.keys import SALT_BYTES, KeyRing, SegmentCipher
from headrace.runtime.kv_log.record import (
    BLOCK,
    KEY_BYTES,
    SegmentHeader,
    footer_bytes,
    segment_name,
    segment_number,
    unpack_head,
)
from headrace.runtime.kv_log.segment import EXTENT_BYTES, Found, record_bytes, scan
from headrace.runtime.kv_log.stats import Counts
from headrace.scheduler.errors import KVLogError

log = logging.getLogger(__name__)

LEDGER_NAME = "headrace-kv-writes.json"


def max_page(segment_bytes: int) -> int:
    """The largest page that fits a segment, its header and its footer with it."""
    extent = segment_bytes - BLOCK - footer_bytes(1)
    return extent // BLOCK * BLOCK - record_bytes(0, encrypted=True)


def check_options(
    cap: int, segment_bytes: int, ttl: float | None, keep: bool, keys: KeyRing | None
) -> None:
    if segment_bytes < 4 * EXTENT_BYTES:
        raise ValueError(f"segments have at least {4 * EXTENT_BYTES} bytes, not {segment_bytes}")
    if cap < 2 * segment_bytes:
        raise ValueError(
            f"a cap of {cap} bytes has no room for two segments of {segment_bytes}: one is written"
            " while the other is dropped"
        )
    if ttl is not None and ttl <= 0:
        raise ValueError(f"pages live for a positive number of seconds, not {ttl}")
    if keep and keys is not None and not keys.is_persistent:
        raise ValueError(
            "pages cannot be kept when their keys are in memory only: nobody could read them again;"
            " give the key ring a file"
        )


def make_directory(directory: Path) -> bool:
    """Whether it was created. Raises KVLogError if it cannot be had."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if not directory.is_dir():
            raise KVLogError(f"{directory} is not a directory: KV pages need one") from None
        return False
    except OSError as error:
        raise KVLogError(f"cannot create {directory} for KV pages: {error.strerror}") from error
    return True


class Strange(NamedTuple):
    """A file that has a segment's name and is none that can be read."""

    path: Path
    is_ours: bool  # a log wrote it: its header is damaged, or there was no time to write one
    why: str


def segments_in(directory: Path) -> tuple[list[Found], list[Strange]]:
    """Segments in the order of their creation, and what else has such a name.

    Raises KVLogError when the directory cannot be read; a file that goes meanwhile is left out.
    """
    found: list[Found] = []
    strange: list[Strange] = []
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise KVLogError(f"cannot read {directory}: {error.strerror}") from error
    for path in paths:
        number = segment_number(path.name)
        if number is None:
            continue
        try:
            segment = scan(path, number)
            if segment is None:
                strange.append(_stranger(path))
            else:
                found.append(segment)
        except FileNotFoundError:
            continue
        except OSError as error:
            strange.append(Strange(path, False, f"cannot be read: {error.strerror}"))
    found.sort(key=lambda segment: segment.header.generation)
    return found, strange


def _stranger(path: Path) -> Strange:
    """An empty file is what a process leaves that is killed before its first write."""
    with path.open("rb") as opened:
        block = opened.read(BLOCK)
        if not block:
            return Strange(path, True, "is empty")
        if SegmentHeader.is_ours(block):
            return Strange(path, True, "has a damaged header")
        if not block.strip(b"\0") and unpack_head(opened.read(BLOCK)) is not None:
            return Strange(path, True, "lost its header, as by a power cut")
    return Strange(path, False, "has the name of a segment of KV pages, but is none")


@dataclass(slots=True)
class NewSegments:
    """Makes segments: a name and a generation that none before it in this directory had.

    The generation is the time in nanoseconds where that is later than any other: a segment that was
    deleted and whose name came back is told apart from it.
    """

    directory: Path
    identity: bytes  # its digest
    keys: KeyRing | None
    clock: Callable[[], float]
    number: int
    generation: int
    run: int = 0

    def make(self, cohort: Cohort, key: bytes | None) -> Segment:
        """An empty one; `key` is the tenant's."""
        self.generation = max(self.generation + 1, int(self.clock() * 1e9))
        salt = b"" if key is None else secrets.token_bytes(SALT_BYTES)
        cipher = None if key is None else SegmentCipher(key, salt)
        header = SegmentHeader(
            identity=self.identity,
            generation=self.generation,
            run=cohort.run,
            cohort=cohort.number,
            tenant=cohort.tenant,
            created=self.clock(),
            salt=salt,
            check=b"" if cipher is None else cipher.check,
            ephemeral=self.keys is not None and not self.keys.is_persistent,
        )
        path = self.directory / segment_name(self.number)
        self.number += 1
        return Segment(path, header, cipher, cohort)


def load(
    directory: Path,
    identity: bytes,
    keys: KeyRing | None,
    clock: Callable[[], float],
    make_catalog: Callable[[int], Catalog],
    counts: Counts,
) -> tuple[Catalog, NewSegments]:
    """Take over what earlier runs left. The caller holds the directory's lock: none of them lives.

    `make_catalog(run)` makes an empty one. What can never be read again is doomed: pages whose keys
    died with their process, and pages in clear where this log encrypts. Segments of another identity
    or key stay until their room is needed, which it is of them first: someone may come back for them.
    """
    found, strange = segments_in(directory)
    for path, is_ours, why in strange:
        if is_ours:
            path.unlink(missing_ok=True)
        log.warning("%s %s; it is %s", path, why, "deleted" if is_ours else "left alone")
    names = [
        number for path in directory.iterdir() if (number := segment_number(path.name)) is not None
    ]
    last = max((segment.header.generation for segment in found), default=0)
    new = NewSegments(directory, identity, keys, clock, max(names, default=-1) + 1, last)
    new.generation = new.run = max(last + 1, int(clock() * 1e9))
    catalog = make_catalog(new.run)
    for segment in found:
        _take_over(segment, identity, keys, catalog, counts)
    if counts.segments_locked:
        log.warning(
            "%s: %d segments are of another model or format, or their keys are not here; they are the"
            " first to go when room is needed",
            directory,
            counts.segments_locked,
        )
    return catalog, new


def _take_over(
    found: Found, identity: bytes, keys: KeyRing | None, catalog: Catalog, counts: Counts
) -> None:
    header = found.header
    cipher = cipher_of(header, keys)
    locked = header.identity != identity or (found.encrypted and cipher is None)
    cohort = catalog.cohort(header.cohort, header.tenant, header.run)
    if locked:
        cohort.used = -1
    segment = Segment(
        found.path,
        header,
        cipher,
        cohort,
        end=found.nbytes,
        pages=len(found.entries),
        payload=found.payload,
        digest=found.digest,
        is_full=True,
        is_sealed=True,  # or it never will be: its process is gone
    )
    catalog.add(segment)
    gone = header.ephemeral and cipher is None  # else it was handed over with its key
    if gone or (keys is not None and not found.encrypted):
        log.info("%s is deleted: %s", found.path, _why(header))
        catalog.doom(segment)
    elif locked:
        counts.segments_locked += 1
    else:
        counts.pages_recovered += 0 if found.sealed else len(found.entries)
        for key, stored in _places(found, segment):
            catalog.hold(key, stored)


def _why(header: SegmentHeader) -> str:
    if header.ephemeral:
        return "its key was in the memory of a process that is gone"
    return "it is not encrypted, and this log is"


def cipher_of(header: SegmentHeader, keys: KeyRing | None) -> SegmentCipher | None:
    """None where nothing is encrypted, and where the key is not here or not the right one."""
    key = None if keys is None else keys.find(header.tenant)
    if key is None or not header.salt:
        return None
    cipher = SegmentCipher(key, header.salt)
    return cipher if cipher.check == header.check else None


def _places(found: Found, segment: Segment) -> Iterator[tuple[bytes, Stored]]:
    """Where each page is, by its key."""
    names = b"".join(entry.key for entry in found.entries)
    if segment.cipher is not None:
        names = segment.cipher.reveal(names)
    for i, entry in enumerate(found.entries):
        yield (
            names[i * KEY_BYTES : (i + 1) * KEY_BYTES],
            Stored(segment, entry.offset, entry.nbytes),
        )
