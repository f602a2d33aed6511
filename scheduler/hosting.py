"""Who decodes over pages in host RAM and on NVMe, so that others have theirs on the device."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from headrace.scheduler.cold_pages import ColdPages
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.draft import ColdBatches
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.limits import token_limit
from headrace.scheduler.pages import pages_for
from headrace.scheduler.policy import clean_watermark, guest_order, hosting_pays
from headrace.scheduler.request import Request

_ANY_RANK = 2


class Hosting:
    """Sends requests' full pages out instead of having the requests wait, and calls them back.

    A request is a guest of host RAM from when its pages begin to leave until all are on the device
    again. It is scheduled all the time, and turns from one to the other when it is in no pass. Nothing
    here can hold up a request that has precedence: guests are preempted like others.

    Where there is a window on NVMe, and host slots are short, guests' old pages sink there. Then a request
    may become a guest for which there is no room in host RAM yet: its pages go out as others sink.
    """

    def __init__(self, config: SchedulerConfig, holdings: Holdings) -> None:
        self._config, self._holdings, self._cold = config, holdings, holdings.cold
        self.is_possible = config.kv_ring_pages > 0 and config.host_pages > 1
        # Device pages that guests let go of when moves have ended and passes have returned, those that go
        # out when others have sunk, and the ranks from which on nobody else may become one: as of this
        # pass, for it is asked for each page that is short.
        self._leaving = self._promised = self._asked = 0
        self._spare = clean_watermark(self._cold.num_lendable)

    def advance(self, running: Collection[Request]) -> None:
        """Have guests change to what has come, and send out what they have filled: once a pass."""
        self._turn(running)
        self._leaving = sum(self._cold.num_leaving(r) for r in running if r.is_hosted)
        self._asked = _ANY_RANK if self.is_possible else 0
        if self._cold.sunk.is_possible:
            self._sink(running)

    def _sink(self, running: Iterable[Request]) -> None:
        """Have old pages sink until guests can send out what they have to, and some pages more."""
        cold, sunk = self._cold, self._cold.sunk
        guests = [r for r in running if r.is_hosted and not r.returning]
        unsent = sum(map(cold.num_unsent, guests))
        wanted = unsent + self._spare - cold.num_soon
        if wanted > 0:
            for request in sorted(guests, key=sunk.num_left, reverse=True):
                wanted -= sunk.begin(request, wanted)
                if wanted <= 0:
                    break
        slots = cold.num_soon + min(sunk.num_free, sum(map(sunk.num_left, guests)))
        # Else nothing would come of waiting for it.
        self._promised = min(unsent, slots) if self._holdings.is_moving else 0

    def _turn(self, running: Iterable[Request]) -> None:
        for request in running:
            if not request.is_hosted:
                continue
            if request.returning:
                if not request.passes:
                    self._cold.come_back(request)
                continue
            if not request.passes:
                self._cold.retire(request)
            if not request.stays:
                self._cold.send_out(request)
            elif not request.slots:
                request.is_hosted = False

    def is_due(self, request: Request) -> bool:
        """Whether a request that is in flight should come back before it goes on."""
        return request.is_hosted and self._cold.is_due(request)

    def make_room(self, count: int, running: Collection[Request], rank: int = 0) -> bool:
        """Send out pages of requests of `rank` and higher ones, if need be, until `count` are free or will
        be, once moves have ended and passes have returned; whether they will."""
        if self._will_have(count):
            return True
        if rank >= self._asked:
            return False
        batches = self._batches(running)
        slots = _SlotsLeft.of(self._cold, running)
        for request in guest_order(each for each in running if each.rank >= rank):
            if self._may_go(request, batches, slots):
                self._invite(request)
                batches.reserve(request.num_pages + 1, 1)
                slots.reserve(request)
                if self._will_have(count):
                    break
        else:
            self._asked = rank
        if self._promised:
            self._sink(running)
        return self._will_have(count)

    def _will_have(self, count: int) -> bool:
        """Whether `count` pages can be taken when moves have ended and passes returned."""
        return self._holdings.can_grow_soon(count, self._leaving + self._promised)

    def _invite(self, request: Request) -> None:
        request.is_hosted = True
        self._cold.send_out(request)
        if not request.passes:  # else what is there already would be waited for, and by whom?
            self._cold.retire(request)
        self._leaving += self._cold.num_leaving(request)
        if self._cold.sunk.is_possible:
            self._promised += self._cold.num_unsent(request)

    def call_back(self, running: Collection[Request], free: int) -> None:
        """Load guests' pages again, oldest first, as far as `free` pages of the device are not needed."""
        guests = (r for r in running if r.is_hosted and r.num_cold and not r.returning)
        for request in sorted(guests, key=lambda request: request.request_id):
            if request.num_sunk and not self._cold.can_recall(request):
                continue  # from NVMe there is no way back
            left = pages_for(token_limit(request, self._config) - 1) - len(request.pages)
            if left > free or request.stays:
                return
            if self._cold.recall(request):
                free -= left

    def _may_go(self, request: Request, batches: ColdBatches, slots: "_SlotsLeft") -> bool:
        """Whether it decodes, all of it can go, and it has room in a pass as long as it lives."""
        if request.is_hosted or request.stays or request.coming or request.num_pending > 1:
            return False
        if not request.num_named:
            return False
        fits = self._cold.has_room(request)
        sunk = 0 if fits else self._cold.sunk.num_old(request)
        if not hosting_pays(self._config.costs, request.num_named, sunk):
            return False
        most = pages_for(token_limit(request, self._config) - 1)
        if most > self._config.kv_ring_pages or not batches.room(request.num_pages + 1):
            return False
        return fits or slots.has_room(request)

    def _batches(self, running: Iterable[Request]) -> ColdBatches:
        """What guests fill of a pass, each with a page more than it has."""
        batches = ColdBatches(self._config)
        for request in running:
            if request.is_hosted:
                batches.reserve(request.num_pages + 1, 1)
        return batches


@dataclass(slots=True)
class _SlotsLeft:
    """Slots for guests' pages when all that may sink has sunk; pages that guests share count twice.

    `old` of their `pages` that are not on NVMe may go there, to `nvme` slots.
    """

    cold: ColdPages
    nvme: int
    pages: int = 0
    old: int = 0

    @classmethod
    def of(cls, cold: ColdPages, running: Iterable[Request]) -> "_SlotsLeft":
        left = cls(cold, cold.sunk.num_free)
        if cold.sunk.is_possible:
            for request in running:
                if request.is_hosted:
                    left.reserve(request)
        return left

    def has_room(self, request: Request) -> bool:
        """Whether another one has a slot for each of its pages; none can be had where nothing sinks."""
        if not self.cold.sunk.is_possible:
            return False
        old = min(self.nvme, self.old + self.cold.sunk.num_old(request))
        return self.pages + request.num_named - old <= self.cold.num_lendable

    def reserve(self, request: Request) -> None:
        self.pages += request.num_named - request.num_sunk - len(request.sinking)
        self.old += self.cold.sunk.num_left(request)
