"""Who decodes over pages in host RAM, so that others have theirs on the device."""

from collections.abc import Collection, Iterable

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.draft import ColdBatches
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.limits import token_limit
from headrace.scheduler.pages import pages_for
from headrace.scheduler.policy import guest_order, hosting_pays
from headrace.scheduler.request import Request


class Hosting:
    """Sends requests' full pages out instead of having the requests wait, and calls them back.

    A request is a guest of host RAM from when its pages begin to leave until all are on the device
    again. It is scheduled all the time, and turns from one to the other when it is in no pass. Nothing
    here can hold up a request that has precedence: guests are preempted like others.
    """

    def __init__(self, config: SchedulerConfig, holdings: Holdings) -> None:
        self._config, self._holdings, self._cold = config, holdings, holdings.cold
        self.is_possible = config.kv_ring_pages > 0 and config.host_pages > 1
        # Device pages that guests let go of when moves have ended and passes have returned, and whether
        # anybody else may become one: as of this pass, for it is asked for each page that is short.
        self._leaving = 0
        self._may_invite = False

    def advance(self, running: Collection[Request]) -> None:
        """Have guests change to what has come, and send out what they have filled: once a pass."""
        self._turn(running)
        self._leaving = sum(self._cold.num_leaving(r) for r in running if r.is_hosted)
        self._may_invite = self.is_possible

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

    def make_room(self, count: int, running: Collection[Request]) -> bool:
        """Send out pages, if need be, until `count` are free or will be, once moves have ended and passes
        have returned; whether they will."""
        if self._holdings.can_grow_soon(count, self._leaving):
            return True
        if not self._may_invite:
            return False
        batches = self._batches(running)
        for request in guest_order(running):
            if self._may_go(request, batches):
                request.is_hosted = True
                self._cold.send_out(request)
                if (
                    not request.passes
                ):  # else what is there already would be waited for, and by whom?
                    self._cold.retire(request)
                batches.reserve(request.num_pages + 1, 1)
                self._leaving += self._cold.num_leaving(request)
                if self._holdings.can_grow_soon(count, self._leaving):
                    return True
        self._may_invite = False
        return False

    def call_back(self, running: Collection[Request], free: int) -> None:
        """Load guests' pages again, oldest first, as far as `free` pages of the device are not needed."""
        guests = (r for r in running if r.is_hosted and r.num_cold and not r.returning)
        for request in sorted(guests, key=lambda request: request.request_id):
            left = pages_for(token_limit(request, self._config) - 1) - len(request.pages)
            if left > free or request.stays:
                return
            if self._cold.recall(request):
                free -= left

    def _may_go(self, request: Request, batches: ColdBatches) -> bool:
        """Whether it decodes, all of it can go, and it has room in a pass as long as it lives."""
        if request.is_hosted or request.stays or request.coming or request.num_pending > 1:
            return False
        if not request.num_named or not hosting_pays(self._config.costs, request.num_named):
            return False
        most = pages_for(token_limit(request, self._config) - 1)
        if most > self._config.kv_ring_pages or not batches.room(request.num_pages + 1):
            return False
        return self._cold.has_room(request)

    def _batches(self, running: Iterable[Request]) -> ColdBatches:
        """What guests fill of a pass, each with a page more than it has."""
        batches = ColdBatches(self._config)
        for request in running:
            if request.is_hosted:
                batches.reserve(request.num_pages + 1, 1)
        return batches
