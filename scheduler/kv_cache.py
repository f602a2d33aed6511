"""Which full pages are used again, loaded and saved.

A page that is full never changes, so that a copy of it serves every request whose tokens up to its
end are the same: another request, the next turn of a conversation, or the same request after it
has given way.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.kv_stats import TierHits
from headrace.scheduler.pages import PagePool, PageState
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import MoveKind
from headrace.scheduler.policy import best_prefix, clean_watermark, swap_beats_recompute
from headrace.scheduler.tiers import Tiers

SAVED_AT_ONCE = 64
"""Pages that a pass of moves alone brings to host RAM, and to NVMe, so that it ends in good time."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Pages from a sequence's first on that a request may have without computing them.

    `num_held` of them cannot be allocated to somebody else: they are held, or being moved.
    """

    keys: Sequence[bytes]
    hits: TierHits
    num_held: int


@dataclass(frozen=True, slots=True)
class Settled:
    """Device pages that requests wait for and that have come, or never will."""

    arrived: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)


class KVCache:
    """Decides over Tiers, by what a page costs to load and to compute.

    Nothing waits for a page to be saved but a request that needs its room. A load goes through a
    host slot, and looks before each step where the page is now: it fails when that is nowhere. One
    that waits for a slot has it once moves have ended.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        costs = config.costs
        self._gains = {
            Tier.DEVICE: costs.computed_page,
            Tier.HOST: costs.computed_page - costs.host_page,
            Tier.NVME: costs.computed_page - costs.nvme_page,
        }
        self._uses_host = config.host_pages > 0 and self._gains[Tier.HOST] >= 0
        self._uses_nvme = config.nvme_pages > 0 and self._gains[Tier.NVME] >= 0
        self._swaps = self._uses_host and swap_beats_recompute(costs)
        self._write_backs = config.write_backs
        self._writes_through = config.write_through and self._uses_nvme
        # To be written, oldest first; where drives are too slow for all, the newest are.
        self._unwritten: deque[bytes] = deque(maxlen=config.num_pages)
        self.tiers = Tiers(config, saves=self._uses_host)
        self._device, self._host = self.tiers.device, self.tiers.host
        self._loads: dict[int, bytes] = {}  # device pages that no move brings yet
        self._tried: set[bytes] = set()  # to be saved before the end
        self._kept: set[bytes] = set()  # go on to NVMe as soon as they are in host RAM

    def find(self, keys: Iterable[bytes]) -> Prefix:
        """The pages from the first of `keys` on that are there and better used than computed."""
        found: list[bytes] = []
        tiers: list[Tier] = []
        for key in keys:
            tier = self.tiers.find(key)
            if tier is None:
                break
            found.append(key)
            tiers.append(tier)
        count = best_prefix(self._gains[tier] for tier in tiers)
        del found[count:], tiers[count:]
        pages = [page for key in found if (page := self._device.find(key)) is not None]
        held = sum(self._device.state(page) is not PageState.CACHED for page in pages)
        return Prefix(found, TierHits(*map(tiers.count, Tier)), held)

    def claim(self, prefix: Prefix) -> list[int]:
        """Hold the prefix's pages on the device, and begin to load those that are not there.

        The caller has made sure that len(keys) - num_held pages can be allocated.
        """
        pages = [self._device.find(key) for key in prefix.keys]
        for key, page in zip(prefix.keys, pages, strict=True):
            if page is not None:
                self._device.share(page)
                self.tiers.rate(key)
        # Only now: what is reserved for some could be others' cached pages.
        claimed = [
            self._load(key) if page is None else page
            for key, page in zip(prefix.keys, pages, strict=True)
        ]
        self._advance()
        return claimed

    def coming(self, pages: Iterable[int]) -> set[int]:
        """Those of `pages` that are still to be loaded."""
        return {page for page in pages if self._device.state(page) is PageState.COMING}

    def name(self, pages: Sequence[int], keys: Sequence[bytes], cohort: int) -> None:
        """Let pages be found that are full and computed by passes that have returned."""
        for page, key in zip(pages, keys, strict=True):
            self.tiers.name(page, key, cohort)
        if self._writes_through:
            self._unwritten.extend(keys)

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a request's pages; loads that nobody waits for any more are not begun."""
        self._device.free(pages)
        if self._loads:
            for page in pages:
                if page in self._loads and not self._device.is_held(page):
                    del self._loads[page]
                    self._device.forget(page)

    def swap_out(self, pages: Sequence[int]) -> bool:
        """Begin to save released pages of a victim that would else be computed again.

        Returns whether all of them are to be had without that.
        """
        alone = [page for page in pages if self._device.state(page) is PageState.CACHED]
        return self._swaps and self._save(alone)

    def hold_below(self, page: int, key: bytes, cohort: int) -> int | None:
        """Hold a host slot for the page that a request has on the device under `key`.

        It is written by a move, if it is not there yet. None while no slot is to be had.
        """
        if self._device.key(page) is None and self._device.state(page) is PageState.USED:
            self.tiers.name(page, key, cohort)  # a twin that was found in its place may be gone
        slot = self._host.find(key)
        if slot is None:
            found = self._device.find(key)
            if found is None or not self._is_whole(found) or not self._host.num_free:
                return None
            self.tiers.move_out(found)
            slot = self._host.find(key)
        assert slot is not None
        self._host.share(slot)
        return slot

    def keep(self, pages: Sequence[int], slots: Sequence[int] = ()) -> None:
        """Begin to bring released pages, of the device and of host RAM, as far down as there is a
        tier, ahead of all others."""
        whole = [page for page in pages if self._is_whole(page)]
        self._save(whole)
        if not self._uses_nvme:
            return
        keys = [*map(self._host.key, slots), *map(self._device.key, whole)]
        for key in filter(None, keys):
            slot = self._host.find(key)
            if slot is None or key in self.tiers.nvme:
                continue
            if self._host.state(slot) is PageState.COMING:
                self._kept.add(key)
            elif self._host.state(slot) is PageState.CACHED:
                self.tiers.spill(slot)

    def write_back(self) -> None:
        """Begin to save precious pages where too few others are left to be taken, and what is to be written
        through."""
        self._write_through()
        if self._uses_host:
            # Nothing is in a hurry here, so that no precious slot is given up for it.
            room = self._host.num_spare if self._uses_nvme else self._host.num_free
            for page in self._device.coldest(min(self._shortage(self._device), room)):
                self.tiers.move_out(page)
        if self._uses_nvme:
            for slot in self._host.coldest(self._shortage(self._host)):
                self.tiers.spill(slot)

    def _write_through(self) -> None:
        """Begin to bring pages to NVMe that were computed, through slots that hold nothing precious."""
        room = self._write_backs
        # A slot that is spilled is no longer spare.
        while self._unwritten and room and self._host.num_spare:
            key = self._unwritten.popleft()
            page, slot = self._device.find(key), self._host.find(key)
            if key in self.tiers.nvme:
                continue
            if slot is not None and self._host.state(slot) is not PageState.COMING:
                self.tiers.spill(slot)
            elif slot is not None:
                self._kept.add(key)
            elif page is not None and self._is_whole(page):
                self.tiers.move_out(page)
                self._kept.add(key)
                room -= 1

    def begin_save(self) -> None:
        """Begin to bring to NVMe what would be lost with the device and host RAM, and was worth saving:
        precious pages and all that is in host RAM. Each slot is tried once, some at a time."""
        if not self._uses_nvme:
            return
        slots = ((slot, self._host.key(slot)) for slot in self._host.resting())
        left = [(slot, key) for slot, key in slots if key and not self._is_tried(key)]
        for slot, key in left[:SAVED_AT_ONCE]:
            self._tried.add(key)
            self.tiers.spill(slot)
        # Only then: no slot is taken whose page has not been tried, or it would come again for ever.
        room = self._host.num_spare - len(left[SAVED_AT_ONCE:])
        keys = ((p, self._device.key(p)) for p in self._device.coldest(self._device.num_pages))
        pages = [page for page, key in keys if key and not self._is_tried(key)]
        for page in pages[: max(0, min(room, SAVED_AT_ONCE))]:
            self.tiers.move_out(page)

    def settle(self, moved: Iterable[int], lost: Iterable[int]) -> Settled:
        """Take note of moves that have ended on every stage, and begin what waited for them."""
        settled = Settled()
        for number in moved:
            move = self.tiers.moves.end(number, lost=False)
            self.tiers.done(move)
            if move.kind is MoveKind.IN:
                settled.arrived.add(move.page)
            elif move.kind is MoveKind.OUT and move.key in self._kept:
                self.tiers.spill(move.slot)
                self._kept.discard(move.key)
        for number in lost:
            move = self.tiers.moves.end(number, lost=True)
            self.tiers.lose(move)
            if move.kind is MoveKind.IN:
                settled.failed.add(move.page)
            elif move.kind is MoveKind.OUT:
                self._kept.discard(move.key)
        settled.failed.update(self._advance())
        return settled

    def abandon_moves(self) -> None:
        """Give up every move and every load, also those that no move brings yet."""
        for move in self.tiers.moves.abandon():
            self.tiers.abandon(move)
        for page in self._loads:
            self._device.forget(page)
        self._loads.clear()
        self._kept.clear()

    def check_integrity(self) -> None:
        """Assert that pages and slots are in order, and that what is coming will come."""
        self.tiers.check_integrity()
        moves = self.tiers.moves
        brought = {move.page for move in moves if move.kind is MoveKind.IN}
        assert not brought & self._loads.keys()
        assert len(brought | self._loads.keys()) == self._device.count(PageState.COMING)
        assert all(self._device.key(page) == key for page, key in self._loads.items())
        assert len(moves) or not self._loads, "a load that waits for nothing"

    def _is_tried(self, key: bytes) -> bool:
        return key in self.tiers.nvme or key in self._tried

    def _is_whole(self, page: int) -> bool:
        return (
            self._device.key(page) is not None and self._device.state(page) is not PageState.COMING
        )

    def _shortage(self, pool: PagePool) -> int:
        """How many pages should be written back, beside those that are."""
        short = clean_watermark(pool.num_pages) - pool.num_spare - pool.num_settling
        return max(0, min(short, self._write_backs))

    def _load(self, key: bytes) -> int:
        page = self._device.reserve(key)
        self._device.share(page)
        self._loads[page] = key
        return page

    def _advance(self) -> set[int]:
        """Begin each load's next step. Returns the pages of those that have nowhere to come from."""
        failed = set()
        for page in [*self._loads]:
            if self.tiers.move_in(page):
                del self._loads[page]
        # Only now: a slot that one load needs must not be taken for another.
        for page, key in [*self._loads.items()]:
            if self._host.find(key) is not None:
                continue  # on its way there
            if key not in self.tiers.nvme:
                del self._loads[page]
                self._device.forget(page)
                failed.add(page)
            elif self._host.num_free:
                self.tiers.fetch(key)
        return failed

    def _save(self, pages: Sequence[int]) -> bool:
        """Move out what no tier below has, from the first page on while there are slots.

        Returns whether there were enough.
        """
        keys = ((page, self._device.key(page)) for page in pages)
        missing = [p for p, key in keys if key is not None and not self.tiers.is_saved(key)]
        room = self._host.num_free if self._uses_host else 0
        for page in missing[room:]:
            self._device.rate(page, precious=self._uses_host)
        # The last page first, which is then also the first to be taken.
        for page in reversed(missing[:room]):
            self.tiers.move_out(page)
        return len(missing) <= room
