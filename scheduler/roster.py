"""Which requests there are: those that wait, run, and are in flight."""

from collections.abc import Container
from heapq import heappop, heappush

from headrace.scheduler.adapters import SlotQueue
from headrace.scheduler.batch_window import Gathered
from headrace.scheduler.plan import Adapter
from headrace.scheduler.request import Priority, Request
from headrace.scheduler.shares import Line, Shares, line_of


class Roster:
    """A live request waits or runs. In flight are also requests that ended: stages may still write to
    their pages. Those that wait stand in lines, one for each rank, owner and adapter.
    """

    def __init__(self, most_passed: int) -> None:
        """`most_passed` is for the queue of those that wait for a slot."""
        self.live: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self.in_flight: dict[int, Request] = {}
        self.shares = Shares()
        self.slot_queue = SlotQueue(most_passed)
        self._num_batch = 0
        # Heaps of ids. One that ended, runs or stands elsewhere by now is skipped when it comes up.
        self._waiting: dict[tuple[Line, Adapter | None], list[int]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self.live) - len(self.running)

    @property
    def gathered(self) -> Gathered | None:
        """Those that live, while nobody has begun: one that had to give way is not held back again."""
        live = self.live.values()
        if not live or any(request.num_cached is not None for request in live):
            return None
        return Gathered(len(live), sum(request.num_pending for request in live))

    @property
    def has_batch(self) -> bool:
        """Whether a batch request lives."""
        return self._num_batch > 0

    @property
    def runs_batch(self) -> bool:
        return any(each.priority is Priority.BATCH for each in self.running.values())

    @property
    def num_running_batch(self) -> int:
        return sum(each.priority is Priority.BATCH for each in self.running.values())

    @property
    def num_waiting_batch(self) -> int:
        return self._num_batch - self.num_running_batch

    def add(self, request: Request) -> None:
        assert request.request_id not in self.live, request.request_id
        assert request.request_id not in self.in_flight, request.request_id
        self.live[request.request_id] = request
        self._num_batch += request.priority is Priority.BATCH
        self.shares.join(request)
        self._line_up(request)

    def first_waiting(self) -> Request | None:
        """Who is next, of the lowest rank that waits."""
        return self.next_waiting(0) or self.next_waiting(1)

    def next_waiting(self, rank: int, passed: Container[Request] = ()) -> Request | None:
        """Who is next of those that have a rank: the oldest of the owner that had least. Those that are `passed` stay,
        with all of their owner and adapter."""
        heads = [self._head(line, adapter) for line, adapter in [*self._waiting] if line[0] == rank]
        waiting = [request for request in heads if request is not None and request not in passed]
        if len(waiting) < 2:
            return waiting[0] if waiting else None
        return min(waiting, key=lambda r: (self.shares.time(line_of(r)), r.request_id))

    def waiting_adapters(self) -> set[Adapter]:
        """Of those that wait."""
        waiting = {adapter for line, adapter in [*self._waiting] if self._head(line, adapter)}
        return {adapter for adapter in waiting if adapter is not None}

    def start(self, request: Request) -> None:
        """Who is next runs."""
        first = heappop(self._waiting[line_of(request), request.adapter])
        assert first == request.request_id, (first, request.request_id)
        self.running[request.request_id] = request
        self.slot_queue.begin(request)

    def wait_again(self, request: Request) -> None:
        del self.running[request.request_id]
        if request.adapter is not None:
            self.slot_queue.wait(request)
        self._line_up(request)

    def promote(self, request: Request) -> None:
        """Have one that waits go with those of rank 0, until it ends."""
        self.shares.leave(request)
        request.rank = 0
        self.shares.join(request)
        self._line_up(request)

    def end(self, request: Request) -> None:
        del self.live[request.request_id]
        self.running.pop(request.request_id, None)
        self._num_batch -= request.priority is Priority.BATCH
        self.shares.leave(request)
        self.slot_queue.end(request)

    def _line_up(self, request: Request) -> None:
        line = line_of(request), request.adapter
        heappush(self._waiting.setdefault(line, []), request.request_id)

    def _head(self, line: Line, adapter: Adapter | None) -> Request | None:
        ids = self._waiting[line, adapter]
        while ids:
            request = self.live.get(ids[0])
            if request is not None and ids[0] not in self.running and line_of(request) == line:
                return request
            heappop(ids)
        del self._waiting[line, adapter]
        return None
