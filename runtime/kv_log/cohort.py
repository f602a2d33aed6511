"""Cohorts of pages, their segments, and where a page is: in a segment, in memory, or being written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from headrace.runtime.kv_log.keys import SegmentCipher
from headrace.runtime.kv_log.receipt import Deleted
from headrace.runtime.kv_log.record import Entry, SegmentHeader, digest_of


@dataclass(slots=True, eq=False)
class Cohort:
    """Pages that go together. `used` orders cohorts by their last use; -1 is before all."""

    run: int
    tenant: str
    number: int
    used: int
    segments: list["Segment"] = field(default_factory=list)
    open: "Segment | None" = None
    waiting: "dict[bytes, Waiting]" = field(default_factory=dict)
    waiting_bytes: int = 0
    waiting_since: float = 0.0
    dropped: bool = False


@dataclass(slots=True, eq=False)
class Segment:
    """A file. `end` counts what is written and what is about to be; `pins` are reads and writes."""

    path: Path
    header: SegmentHeader
    cipher: SegmentCipher | None
    cohort: Cohort
    end: int = 0
    numbers: int = 0  # of records, handed out
    pages: int = 0
    payload: int = 0
    keys: list[bytes] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)  # until there is a digest
    digest: bytes = b""
    pins: int = 0
    has_header: bool = False  # on the drive: until then nobody would know what the file is
    is_foreign: bool = False  # the name turned out to be taken
    is_full: bool = False  # nothing more is added
    is_sealed: bool = False
    is_doomed: bool = False
    is_gone: bool = False
    is_left: bool = False  # could not be deleted

    def deleted(self) -> Deleted:
        digest = self.digest or digest_of(self.header.generation, tuple(self.entries))
        encrypted = bool(self.header.salt)
        return Deleted(
            self.path,
            self.header.tenant,
            self.pages,
            self.payload,
            self.end,
            digest,
            encrypted,
            self.cipher is not None or self.header.ephemeral,
            self.is_left,
        )


class Stored(NamedTuple):
    segment: Segment
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A page on its way to the drive; without bytes when only its writer has them."""

    payload: bytes | None
    cohort: Cohort

    @property
    def served(self) -> bytes | None:
        """What get() gives: nothing once the cohort was dropped, even if it is still being written."""
        return None if self.cohort.dropped else self.payload


class Placement(NamedTuple):
    """Where an extent goes: `offset` 0 is a new segment, whose header goes first."""

    segment: Segment
    offset: int
    nbytes: int
    number: int  # of its first record
