"""Which requests there are: those that wait, run, and are in flight."""

from heapq import heappop, heappush

from headrace.scheduler.request import Request


class Roster:
    """A live request waits or runs. In flight are also requests that ended: stages may still write to
    their pages.
    """

    def __init__(self) -> None:
        self.live: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self.in_flight: dict[int, Request] = {}
        # A heap of ids. One that ended or runs by now is skipped when it comes up.
        self._waiting: list[int] = []

    @property
    def num_waiting(self) -> int:
        return len(self.live) - len(self.running)

    def add(self, request: Request) -> None:
        assert request.request_id not in self.live, request.request_id
        assert request.request_id not in self.in_flight, request.request_id
        self.live[request.request_id] = request
        heappush(self._waiting, request.request_id)

    def oldest_waiting(self) -> Request | None:
        while self._waiting:
            request_id = self._waiting[0]
            if request_id in self.live and request_id not in self.running:
                return self.live[request_id]
            heappop(self._waiting)
        return None

    def start(self, request: Request) -> None:
        """The oldest that waits runs."""
        oldest = heappop(self._waiting)
        assert oldest == request.request_id, (oldest, request.request_id)
        self.running[request.request_id] = request

    def wait_again(self, request: Request) -> None:
        del self.running[request.request_id]
        heappush(self._waiting, request.request_id)

    def end(self, request: Request) -> None:
        del self.live[request.request_id]
        self.running.pop(request.request_id, None)
