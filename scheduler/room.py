"""Pages for requests that need more: some go on over host RAM, or give way, and come back later."""

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.hosting import Hosting
from headrace.scheduler.limits import token_limit
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import Adapter
from headrace.scheduler.policy import (
    choose_holders,
    choose_outranked,
    choose_victim,
    watermark,
)
from headrace.scheduler.request import Request
from headrace.scheduler.roster import Roster


class Room:
    """Decides who has pages on the device when there are not enough for all that run."""

    def __init__(self, config: SchedulerConfig, holdings: Holdings, roster: Roster) -> None:
        self._config, self._holdings, self._roster = config, holdings, roster
        self._hosting = Hosting(config, holdings)
        self._leaving: set[Request] = set()  # to be preempted when they come back
        self.is_short = False

    def advance(self) -> None:
        """Have guests change to what has come: once a pass."""
        self._hosting.advance(self._roster.running.values())
        self.is_short = False

    def is_leaving(self, request: Request) -> bool:
        """Whether it is to be preempted when it comes back."""
        return request in self._leaving

    def is_due(self, request: Request) -> bool:
        """Whether a request that is in flight should come back before it goes on."""
        return self._hosting.is_due(request)

    def growth(self, request: Request) -> int:
        """Pages that a running request still lacks if it goes on to its limit; a guest gives back those
        that it fills."""
        lacks = pages_for(token_limit(request, self._config) - 1) - request.num_pages
        return min(lacks, 1) if request.is_hosted and not request.returning else lacks

    def has_slot(self, request: Request) -> bool:
        """Whether a slot can be had for the adapter of a request that waits, if it has one, and is not another's
        by right; it queues for one otherwise. Those of a higher rank give theirs up if need be."""
        if request.adapter is None:
            return True
        queue = self._roster.slot_queue
        if queue.lets(request) and self._make_slot(request, request.adapter):
            return True
        queue.wait(request)
        return False

    def _make_slot(self, request: Request, adapter: Adapter) -> bool:
        adapters = self._holdings.adapters
        if adapters.can_hold(adapter):
            return True
        if adapters.is_emptying:
            return False
        for victim in choose_holders(self._roster.running.values(), request, self._leaving):
            if victim.passes:
                self._leaving.add(victim)
            else:
                self._preempt(victim)
        return adapters.can_hold(adapter)

    def admit(self, request: Request, num_tokens: int, spare: int) -> bool:
        """Give a request that waits pages for `num_tokens` tokens, if that leaves `spare`; those of a higher
        rank give way if need be. While one of rank 0 has to wait for that the device `is_short` for others.
        There is a slot for its adapter."""
        if self._holdings.admit(request, num_tokens, spare):
            return True
        self.is_short = request.rank == 0
        needed = self._holdings.num_needed(request, num_tokens, spare)
        while (victim := choose_outranked(self._staying(), request)) is not None:
            coming = sum(len(each.pages) for each in self._leaving)
            has_tail = self._holdings.tails.num_free or self._leaving
            if has_tail and self._hosting.make_room(needed - coming, self._staying(), 1):
                return False
            if victim.passes:
                self._leaving.add(victim)
                continue
            self._preempt(victim)
            if self._holdings.admit(request, num_tokens, spare):
                self.is_short = False
                return True
        return False

    def grow(self, request: Request, count: int) -> bool:
        """Make the pages cover `count` more tokens; younger requests give way if need be."""
        missing = pages_for(request.num_scheduled + count) - request.num_pages
        if missing <= 0:
            return True
        if request.rank and self.is_short:
            return False
        while not self._holdings.can_grow(missing):
            if self._hosting.make_room(missing, self._staying(), request.rank):
                if self._holdings.can_grow(missing):
                    break
                return False
            victim = choose_victim(self._roster.running.values(), request)
            if victim is None:
                return False
            if victim.passes:
                # One at a time: whoever else is short may be served by its pages.
                if not self._leaving:
                    self._leaving.add(victim)
                return False
            self._preempt(victim)
        self._holdings.grow(request, missing)
        return True

    def make_for_waiting(self) -> None:
        """Have running requests go on over pages in host RAM until there will be room for those that
        wait, as many as are computed until it is there; they are taken to be like the first of them."""
        if not self._hosting.is_possible or (first := self._roster.first_waiting()) is None:
            return
        tokens, config, running = len(first.tokens) + 1, self._config, len(self._roster.running)
        passes = config.passes_in_flight + config.ahead + 1
        places = config.max_sequences * config.passes_in_flight - running
        wanted = -(-passes * config.token_budget // tokens)
        count = min(wanted, places, self._roster.num_waiting, self._holdings.tails.num_free)
        if count > 0:
            pages = count * pages_for(tokens) + watermark(config.num_pages, running)
            self._hosting.make_room(min(pages, config.num_pages), self._staying(), first.rank)

    def call_back(self) -> None:
        """Where nobody waits and nobody can come to need pages, guests have theirs on the device again."""
        if self._hosting.is_possible and self._roster.first_waiting() is None:
            running = self._roster.running.values()
            growth = sum(self.growth(request) for request in running)
            self._hosting.call_back(running, self._holdings.pool.num_free - growth)

    def land(self, request: Request) -> None:
        """No pass in flight holds the request any more, which goes on."""
        is_leaving = request in self._leaving
        self._leaving.discard(request)
        if request.is_spoiled:
            self.put_back(request)
        elif is_leaving:
            self._preempt(request)

    def end(self, request: Request) -> None:
        """The request does not go on."""
        self._leaving.discard(request)

    def put_back(self, request: Request) -> None:
        """Back to waiting, to look for its prefix once more."""
        self._holdings.release(request)
        self._roster.wait_again(request)

    def _staying(self) -> list[Request]:
        running = self._roster.running.values()
        return [request for request in running if request not in self._leaving]

    def _preempt(self, request: Request) -> None:
        """Back to waiting. Its tokens stay, and its pages where they can be found, for as long."""
        assert not request.passes, request.request_id
        self._holdings.give_way(request)
        self._roster.wait_again(request)
