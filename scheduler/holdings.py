"""What requests hold: pages, tails and slots of adapters, and what of it is still coming."""

from collections.abc import Collection, Iterable, Sequence

from headrace.scheduler.adapters import AdapterSlots
from headrace.scheduler.cold_pages import ColdPages
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.contexts import ContextIds
from headrace.scheduler.kv_cache import KVCache, Prefix
from headrace.scheduler.kv_stats import KVStats, PageCounts, TierHits
from headrace.scheduler.pages import PagePool, PageState, pages_for
from headrace.scheduler.plan import PAGE_TOKENS, AdapterLoad, PageMove
from headrace.scheduler.prefixes import extend_keys
from headrace.scheduler.request import FinishReason, Request


class Holdings:
    """Gives requests pages and tails and takes them back; finds what need not be computed."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.cache = KVCache(config)
        self.cold = ColdPages(config, self.cache)
        self._tiers = self.cache.tiers
        self.pool = self._tiers.device
        # Whoever runs has a page, so that as many tails as pages bound nothing.
        self.tails = PagePool(config.num_tails or config.num_pages)
        self._has_tails, self._first_in_window = config.num_tails > 0, config.host_pages
        self._identity = config.identity
        self.adapters = AdapterSlots(config.adapter_slots, self._tiers.moves)
        self._loading: dict[int, tuple[Request, Prefix]] = {}
        self._hits, self._misses = TierHits(), 0
        self._by_swap = self._by_recompute = self._spoiled = 0

    @property
    def num_preemptions(self) -> int:
        return self._by_swap + self._by_recompute

    @property
    def is_moving(self) -> bool:
        """Whether moves or loads of adapters are under way, or wait for a pass to carry them."""
        return len(self._tiers.moves) > 0 or self.adapters.is_loading

    def take_loads(self) -> tuple[AdapterLoad, ...]:
        """The adapters that the next pass has brought."""
        return self.adapters.take()

    def has_come(self, request: Request) -> bool:
        """Whether all is there that a running request goes on from: pages of its prefix, and its adapter."""
        if request.coming:
            return False
        return request.adapter is None or self.adapters.has_come(request.adapter)

    def take_moves(self) -> tuple[PageMove, ...]:
        """What the next pass carries, with what there is time to save."""
        self.cache.write_back()
        return self._tiers.moves.take()

    def take_saves(self) -> tuple[PageMove, ...]:
        """What a pass of moves alone carries to NVMe before the end."""
        self.cache.begin_save()
        return self._tiers.moves.take()

    def adopt(self, keys: Iterable[bytes]) -> None:
        """Take over what every stage's NVMe holds of an earlier run, oldest first."""
        self._tiers.adopt(keys)

    def retain(self, keys: Collection[bytes]) -> None:
        """Forget what NVMe has, but for `keys`."""
        self._tiers.retain(keys)

    def contexts(self) -> ContextIds:
        """All that stages hold something in; no move is under way."""
        assert not len(self._tiers.moves)
        tails = self.tails.filled() if self._has_tails else ()
        slots, window = self._tiers.host.filled(), self._tiers.window.filled()
        return ContextIds(self.pool.filled(), tails, slots, window)

    def lose(self, lost: ContextIds, running: Iterable[Request]) -> list[Request]:
        """Let nobody find what stages have lost. Returns those of `running` who had it, released."""
        pages, window = {*lost.pages}, {*lost.window}
        slots = {*lost.slots, *(self._first_in_window + place for place in window)}
        losers = [
            request
            for request in running
            if not pages.isdisjoint((*request.pages, *request.returning))
            or not slots.isdisjoint(request.slots)
            or not window.isdisjoint(request.sinking)
            or (self._has_tails and request.tail in lost.tails)
        ]
        for request in losers:
            self.release(request)
        self._tiers.forget(lost)
        return losers

    def admit(self, request: Request, num_tokens: int, spare: int) -> bool:
        """Give the request pages for `num_tokens` tokens and a tail, if that leaves `spare` pages.

        What is found of its prefix is shared, or loaded: until that has come it is `coming`. At
        least its last token is computed, so that no request needs nothing.
        """
        full, total = (len(request.tokens) - 1) // PAGE_TOKENS, pages_for(num_tokens)
        if not (self.tails.can_allocate(1) and self.pool.can_allocate(total - full + spare)):
            return False  # whatever would be found
        self._extend_keys(request, full)
        prefix = self.cache.find(request.keys[:full])
        if not self.pool.can_allocate(total - prefix.num_held + spare):
            return False
        found = self.cache.claim(prefix)
        request.pages = found + self.pool.allocate(total - len(found))
        [request.tail] = self.tails.allocate(1)
        if request.adapter is not None:
            request.adapter_slot = self.adapters.hold(request.adapter)
        request.num_named = len(found)
        request.num_scheduled = len(found) * PAGE_TOKENS
        request.coming = self.cache.coming(found)
        if request.coming:
            self._loading[request.request_id] = (request, prefix)
        else:
            self._count(request, prefix)
        return True

    def num_needed(self, request: Request, num_tokens: int, spare: int) -> int:
        """Pages that have to be free for `admit` to succeed."""
        full, total = (len(request.tokens) - 1) // PAGE_TOKENS, pages_for(num_tokens)
        self._extend_keys(request, full)
        return total - self.cache.find(request.keys[:full]).num_held + spare

    def can_grow(self, count: int) -> bool:
        return self.pool.can_allocate(count)

    def can_grow_soon(self, count: int, leaving: int = 0) -> bool:
        """Whether it is only moves that keep `count` pages from being allocated. They wait for nothing.

        `leaving` pages are those that requests let go of then.
        """
        return self.pool.can_allocate(count - self.pool.num_settling - leaving)

    def grow(self, request: Request, count: int) -> None:
        request.pages += self.pool.allocate(count)

    def name(self, request: Request, end: int) -> None:
        """Let pages be found that are full of known tokens, after a pass has computed up to `end`."""
        # Tokens behind a stop string are not known any more; a page with some of them is not full.
        full = min(end, len(request.tokens)) // PAGE_TOKENS
        done = request.num_named
        if full > done:
            self._extend_keys(request, full)
            own = request.pages[done - request.num_cold : full - request.num_cold]
            self.cache.name(own, request.keys[done:full], request.request_id)
            request.num_named = full

    def settle(self, moved: Sequence[int], lost: Sequence[int]) -> list[Request]:
        """Let requests begin whose pages have come. Returns those for whom a page will not come."""
        settled = self.cache.settle(moved, lost)
        failed = []
        for request, prefix in [*self._loading.values()]:
            if request.coming & settled.failed:
                failed.append(request)
                continue
            request.coming -= settled.arrived
            if not request.coming:
                del self._loading[request.request_id]
                self._count(request, prefix)
        return failed

    def abandon_moves(self) -> list[Request]:
        """Give up every move of pages, and have adapters loaded once more. Returns the requests that wait for
        pages."""
        waiting = [request for request, _ in self._loading.values()]
        self.adapters.abandon()
        self.cache.abandon_moves()
        return waiting

    def give_way(self, request: Request) -> None:
        """Take a victim's pages; full ones are saved, if that is cheaper than computing them again."""
        has_saved, has_sunk = request.num_cold > 0, request.num_sunk > 0
        named = self._named(request)
        self.release(request)
        # Behind pages that are found by nobody, none is of use.
        if not has_sunk and (named or has_saved) and self.cache.swap_out(named):
            self._by_swap += 1
        else:
            self._by_recompute += 1

    def spoil(self, request: Request) -> None:
        """Take note that a page of the request on NVMe was damaged, in a pass that has returned."""
        if not request.is_spoiled:
            request.is_spoiled = True
            self._spoiled += 1
        self.cold.sunk.distrust(request)

    def release(self, request: Request) -> None:
        """Take back all that the request holds. Its full pages can be found until they are taken."""
        named, slots = self._named(request), request.slots[request.num_sunk : request.num_cold]
        self.cache.release(request.pages)
        self.cold.release(request)
        if request.keep and request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.cache.keep(named, slots)
        request.pages = []
        request.num_named = request.num_scheduled = 0
        request.is_spoiled = False
        request.coming.clear()
        self._loading.pop(request.request_id, None)
        if request.tail is not None:
            self.tails.free([request.tail])
            request.tail = None
        if request.adapter is not None and request.adapter_slot is not None:
            self.adapters.let_go(request.adapter)
            request.adapter_slot = None

    def stats(self) -> KVStats:
        tiers = self._tiers
        return KVStats(
            device=_counts(tiers.device),
            host=_counts(tiers.host),
            nvme=len(tiers.nvme),
            hits=self._hits,
            misses=self._misses,
            moved=dict(tiers.moves.num_moved),
            lost=dict(tiers.moves.num_lost),
            preempted_by_swap=self._by_swap,
            preempted_by_recompute=self._by_recompute,
            evicted_from_device=tiers.device.num_evicted,
            evicted_from_host=tiers.host.num_evicted,
            cold=self.cold.num_held,
            sunk=self.cold.sunk.num_held,
            spoiled=self._spoiled,
        )

    def check_integrity(self, requests: Sequence[Request] = ()) -> None:
        """Assert that pages and tails are in order, and that slots are held by `requests` alone."""
        self.cold.check_integrity(requests)
        self.adapters.check_integrity()
        self.cache.check_integrity()
        self.tails.check_integrity()

    @staticmethod
    def _named(request: Request) -> list[int]:
        """The request's full pages that are on the device."""
        return request.pages[: request.num_named - request.num_cold]

    def _extend_keys(self, request: Request, count: int) -> None:
        adapter = "" if request.adapter is None else request.adapter.digest
        extend_keys(request.keys, self._identity, request.tenant, request.tokens, count, adapter)

    def _count(self, request: Request, prefix: Prefix) -> None:
        """Note what became of the search, now that the request can begin."""
        self._hits = self._hits.plus(prefix.hits)
        self._misses += (len(request.tokens) - 1) // PAGE_TOKENS - prefix.hits.total
        if request.num_cached is None:  # else it may find what it has computed itself
            request.num_cached = min(prefix.hits.total * PAGE_TOKENS, request.num_prompt)


def _counts(pool: PagePool) -> PageCounts:
    return PageCounts(**{state.value: pool.count(state) for state in PageState})
