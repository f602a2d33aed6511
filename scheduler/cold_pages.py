"""Slots that requests hold, for pages that they have on the device no more."""

from collections import Counter
from collections.abc import Sequence

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.kv_cache import KVCache
from headrace.scheduler.memory import lendable_slots
from headrace.scheduler.pages import PageState
from headrace.scheduler.request import Request
from headrace.scheduler.sunk_pages import SunkPages


class ColdPages:
    """Takes requests' full pages to host slots and back; the requests go on meanwhile.

    A page is let go of on the device when its copy has come and no pass in flight holds the request,
    and a slot when the page is on the device again. A copy that is lost leaves its page where it is.
    Where host slots are short, `sunk` has the oldest pages go on to NVMe.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCache) -> None:
        self._cache = cache
        self._device, self._host = cache.tiers.device, cache.tiers.host
        self._most = lendable_slots(config.host_pages)
        self._holders: Counter[int] = Counter()  # of host slots
        self.sunk = SunkPages(config, cache.tiers)

    @property
    def num_held(self) -> int:
        """Host slots that requests hold."""
        return len(self._holders)

    @property
    def num_lendable(self) -> int:
        """Host slots that requests may hold in all."""
        return self._most

    @property
    def num_soon(self) -> int:
        """Host slots that requests may still hold, when what is sinking has sunk."""
        return self._most - self.num_held + self.sunk.num_leaving(self._holders)

    @staticmethod
    def num_unsent(request: Request) -> int:
        """Full pages of a guest that have no slot yet."""
        if request.stays or request.returning:
            return 0
        return request.num_named - len(request.slots)

    def has_room(self, request: Request) -> bool:
        """Whether all of the request's full pages could be sent out now."""
        names = request.keys[len(request.slots) : request.num_named]
        missing = sum(self._host.find(key) is None for key in names)
        return missing <= self._host.num_free and self.num_held + len(names) <= self._most

    def send_out(self, request: Request) -> None:
        """Hold slots for the request's next full pages, as far as there are any."""
        for i in range(len(request.slots), request.num_named):
            page, key = request.pages[i - request.num_cold], request.keys[i]
            if self.num_held >= self._most and self._host.find(key) not in self._holders:
                return
            slot = self._cache.hold_below(page, key, request.request_id)
            if slot is None:
                return
            self._holders[slot] += 1
            request.slots.append(slot)

    def num_leaving(self, request: Request) -> int:
        """Device pages that come free when the request's copies have come."""
        if request.returning:
            return 0
        leaving = request.pages[: len(request.slots) - request.num_cold]
        return sum(not self._device.is_shared(page) for page in leaving)

    def is_due(self, request: Request) -> bool:
        """Whether pages have come that the request should be in no pass for to change to."""
        if request.returning:
            return not self._cache.coming(request.returning)
        if self.sunk.is_due(request):
            return True
        slots = request.slots[request.num_cold :]
        return bool(slots) and self._host.state(slots[0]) is not PageState.COMING

    def retire(self, request: Request) -> None:
        """Let go of the device pages, and host slots, whose copies have come; no pass in flight holds the
        request."""
        assert not request.passes and not request.returning, request.request_id
        done = request.num_cold
        for slot, key in zip(request.slots[done:], request.keys[done:], strict=False):
            if self._host.key(slot) != key:
                self._let_go(request, done)
                request.stays = True  # or it would be tried again at once
                break
            if self._host.state(slot) is PageState.COMING:
                break
            done += 1
        count = done - request.num_cold
        self._cache.release(request.pages[:count])
        del request.pages[:count]
        request.num_cold = done
        self._free(self.sunk.turn(request))

    def can_recall(self, request: Request) -> bool:
        """Whether all of the cold pages can be had without computing them."""
        keys = request.keys[: request.num_cold]
        return len(self._cache.find(keys).keys) == len(keys)

    def recall(self, request: Request) -> bool:
        """Begin to load the cold pages, if all are to be had; the caller has made sure of room for them."""
        assert not request.returning
        keys = request.keys[: request.num_cold]
        prefix = self._cache.find(keys)
        if len(prefix.keys) < len(keys):
            return False
        request.returning = self._cache.claim(prefix)
        return True

    def come_back(self, request: Request) -> None:
        """Change to the pages that were recalled, if they have come; no pass in flight holds it."""
        assert not request.passes and request.returning, request.request_id
        pairs = zip(request.returning, request.keys, strict=False)
        if any(self._device.key(page) != key for page, key in pairs):
            self._give_up(request)
            request.stays = True
        elif not self._cache.coming(request.returning):
            request.pages[:0] = request.returning
            request.returning, request.num_cold, request.is_hosted = [], 0, False
            self._let_go(request, 0)

    def release(self, request: Request) -> None:
        """Take back slots, and pages that were to come."""
        self._give_up(request)
        self._let_go(request, 0)
        request.num_cold, request.is_hosted, request.stays = 0, False, False

    def check_integrity(self, requests: Sequence[Request]) -> None:
        """Assert that slots are held by `requests` alone, as they say."""
        assert Counter(s for r in requests for s in r.slots[r.num_sunk :]) == self._holders
        self.sunk.check_integrity(requests)
        held = {slot for slot in range(self._host.num_pages) if self._host.is_held(slot)}
        assert held == self._holders.keys() and len(held) <= self._most
        for request in requests:
            assert 0 <= request.num_cold <= len(request.slots) <= request.num_named
            assert len(request.returning) in (0, request.num_cold)
            assert request.is_hosted or not request.slots

    def _give_up(self, request: Request) -> None:
        self._cache.release(request.returning)
        request.returning = []

    def _let_go(self, request: Request, first: int) -> None:
        """Of the slots from the first-th on: of all of them, or of some that are in host RAM."""
        if not first:
            self.sunk.release(request)
            del request.slots[: request.num_sunk]
            request.num_sunk = 0
        assert first >= request.num_sunk
        gone = request.slots[first:]
        del request.slots[first:]
        self._free(gone)

    def _free(self, gone: Sequence[int]) -> None:
        self._host.free(gone)
        self._holders.subtract(gone)
        for slot in gone:
            if not self._holders[slot]:
                del self._holders[slot]
