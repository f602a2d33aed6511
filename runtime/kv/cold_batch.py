"""A micro-batch over pages that are not on the device: which are brought into a KV ring, and to where."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import NamedTuple, Self

import numpy as np

from headrace.runtime.batch import first_page
from headrace.runtime.kv.page_copies import PageIds
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice

WINDOW_PAGES = 4
"""Pages are brought in groups of so many, from the first that a window lets be seen: a kernel's tile may
begin before it, and what it multiplies by 0 there must be numbers."""


class Sunk(NamedTuple):
    """Pages to be brought from slots on NVMe, in the order of these, so that neighbours are read together.

    `slots` [n] int32, counted from 0; `ids` from the i-th of them to its place; `owners` [n], requests.
    """

    slots: np.ndarray
    ids: PageIds
    owners: np.ndarray


@dataclass(frozen=True)
class ColdBatch:
    """All pages of its sequences have a place in the ring, one sequence after the other.

    `in_ring` is the micro-batch with these places for pages. `inwards` are device pages that hold
    something before the micro-batch runs, and their places; `outwards` places of pages that it writes,
    and where these belong.
    """

    in_ring: MicroBatch
    inwards: PageIds
    outwards: PageIds
    _slots: np.ndarray  # [C] int32: of each cold page its slot, place, number in its sequence,
    _places: np.ndarray
    _numbers: np.ndarray
    _starts: np.ndarray  # the position at which its sequence's slice begins, and the request
    _owners: np.ndarray
    _host_pages: int  # slots from there on are on NVMe
    _pinned: bool
    _cold: dict[int | None, PageIds] = field(default_factory=dict)
    _sunk: dict[int | None, Sunk | None] = field(default_factory=dict)

    @classmethod
    def of(cls, micro_batch: MicroBatch, *, quantized: bool, pinned: bool, host_pages: int) -> Self:
        """Of a micro-batch with cold pages; `quantized`: newest pages are in tails. There are `host_pages`
        slots in host RAM."""
        slices = micro_batch.slices
        bases = [0, *accumulate(piece.num_pages for piece in slices)]
        moved = [
            piece._replace(pages=tuple(range(base, base + piece.num_pages)), cold=())
            for piece, base in zip(slices, bases, strict=False)
        ]

        def own(bounds: Callable[[Slice], tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
            found = [
                _own(piece, base, bounds(piece)) for piece, base in zip(slices, bases, strict=False)
            ]
            return _ids(pages for pages, _ in found), _ids(places for _, places in found)

        # In tails there is no need to copy what a page that is not full has in it.
        held = own(lambda p: (0, p.start // PAGE_TOKENS if quantized else pages_for(p.start)))
        written = own(
            lambda p: (
                p.start // PAGE_TOKENS,
                p.end // PAGE_TOKENS if quantized else pages_for(p.end),
            )
        )
        counts = [len(piece.cold) for piece in slices]
        numbers = _ids(range(count) for count in counts)
        return cls(
            in_ring=MicroBatch(tuple(moved)),
            inwards=PageIds.of(held[0], held[1], pinned=pinned),
            outwards=PageIds.of(written[1], written[0], pinned=pinned),
            _slots=_ids(piece.cold for piece in slices),
            _places=numbers + np.repeat(np.array(bases[:-1], dtype=np.int32), counts),
            _numbers=numbers,
            _starts=np.repeat([piece.start for piece in slices], counts),
            _owners=np.repeat([piece.request for piece in slices], counts),
            _host_pages=host_pages,
            _pinned=pinned,
        )

    @property
    def num_pages(self) -> int:
        return sum(len(piece.pages) for piece in self.in_ring.slices)

    def cold(self, window: int | None) -> PageIds:
        """Host slots and places of the cold pages that queries may see."""
        if window not in self._cold:
            seen = self._seen(window) & (self._slots < self._host_pages)
            ids = PageIds.of(self._slots[seen], self._places[seen], pinned=self._pinned)
            self._cold[window] = ids
        return self._cold[window]

    def sunk(self, window: int | None) -> Sunk | None:
        """The pages on NVMe that queries may see, if there are any."""
        if window not in self._sunk:
            (seen,) = np.nonzero(self._seen(window) & (self._slots >= self._host_pages))
            order = seen[np.argsort(self._slots[seen], kind="stable")]
            rows = np.arange(len(order), dtype=np.int32)
            ids = PageIds.of(rows, self._places[order], pinned=self._pinned)
            slots = self._slots[order] - self._host_pages
            self._sunk[window] = Sunk(slots, ids, self._owners[order]) if len(order) else None
        return self._sunk[window]

    def _seen(self, window: int | None) -> np.ndarray:
        """Which of the cold pages, [C] bool."""
        firsts = np.array([first_page(start, window) for start in self._starts.tolist()])
        return self._numbers >= firsts // WINDOW_PAGES * WINDOW_PAGES


def _own(piece: Slice, base: int, bounds: tuple[int, int]) -> tuple[Sequence[int], Sequence[int]]:
    """Device pages among the slice's pages [bounds), and their places."""
    cold = len(piece.cold)
    first, end = max(bounds[0], cold), max(bounds[1], cold)
    return piece.pages[first - cold : end - cold], range(base + first, base + end)


def _ids(parts: Iterable[Iterable[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(parts), np.int32)
