"""What a KV log holds and where: an index of pages, cohorts of segments, and the room on the drive.

No I/O and no lock of its own: `KVLog` calls everything here with its lock held, and carries out what is
left in `to_seal` and `to_unlink` without it.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from headrace.runtime.kv_log.cohort import Cohort, Placement, Segment, Stored, Waiting
from headrace.runtime.kv_log.record import BLOCK, footer_bytes

_LOW = 0.9
"""Of the cap: dropping goes on until there is that little, so that it is not done at every write."""


class NoRoom(Exception):
    """Nothing more can be dropped, and nothing is being."""


class Catalog:
    """At most `cap` bytes of segments, each of at most `segment_bytes`."""

    def __init__(self, cap: int, segment_bytes: int, run: int) -> None:
        self.run = run
        self.index: dict[bytes, Stored | Waiting] = {}
        self.cohorts: dict[tuple[int, str, int], Cohort] = {}
        self.segments: dict[Path, Segment] = {}
        self.to_seal: deque[Segment] = deque()
        self.to_unlink: deque[Segment] = deque()
        self.live = 0  # bytes of pages on the drive that the index knows
        self.used = 0  # bytes on the drive, or about to be
        self.dying = 0  # of them, of segments that are to be deleted
        self.waiting_bytes = 0  # of pages that wait in memory
        self.dropped = 0  # segments, for room or because they expired
        self._cap = cap
        self.segment_bytes = segment_bytes
        self._tick = 0

    def cohort(self, number: int, tenant: str, run: int | None = None) -> Cohort:
        """The cohort, just used."""
        run = self.run if run is None else run
        cohort = self.cohorts.get((run, tenant, number))
        if cohort is None:
            cohort = self.cohorts[run, tenant, number] = Cohort(run, tenant, number, 0)
        self.touch(cohort)
        return cohort

    def back(self, cohort: Cohort) -> Cohort:
        """What a writer's cohort is now, after it may have been forgotten for being empty."""
        return self.cohorts.setdefault((cohort.run, cohort.tenant, cohort.number), cohort)

    def touch(self, cohort: Cohort) -> None:
        self._tick += 1
        cohort.used = self._tick

    def add(self, segment: Segment) -> None:
        self.segments[segment.path] = segment
        segment.cohort.segments.append(segment)
        self.used += segment.end

    def room_in(self, cohort: Cohort, nbytes: int, records: int) -> bool:
        """Whether the cohort's open segment takes an extent, and still its footer."""
        segment = cohort.open
        if segment is None:
            return False
        after = segment.end + nbytes + footer_bytes(segment.numbers + records)
        return after <= self.segment_bytes

    def make_room(self, nbytes: int, writing: Cohort | None = None) -> bool:
        """Whether the drive takes `nbytes` now; if not, segments that had to go are in `to_unlink`.

        Raises NoRoom when nothing will change that.
        """
        if self.used + nbytes <= self._cap:
            return True
        after = self.used - self.dying + nbytes
        if after > self._cap:
            for victim in self._victims(writing):
                if after <= self._cap * _LOW:
                    break
                after -= victim.end
                self.doom(victim)
                self.dropped += 1
                if victim.cohort is not writing:  # what waits comes after what is gone
                    self.doom_waiting(victim.cohort)
        if after > self._cap and not self.dying and not self._is_pinned():
            raise NoRoom
        return False

    def _is_pinned(self) -> bool:
        return any(segment.pins for segment in self.segments.values())

    def _victims(self, writing: Cohort | None) -> Iterator[Segment]:
        """Least recently used cohorts first; of each the newest segments first.

        A page is of use only with all pages of its sequence before it, and those were put earlier. The
        cohort that is written to comes last and loses its oldest segments: it goes on.
        """
        for cohort in sorted(self.cohorts.values(), key=lambda cohort: cohort.used):
            if cohort is not writing:
                yield from self._unpinned(reversed(cohort.segments))
        if writing is not None:
            yield from self._unpinned(each for each in writing.segments if each is not writing.open)

    def _unpinned(self, segments: Iterable[Segment]) -> list[Segment]:
        return [segment for segment in segments if not segment.pins]

    def place(self, segment: Segment, nbytes: int, records: int) -> Placement:
        """Reserve a place at the segment's end and pin it."""
        placement = Placement(segment, segment.end, nbytes, segment.numbers)
        added = nbytes + (0 if segment.end else BLOCK)
        segment.end += added
        segment.numbers += records
        segment.pins += 1
        self.used += added
        return placement

    def retire(self, cohort: Cohort) -> None:
        """Nothing more goes to the cohort's open segment; it is sealed when no one writes to it."""
        segment, cohort.open = cohort.open, None
        if segment is not None:
            segment.is_full = True
            if not segment.pins and not segment.is_doomed:
                self.to_seal.append(segment)

    def unpin(self, segment: Segment) -> None:
        segment.pins -= 1
        if not segment.pins:
            if segment.is_doomed:
                self.to_unlink.append(segment)
            elif segment.is_full and not segment.is_sealed:
                self.to_seal.append(segment)

    def hold(self, key: bytes, stored: Stored) -> None:
        self.index[key] = stored
        self.live += stored.nbytes
        stored.segment.keys.append(key)

    def forget(self, key: bytes, stored: Stored) -> None:
        """Take a page out of the index, if it is still there."""
        if self.index.get(key) is stored:
            del self.index[key]
            self.live -= stored.nbytes

    def doom(self, segment: Segment) -> None:
        """Forget a segment and what is in it; its file goes when nobody reads or writes it."""
        if segment.is_doomed:
            return
        segment.is_doomed = True
        self.dying += segment.end
        del self.segments[segment.path]
        cohort = segment.cohort
        cohort.segments.remove(segment)
        if cohort.open is segment:
            cohort.open = None
        for key in segment.keys:
            place = self.index.get(key)
            if isinstance(place, Stored) and place.segment is segment:
                self.forget(key, place)
        segment.keys.clear()
        if not segment.pins:
            self.to_unlink.append(segment)
        self.tidy(cohort)

    def wait(self, cohort: Cohort, key: bytes, mark: Waiting, payload: bytes, now: float) -> bool:
        """Serve a page from memory until it is written; False if it was deleted meanwhile."""
        if self.index.get(key) is not mark:
            return False
        if cohort.dropped:
            del self.index[key]
            return False
        cohort = self.back(cohort)
        if not cohort.waiting:
            cohort.waiting_since = now
        cohort.waiting[key] = self.index[key] = Waiting(payload, cohort)
        cohort.waiting_bytes += len(payload)
        self.waiting_bytes += len(payload)
        return True

    def take_waiting(self, cohort: Cohort) -> "dict[bytes, Waiting]":
        """Pages that are to be written now; they are served from memory until they are."""
        waiting = cohort.waiting
        self.waiting_bytes -= cohort.waiting_bytes
        cohort.waiting, cohort.waiting_bytes = {}, 0
        return waiting

    def longest_waiting(self) -> Cohort | None:
        """Of cohorts with pages that wait, the one that was not used for longest."""
        waiting = [cohort for cohort in self.cohorts.values() if cohort.waiting]
        return min(waiting, key=lambda cohort: cohort.used, default=None)

    def doom_waiting(self, cohort: Cohort) -> int:
        """Forget pages of a cohort that wait to be written; how many there were."""
        count = len(cohort.waiting)
        for key, waiting in cohort.waiting.items():
            if self.index.get(key) is waiting:
                del self.index[key]
        self.take_waiting(cohort)
        self.tidy(cohort)
        return count

    def drop(self, cohort: Cohort) -> int:
        """Forget all of a cohort, and what is still being put into it; pages that only memory had."""
        cohort.dropped = True
        count = self.doom_waiting(cohort)
        for segment in list(cohort.segments):
            self.doom(segment)
        self.cohorts.pop((cohort.run, cohort.tenant, cohort.number), None)
        return count

    def tidy(self, cohort: Cohort) -> None:
        """Forget a cohort of which nothing is left. A writer may still have it, and bring it back."""
        place = (cohort.run, cohort.tenant, cohort.number)
        if not cohort.segments and not cohort.waiting and self.cohorts.get(place) is cohort:
            del self.cohorts[place]

    def expire(self, limit: float) -> float:
        """Forget what was begun at `limit` or before; when the oldest of the rest was begun."""
        for segment in list(self.segments.values()):
            if segment.header.created <= limit:
                self.doom(segment)
                self.dropped += 1
        for cohort in list(self.cohorts.values()):
            if cohort.waiting and cohort.waiting_since <= limit:
                self.doom_waiting(cohort)
        begun = [segment.header.created for segment in self.segments.values()]
        begun += [cohort.waiting_since for cohort in self.cohorts.values() if cohort.waiting]
        return min(begun, default=float("inf"))

    def unlinked(self, segment: Segment, *, left: bool) -> None:
        self.dying -= segment.end
        if not left:
            self.used -= segment.end
        segment.is_gone, segment.is_left = True, left
