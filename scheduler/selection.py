"""Who is in a pass, and with how many tokens."""

from collections import Counter

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.draft import Draft
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.limits import token_limit
from headrace.scheduler.pages import pages_for
from headrace.scheduler.policy import service_order, watermark
from headrace.scheduler.request import Priority, Request
from headrace.scheduler.room import Room
from headrace.scheduler.roster import Roster
from headrace.scheduler.shares import BATCH_PART, Guarantee


class Selection:
    """Has running requests go on, and admits those that wait.

    Batch requests go behind interactive ones: into a pass, into pages, and out of pages first. They keep
    their pages while there is only no room for them in passes. What they get in any case: of BATCH_PART
    tokens computed while some live one is theirs, as far as those that run can take it; and when none of
    them runs, the next one goes with interactive requests once that part would have computed its tokens. So
    does one that has waited for a slot for its adapter while as many began as a pass has sequences.
    """

    def __init__(
        self, config: SchedulerConfig, holdings: Holdings, roster: Roster, room: Room
    ) -> None:
        self._config = config
        self._holdings = holdings
        self._roster = roster
        self._room = room
        self._guarantee = Guarantee(config.max_context)
        self._taken: Counter[Priority] = Counter()  # tokens of the pass that is being made
        self._promoted: Request | None = None
        self._step = 0
        self._oldest: int | None = None

    def fill(self, draft: Draft, step: int, oldest: int | None, *, at_once: bool) -> None:
        """Fill the pass number `step`.

        Requests of the `oldest` pass in flight may go on before it has returned, unless that is None:
        `at_once`, or when nobody else is in this pass.
        """
        self._step, self._oldest = step, oldest
        self._taken.clear()
        self._keep_guarantee(draft, may_follow=at_once)
        if (due := self._roster.slot_queue.due) is not None and due.rank:
            self._roster.promote(due)
        for rank in (0, 1):
            self._continue_running(draft, rank, may_follow=at_once)
            self._admit_waiting(draft, rank)
        self._room.make_for_waiting()
        if oldest is not None and not at_once and not draft.num_slices:
            for rank in (0, 1):
                self._continue_running(draft, rank, may_follow=True)
        self._room.call_back()
        self._guarantee.note(self._taken, is_wanted=self._roster.has_batch)

    def _keep_guarantee(self, draft: Draft, *, may_follow: bool) -> None:
        """Give batch requests first what is owed to them, in a small part of the pass's places."""
        if not (owed := self._guarantee.owed):
            return
        places = max(1, self._config.max_sequences // BATCH_PART)
        self._continue_running(draft, 1, may_follow=may_follow, tokens=owed, places=places)
        first = self._roster.next_waiting(1)
        if first is None or self._roster.runs_batch or owed < len(first.tokens):
            return
        if self._promoted is None or self._promoted.finish_reason is not None:
            self._roster.promote(first)
            self._promoted = first

    def _continue_running(
        self,
        draft: Draft,
        rank: int,
        *,
        may_follow: bool,
        tokens: int | None = None,
        places: int | None = None,
    ) -> None:
        """Have requests of a rank go on, with `tokens` in `places` slices at most."""
        running = self._roster.running
        ready = [r for r in running.values() if r.rank == rank and self._is_ready(r, may_follow)]
        for request in service_order(ready, self._roster.shares):
            if not draft.left or tokens == 0 or places == 0:
                break
            if request.request_id not in running or self._room.is_leaving(request):
                continue  # gave way to an older one, just now
            room = draft.room
            if request.num_cold:
                room = draft.cold_room(pages_for(request.num_scheduled + request.num_pending))
            count = min(request.num_pending, room)
            if tokens is not None:
                count = min(count, tokens)
            if count and self._room.grow(request, count):
                self._take(request, draft, count)
                tokens = None if tokens is None else tokens - count
                places = None if places is None else places - 1

    def _is_ready(self, request: Request, may_follow: bool) -> bool:
        if self._room.is_leaving(request) or request.is_spoiled:
            return False
        if not self._holdings.has_come(request):
            return False
        if not request.passes:
            return True
        if request.num_drafts or self._room.is_due(request):
            return False
        if request.mask and request.num_drawing:
            return False
        ends = len(request.tokens) + request.num_drawing >= token_limit(request, self._config)
        return may_follow and request.passes == [self._oldest] and not ends

    def _admit_waiting(self, draft: Draft, rank: int) -> None:
        """Admit those of a rank in their order, never past one that pages are short for: it would wait for ever.
        One that waits for a slot for its adapter is passed, as SlotQueue says."""
        if not draft.room or self._room.is_short or self._roster.next_waiting(rank) is None:
            return
        passed: set[Request] = set()
        running = [r for r in self._roster.running.values() if r.rank <= rank]
        growth, count = sum(map(self._room.growth, running)), len(running)
        while draft.room and (request := self._roster.next_waiting(rank, passed)) is not None:
            if not self._room.has_slot(request):
                passed.add(request)
                continue
            # The token that is drawn next needs a place, too, if it is computed at all.
            tokens = min(len(request.tokens) + 1, token_limit(request, self._config) - 1)
            # No more is left free than the running ones can still come to need.
            spare = min(growth, watermark(self._config.num_pages, count))
            if not self._room.admit(request, tokens, spare):
                return
            self._roster.start(request)
            growth, count = growth + self._room.growth(request), count + 1
            if self._holdings.has_come(request):
                self._take(request, draft, min(request.num_pending, draft.room))

    def _take(self, request: Request, draft: Draft, count: int) -> None:
        piece = request.slice_of(count)
        draft.add(piece)
        self._taken[request.priority] += count
        self._roster.shares.charge(request, piece.end)
        request.num_scheduled = piece.end
        request.num_drawing += piece.sampling is not None
        request.passes.append(self._step)
        self._roster.in_flight[request.request_id] = request
