"""Slots on NVMe that requests hold, for pages that they have in host RAM no more."""

from collections import Counter
from collections.abc import Sequence

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.pages import PageState
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.request import Request
from headrace.scheduler.tiers import Tiers


class SunkPages:
    """Takes requests' cold pages from host slots to slots on NVMe, the oldest first, and never back.

    Only pages whose tokens are all older than the hot window sink. A host slot is let go of when its
    copy has come and no pass in flight holds the request. A copy that is lost leaves its page where it
    is, and its request is asked no more.
    """

    def __init__(self, config: SchedulerConfig, tiers: Tiers) -> None:
        self._tiers, self._host, self._window = tiers, tiers.host, tiers.window
        self._first, self._hot_window = config.host_pages, config.hot_window
        self._leaving: Counter[int] = (
            Counter()
        )  # host slots, by the requests that wait to leave them
        self.is_possible = config.window_pages > 0

    @property
    def num_free(self) -> int:
        """Slots on NVMe that can be taken."""
        return self._window.num_free

    @property
    def num_held(self) -> int:
        """Slots on NVMe that hold requests' pages."""
        return self._window.count(PageState.USED)

    def num_old(self, request: Request) -> int:
        """The request's pages, from the first on, that may lie on NVMe."""
        if not (self.is_possible and request.may_sink):
            return 0
        old = max(0, request.num_scheduled - self._hot_window) // PAGE_TOKENS
        return min(request.num_cold if request.stays else request.num_named, old)

    def num_left(self, request: Request) -> int:
        """Those of them that have not begun to sink."""
        return max(0, self.num_old(request) - request.num_sunk - len(request.sinking))

    def num_leaving(self, holders: Counter[int]) -> int:
        """Host slots that all of their `holders` leave when their copies have come."""
        return sum(count == holders[slot] for slot, count in self._leaving.items())

    def begin(self, request: Request, count: int) -> int:
        """Have up to `count` more of the request's cold pages sink; how many do."""
        first = request.num_sunk + len(request.sinking)
        last = min(first + count, self.num_old(request), request.num_cold)
        for i in range(first, last):
            slot, key = request.slots[i], request.keys[i]
            place = self._window.find(key)
            if place is None:
                if not self._window.num_free:
                    return i - first
                if self._host.key(slot) != key:  # a move from it failed
                    request.may_sink = False
                    return i - first
                place = self._tiers.sink(slot)
            self._window.share(place)
            request.sinking.append(place)
            self._leaving[slot] += 1
        return max(0, last - first)

    def is_due(self, request: Request) -> bool:
        """Whether copies have come that the request should be in no pass for to change to."""
        sinking = request.sinking
        return bool(sinking) and self._window.state(sinking[0]) is not PageState.COMING

    def turn(self, request: Request) -> list[int]:
        """Change to the copies that have come; the host slots that are let go of for them."""
        assert not request.passes, request.request_id
        gone: list[int] = []
        for place in request.sinking:
            if self._window.state(place) is PageState.COMING:
                break
            if self._window.key(place) != request.keys[request.num_sunk]:
                self._settle(request, gone)
                self._give_up(request)
                request.may_sink = False  # or it would be tried again at once
                return gone
            gone.append(request.slots[request.num_sunk])
            request.slots[request.num_sunk] = self._first + place
            request.num_sunk += 1
        self._settle(request, gone)
        return gone

    def distrust(self, request: Request) -> None:
        """Have nobody else share what the request has on NVMe, of which some is damaged."""
        for slot in request.slots[: request.num_sunk]:
            if self._window.key(slot - self._first) is not None:
                self._window.forget(slot - self._first)
        request.may_sink = False

    def release(self, request: Request) -> None:
        """Take back all slots on NVMe. The caller takes the request's `slots`."""
        self._give_up(request)
        self._window.free([slot - self._first for slot in request.slots[: request.num_sunk]])

    def check_integrity(self, requests: Sequence[Request]) -> None:
        """Assert that slots on NVMe are held by `requests` alone, as they say."""
        sunk = [slot - self._first for r in requests for slot in r.slots[: r.num_sunk]]
        held = {place for place in range(self._window.num_pages) if self._window.is_held(place)}
        assert held == {*sunk, *(place for r in requests for place in r.sinking)}
        leaving = Counter(
            slot for r in requests for slot in r.slots[r.num_sunk :][: len(r.sinking)]
        )
        assert leaving == self._leaving
        for request in requests:
            assert 0 <= request.num_sunk + len(request.sinking) <= request.num_cold

    def _settle(self, request: Request, gone: Sequence[int]) -> None:
        """The first of `sinking` have sunk, and left the host slots `gone`."""
        del request.sinking[: len(gone)]
        self._stay(gone)

    def _give_up(self, request: Request) -> None:
        self._window.free(request.sinking)
        self._stay(request.slots[request.num_sunk :][: len(request.sinking)])
        request.sinking = []

    def _stay(self, slots: Sequence[int]) -> None:
        self._leaving.subtract(slots)
        for slot in slots:
            if not self._leaving[slot]:
                del self._leaving[slot]
