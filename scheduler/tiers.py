"""Copies of full pages on the device, in host RAM and on NVMe, and the moves that make them."""

from collections.abc import Collection, Iterable

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.contexts import ContextIds
from headrace.scheduler.moves import Moves
from headrace.scheduler.nvme_index import NvmeIndex
from headrace.scheduler.pages import PagePool, PageState
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import NO_PAGE, MoveKind, PageMove


class Tiers:
    """The device's pages, the host's slots, what is known of NVMe, and the moves under way.

    On NVMe there are a log, where pages are found, and the `window`, slots that only requests that
    decode over them know of.
    The copies of a key are found, moved, taken and lost each alone. A page on the device is
    *precious* when it was wanted more than once, no tier below has it and `saves`, a slot when it is
    the only copy: precious ones are taken last.
    """

    def __init__(self, config: SchedulerConfig, *, saves: bool) -> None:
        self.device = PagePool(config.num_pages, self.rate)
        self.host = PagePool(config.host_pages, self.rate)
        self.nvme = NvmeIndex(config.nvme_pages)
        self.window = PagePool(config.window_pages, self.rate)
        self.moves = Moves()
        self._saves = saves
        # The request that computed what a device page or a slot holds.
        self._page_cohorts = [0] * config.num_pages
        self._slot_cohorts = [0] * config.host_pages

    def find(self, key: bytes) -> Tier | None:
        """The fastest tier where a page is, or to which it is on its way."""
        if self.device.find(key) is not None:
            return Tier.DEVICE
        if self.host.find(key) is not None:
            return Tier.HOST
        return Tier.NVME if key in self.nvme else None

    def is_saved(self, key: bytes) -> bool:
        """Whether a tier below the device has the page, or will."""
        return self.host.find(key) is not None or key in self.nvme

    def name(self, page: int, key: bytes, cohort: int) -> None:
        self.device.name(page, key)
        self._page_cohorts[page] = cohort

    def adopt(self, keys: Iterable[bytes]) -> None:
        """Note what NVMe has, oldest first."""
        for key in self.nvme.add(keys):
            self.rate(key)

    def retain(self, keys: Collection[bytes]) -> None:
        """Forget what NVMe has, but for `keys`."""
        for key in self.nvme.retain(keys):
            self.rate(key)

    def forget(self, lost: ContextIds) -> None:
        """Let copies be found no more that stages have lost; no move is under way, and nobody holds them."""
        assert not len(self.moves)
        losses = (self.device, lost.pages), (self.host, lost.slots), (self.window, lost.window)
        for pool, pages in losses:
            keys = [(page, pool.key(page)) for page in pages]
            for page, key in keys:
                if key is not None:
                    pool.forget(page)
                    self.rate(key)

    def rate(self, key: bytes) -> None:
        """Say how much copies are worth of a page that is wanted, after one of them has come or gone."""
        page, slot, is_on_nvme = self.device.find(key), self.host.find(key), key in self.nvme
        if page is not None:
            precious = self._saves and slot is None and not is_on_nvme
            self.device.rate(page, precious=precious)
        if slot is not None:
            # Whose requests have it in the window want the slot no more.
            sunk = self.window.find(key) is not None
            self.host.rate(slot, precious=page is None and not is_on_nvme and not sunk)

    def move_out(self, page: int) -> None:
        key, cohort = self._key(self.device, page), self._page_cohorts[page]
        slot = self.host.reserve(key)
        self._slot_cohorts[slot] = cohort
        self.device.depart(page)
        self.moves.start(MoveKind.OUT, slot, page, key, cohort)

    def move_in(self, page: int) -> bool:
        """Bring what a reserved page is to hold from host RAM, if it is there."""
        key = self._key(self.device, page)
        slot = self.host.find(key)
        if slot is None or self.host.state(slot) is PageState.COMING:
            return False
        self._page_cohorts[page] = self._slot_cohorts[slot]
        self.host.depart(slot)
        self.moves.start(MoveKind.IN, slot, page, key, self._page_cohorts[page])
        return True

    def spill(self, slot: int) -> None:
        key = self._key(self.host, slot)
        self.host.depart(slot)
        self.moves.start(MoveKind.SPILL, slot, NO_PAGE, key, self._slot_cohorts[slot])

    def fetch(self, key: bytes) -> None:
        self.moves.start(MoveKind.FETCH, self.host.reserve(key), NO_PAGE, key, 0)

    def sink(self, slot: int) -> int:
        """The slot on NVMe to which a host slot's page is going; there is one that can be taken."""
        key = self._key(self.host, slot)
        place = self.window.reserve(key)
        self.host.depart(slot)
        cohort = self._slot_cohorts[slot]
        self.moves.start(MoveKind.SINK, slot, NO_PAGE, key, cohort, place)
        return place

    def done(self, move: PageMove) -> None:
        """Let both copies be used."""
        if move.kind is MoveKind.OUT:
            self.device.departed(move.page)
            self.host.arrived(move.slot)
        elif move.kind is MoveKind.IN:
            self.host.departed(move.slot)
            self.device.arrived(move.page)
        elif move.kind is MoveKind.SPILL:
            self.host.departed(move.slot)
            if self.host.key(move.slot) == move.key:  # else another move found it damaged
                self.adopt([move.key])
        elif move.kind is MoveKind.SINK:
            self.host.departed(move.slot)
            self.window.arrived(move.nvme_slot)
        else:
            self.host.arrived(move.slot)
        self.rate(move.key)

    def lose(self, move: PageMove) -> None:
        """Forget the copy that could not be read, or written."""
        if move.kind is MoveKind.OUT:
            self.host.forget(move.slot)
            self.device.departed(move.page)
            self.device.rate(move.page, precious=False)  # or it would be tried again at once
        elif move.kind is MoveKind.IN:
            # The copy on NVMe, too, from which it may have come: who asks for it would ask for ever.
            self.nvme.discard(move.key)
            self.host.forget(move.slot)
            self.host.departed(move.slot)
            self.device.forget(move.page)
        elif move.kind is MoveKind.SPILL:
            self.host.departed(move.slot)
            self.host.rate(move.slot, precious=False)
        elif move.kind is MoveKind.SINK:
            self.host.departed(move.slot)
            self.window.forget(move.nvme_slot)
            self.rate(move.key)
        else:
            self.nvme.discard(move.key)
            self.host.forget(move.slot)
            self.rate(move.key)

    def abandon(self, move: PageMove) -> None:
        """Take note that a move will not end: what it reads is as it was, and what it writes worth nothing."""
        if move.kind is MoveKind.OUT:
            self.host.forget(move.slot)
            self.device.departed(move.page)
        elif move.kind is MoveKind.IN:
            self.host.departed(move.slot)
            self.device.forget(move.page)
        elif move.kind is MoveKind.FETCH:
            self.host.forget(move.slot)
        else:
            self.host.departed(move.slot)
            if move.kind is MoveKind.SINK:
                self.window.forget(move.nvme_slot)
        self.rate(move.key)

    def check_integrity(self) -> None:
        """Assert that pages and slots are in order, and under the moves that there are."""
        self.device.check_integrity()
        self.host.check_integrity()
        self.window.check_integrity()
        kinds = {kind: [move for move in self.moves if move.kind is kind] for kind in MoveKind}
        readers = (MoveKind.IN, MoveKind.SPILL, MoveKind.SINK)
        reads = {move.slot for kind in readers for move in kinds[kind]}
        writes = {move.slot for kind in (MoveKind.OUT, MoveKind.FETCH) for move in kinds[kind]}
        assert len(reads) == self.host.count(PageState.LEAVING)
        assert len(writes) == self.host.count(PageState.COMING)
        assert len(kinds[MoveKind.SINK]) == self.window.count(PageState.COMING)
        assert len(kinds[MoveKind.OUT]) == self.device.count(PageState.LEAVING)

    @staticmethod
    def _key(pool: PagePool, page: int) -> bytes:
        key = pool.key(page)
        assert key is not None, page
        return key
