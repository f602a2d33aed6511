"""What a KV log has done and holds."""

from collections import Counter
from dataclasses import dataclass, field, replace

from headrace.runtime.kv_log.catalog import Catalog
from headrace.runtime.kv_log.endurance import DriveWear
from headrace.runtime.kv_log.record import Miss


@dataclass(frozen=True, slots=True)
class KVLogStats:
    """Counts since the log was opened, and what it holds now; sizes in bytes."""

    pages: int  # held, those in memory included
    bytes_live: int  # of pages held on the drive
    file_bytes: int  # on the drive
    bytes_written: int  # to segments: pages, heads, padding, headers and footers
    payload_written: int  # of them, pages
    hits: int
    misses: dict[Miss, int]
    lost: int  # pages that could not be written
    refused: int  # pages beyond the daily write budget
    segments: int  # on the drive
    segments_dropped: int  # for room, or because they expired
    segments_locked: int  # at start: of another identity, or without a key that fits
    pages_recovered: int  # at start: of segments without a footer
    seconds_writing: float  # in system calls, summed over threads
    seconds_reading: float

    @property
    def write_amplification(self) -> float:
        """Bytes on the drive for each byte of a page; 1.0 when nothing was written."""
        return self.bytes_written / self.payload_written if self.payload_written else 1.0

    def after(self, before: "KVLogStats") -> "KVLogStats":
        """With the counts of another log before this one; what is held is this one's alone."""
        counts = {name: getattr(self, name) + getattr(before, name) for name in _COUNTED}
        misses = {miss: count + before.misses[miss] for miss, count in self.misses.items()}
        return replace(self, misses=misses, **counts)


_COUNTED = (
    "bytes_written",
    "payload_written",
    "hits",
    "lost",
    "refused",
    "segments_dropped",
    "seconds_writing",
    "seconds_reading",
)


@dataclass(frozen=True, slots=True)
class LogReport:
    """A stage's log: what it has done, and the drive that it is on."""

    directory: str
    stats: KVLogStats
    wear: DriveWear

    def after(self, before: "LogReport") -> "LogReport":
        """With what the log did before that another process had and closed."""
        return replace(self, stats=self.stats.after(before.stats))


@dataclass(slots=True)
class Counts:
    """The part that is counted; changed with the log's lock held."""

    bytes_written: int = 0
    payload_written: int = 0
    hits: int = 0
    misses: Counter[Miss] = field(default_factory=Counter)
    lost: int = 0
    refused: int = 0
    segments_locked: int = 0
    pages_recovered: int = 0
    seconds_writing: float = 0.0
    seconds_reading: float = 0.0

    def snapshot(self, catalog: Catalog) -> KVLogStats:
        return KVLogStats(
            pages=len(catalog.index),
            bytes_live=catalog.live,
            file_bytes=catalog.used,
            bytes_written=self.bytes_written,
            payload_written=self.payload_written,
            hits=self.hits,
            misses={miss: self.misses[miss] for miss in Miss},
            lost=self.lost,
            refused=self.refused,
            segments=len(catalog.segments),
            segments_dropped=catalog.dropped,
            segments_locked=self.segments_locked,
            pages_recovered=self.pages_recovered,
            seconds_writing=self.seconds_writing,
            seconds_reading=self.seconds_reading,
        )
