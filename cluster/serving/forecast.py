"""When a request would have its first token and its last: the line before it, played forward."""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from headrace.cluster.serving.pass_model import Pace
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.pages import pages_for
from headrace.scheduler.request import Priority

_MOST_STEPS = 5000
"""After which what was found is taken: far more than any line that `max_waiting` allows."""


@dataclass(slots=True)
class Ahead:
    """A sequence: `prompt` tokens to compute and `output` ones to draw, as far as is known."""

    priority: Priority
    owner: str
    weight: int
    prompt: int
    output: float
    has_begun: bool = False


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds from now."""

    first: float
    done: float

    def after(self, seconds: float) -> "Forecast":
        """When all begins so much later."""
        return Forecast(self.first + seconds, self.done + seconds)


class Line:
    """Plays passes forward as the scheduler makes them, to the end of one sequence.

    What it leaves out: pages that are found instead of computed, requests that come later and go first, and
    that who grows may take another's pages. A sequence is taken to have as many pages all the time as in
    its middle.
    """

    def __init__(self, limits: SchedulerConfig, pace: Pace) -> None:
        self._limits, self._pace = limits, pace
        most = limits.max_sequences * limits.passes_in_flight
        self._places = min(most, limits.num_tails or most)
        self._pages = limits.num_pages
        self._running = 0
        self._others = 0.0  # tokens a pass of those who go behind
        self._passes = 0
        self._ends: list[tuple[int, int, str]] = []  # pass, pages, owner
        self._waiting: dict[tuple[int, str], deque[Ahead]] = defaultdict(deque)
        self._served: dict[str, float] = defaultdict(float)
        self._weights: dict[str, int] = {}
        self._busy: dict[str, int] = defaultdict(int)

    def forecast(
        self, sequences: Iterable[Ahead], asked: Ahead, *, is_idle: bool = False
    ) -> Forecast:
        """Of `asked`, the last of its owner's, behind `sequences`, in the order in which they came. If `is_idle`,
        none of these has begun, and a pass begins now."""
        for each in sequences:
            if each.priority is Priority.BATCH and asked.priority is Priority.INTERACTIVE:
                self._others += each.has_begun
            elif each.has_begun:
                self._start(each)
            else:
                self._wait(each)
        self._wait(asked)
        # Those passes that are under way, of which the oldest has done half.
        under_way = self._limits.passes_in_flight + self._limits.ahead - 0.5
        seconds = 0.0 if is_idle else under_way * self._pace.recent
        first = self._play(asked, seconds)
        rounds = max(0.0, asked.output - 1) * self._limits.passes_in_flight
        return Forecast(first, first + rounds * self._pass_seconds(self._decodes))

    @property
    def _decodes(self) -> float:
        """In a pass: those that run are shared out over the passes in flight."""
        return self._running / self._limits.passes_in_flight

    def _pass_seconds(self, tokens: float) -> float:
        return self._pace.seconds(min(tokens + self._others, self._limits.token_budget))

    def _wait(self, each: Ahead) -> None:
        rank = int(each.priority is Priority.BATCH)
        self._waiting[rank, each.owner].append(each)
        self._weights[each.owner] = each.weight

    def _start(self, each: Ahead) -> None:
        self._running += 1
        self._busy[each.owner] += 1
        self._weights[each.owner] = each.weight
        pages = self._pages_of(each)
        self._pages -= pages
        passes = max(1, round(each.output)) * self._limits.passes_in_flight
        heappush(self._ends, (self._passes + passes, pages, each.owner))

    @staticmethod
    def _pages_of(each: Ahead) -> int:
        return pages_for(each.prompt + round(each.output / 2) + 1)

    def _next(self) -> Ahead | None:
        """Who is admitted next, as by virtual time."""
        lines = [line for line, waiting in self._waiting.items() if waiting]
        if not lines:
            return None
        best = min(lines, key=lambda line: (line[0], self._served[line[1]]))
        return self._waiting[best][0]

    def _has_room(self, each: Ahead) -> bool:
        if not self._running:
            return True
        return self._running < self._places and self._pages_of(each) <= self._pages

    def _play(self, asked: Ahead, seconds: float) -> float:
        current: Ahead | None = None  # whose prompt is being computed
        left = 0
        for _ in range(_MOST_STEPS):
            budget = max(1, int(self._limits.token_budget - self._decodes))
            tokens, drawn = 0, list[Ahead]()
            while tokens < budget:
                if current is None:
                    current = self._next()
                    if current is None or not self._has_room(current):
                        current = None
                        break
                    self._waiting[int(current.priority is Priority.BATCH), current.owner].popleft()
                    self._served[current.owner] += current.prompt / current.weight
                    self._start(current)
                    left = current.prompt
                took = min(left, budget - tokens)
                tokens, left = tokens + took, left - took
                if left:
                    break
                drawn.append(current)
                current = None
            # Where nobody begins, nothing changes until somebody ends.
            count = 1 if tokens or not self._ends else max(1, self._ends[0][0] - self._passes)
            seconds += count * self._pass_seconds(self._decodes - len(drawn) + tokens)
            if any(each is asked for each in drawn):
                return seconds
            self._pass(count)
        return seconds

    def _pass(self, count: int) -> None:
        self._passes += count
        rounds = count / self._limits.passes_in_flight
        for owner, running in self._busy.items():
            self._served[owner] += running * rounds / self._weights[owner]
        while self._ends and self._ends[0][0] <= self._passes:
            _, pages, owner = heappop(self._ends)
            self._pages += pages
            self._running -= 1
            self._busy[owner] -= 1
