"""Which pages of this process's memory are in RAM, as the kernel says in /proc/self/pagemap."""

import bisect
import os
from collections.abc import Sequence

import numpy as np

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ENTRY_BYTES = 8
_AT_ONCE = 1 << 20
"""Entries read at a time."""

_PRESENT, _FILE, _EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 61, 56))
"""Bits of an entry (Documentation/admin-guide/mm/pagemap.rst)."""


class Extents:
    """Addresses that were counted; each counts once."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, nbytes: int) -> list[tuple[int, int]]:
        """The parts of [start, start + nbytes) that are new, as (start, bytes)."""
        new, end = [], start + nbytes
        i = bisect.bisect_right(self._ends, start)
        first, low, high, at = i, start, end, start
        while i < len(self._starts) and self._starts[i] < end:
            if at < self._starts[i]:
                new.append((at, self._starts[i] - at))
            at = max(at, self._ends[i])
            low, high = min(low, self._starts[i]), max(high, self._ends[i])
            i += 1
        if at < end:
            new.append((at, end - at))
        if nbytes:
            self._starts[first:i], self._ends[first:i] = [low], [high]
        return new


def resident_bytes(extents: Sequence[tuple[int, int]]) -> int:
    """Bytes of the (address, bytes) extents whose pages are in RAM.

    A page that was only read and never written is the kernel's page of zeros and counts as none. Of a page at
    an end only the bytes that belong to the extent count. Raises OSError without /proc/self/pagemap.
    """
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return sum(_resident(descriptor, start, nbytes) for start, nbytes in extents if nbytes)
    finally:
        os.close(descriptor)


def _resident(descriptor: int, start: int, nbytes: int) -> int:
    end = start + nbytes
    first, last = start // PAGE_BYTES, (end - 1) // PAGE_BYTES
    pages = 0
    for page in range(first, last + 1, _AT_ONCE):
        pages += int(np.count_nonzero(_in_ram(descriptor, page, min(_AT_ONCE, last + 1 - page))))
    nbytes = pages * PAGE_BYTES
    if _in_ram(descriptor, first, 1)[0]:
        nbytes -= start - first * PAGE_BYTES
    if _in_ram(descriptor, last, 1)[0]:
        nbytes -= (last + 1) * PAGE_BYTES - end
    return nbytes


def _in_ram(descriptor: int, page: int, count: int) -> np.ndarray:
    raw = os.pread(descriptor, count * _ENTRY_BYTES, page * _ENTRY_BYTES)
    entries = np.frombuffer(raw, np.uint64)
    own = (entries & (_FILE | _EXCLUSIVE)) != 0
    found: np.ndarray = ((entries & _PRESENT) != 0) & own
    return found
