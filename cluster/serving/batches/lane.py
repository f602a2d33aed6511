"""The way of batches to the engine, beside interactive requests: the one place that says how many of
their sequences are in it, and as what."""

import asyncio
import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from headrace.cluster.row_loop import Finished
from headrace.cluster.rows import Draft
from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.batches.lines import LineError
from headrace.cluster.serving.choices import Answer
from headrace.cluster.serving.http import api_error
from headrace.cluster.serving.reader import Model, Work
from headrace.cluster.serving.terms import Terms
from headrace.scheduler.errors import HeadraceError, RequestError
from headrace.scheduler.request import Priority

PREPARED = 32
"""Lines of a batch that are tokenized and wait for the engine."""

POLL_SECONDS = 0.02
"""How soon it is noticed that the engine has room again, when nothing of ours has ended."""

STEP_SECONDS = 0.1


class EngineLostError(HeadraceError):
    """The engine failed or the server stops: what runs is lost, and starts again another time."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A line on its way. `done` is called on the event loop, with the answer's body or an error."""

    draft: Draft
    work: Work
    created: int
    done: "Callable[[Ticket, dict[str, Any] | BaseException], None]"
    task: "asyncio.Task[None] | None" = None


class BatchLane:
    """Runs on the event loop. At most `window` sequences are in the engine at once, in the class that gives
    way, and none is added while any other waits there. `weights` are those of keys by their names; who has
    no key, or none any more, has a weight of 1."""

    def __init__(
        self, engine: AsyncEngine, model: Model, window: int, weights: Mapping[str, int]
    ) -> None:
        self._engine, self._model, self._window, self._weights = engine, model, window, weights
        self._waiting: deque[Ticket] = deque()
        self._in_engine = 0
        self._burst, self._added = max(8, window // 4), 0
        self._state = engine.state
        self._is_open = True
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)
        self._pump()

    def give_up(self, ticket: Ticket) -> None:
        if ticket.task is not None:
            ticket.task.cancel()
        elif ticket in self._waiting:
            self._waiting.remove(ticket)

    def close(self) -> None:
        """Let nothing more into the engine; what is in it goes on."""
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()

    def _pump(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._is_open and self._waiting and self._has_room(self._waiting[0]):
            ticket = self._waiting.popleft()
            count = len(ticket.work.orders)
            self._in_engine += count
            self._added += count
            ticket.task = asyncio.ensure_future(self._generate(ticket))
            ticket.task.add_done_callback(partial(self._left, ticket))
        if self._is_open and self._waiting:
            self._timer = asyncio.get_running_loop().call_later(POLL_SECONDS, self._pump)

    def _has_room(self, ticket: Ticket) -> bool:
        """A line of more sequences than the window has it to itself."""
        count = len(ticket.work.orders)
        if self._in_engine and self._in_engine + count > self._window:
            return False
        state = self._engine.state
        if state is not self._state:
            self._state, self._added = state, 0
        return not state.waiting and self._added < self._burst

    async def _generate(self, ticket: Ticket) -> None:
        answer = Answer(ticket.work, self._model, ticket.created)
        terms = Terms(Priority.BATCH, self._weights.get(ticket.work.orders[0].tenant, 1))
        with self._engine.running(ticket.work.orders, terms, of_batch=True) as generation:
            body = await answer.whole(generation)
        ticket.done(ticket, body)

    def _left(self, ticket: Ticket, task: "asyncio.Task[None]") -> None:
        """Also of a task that was given up before it began."""
        self._in_engine -= len(ticket.work.orders)
        if not task.cancelled() and (error := task.exception()) is not None:
            ticket.done(ticket, error)
        self._pump()


class LaneRows:
    """A batch's lines through a lane, as a RowRunner: one thread calls it, another one than the lane's.

    `line` makes a line of an answer's body. `created` is in Unix seconds.
    """

    def __init__(
        self,
        lane: BatchLane,
        events: asyncio.AbstractEventLoop,
        line: Callable[[Draft, dict[str, Any]], bytes],
        created: int,
    ) -> None:
        self._lane, self._events, self._line, self._created = lane, events, line, created
        self._tickets: set[Ticket] = set()
        self._results: queue.SimpleQueue[tuple[Ticket, dict[str, Any] | BaseException] | None]
        self._results = queue.SimpleQueue()

    @property
    def has_room(self) -> bool:
        """Not while answers wait to be written: an engine that is faster than this thread would have it start
        lines for ever, and keep all of their answers."""
        return self._results.empty() and len(self._pending()) < PREPARED

    @property
    def has_work(self) -> bool:
        return bool(self._tickets)

    def start(self, draft: Draft, row: Work) -> None:
        ticket = Ticket(
            draft, row, self._created, lambda ticket, got: self._results.put((ticket, got))
        )
        self._tickets.add(ticket)
        self._events.call_soon_threadsafe(self._lane.submit, ticket)

    def step(self) -> Iterator[Finished]:
        """EngineLostError when there is no engine any more."""
        found = self._next(STEP_SECONDS)
        while found is not None:
            ticket, result = found
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                yield Finished(ticket.draft, self._written(ticket.draft, result))
            found = self._next(0.0)

    def give_up(self, *, all_rows: bool) -> None:
        for ticket in list(self._tickets) if all_rows else self._pending():
            self._tickets.discard(ticket)
            self._events.call_soon_threadsafe(self._lane.give_up, ticket)

    def wake(self) -> None:
        """Have `step` return at once. Any thread may call it."""
        self._results.put(None)

    def _pending(self) -> list[Ticket]:
        return [ticket for ticket in self._tickets if ticket.task is None]

    def _next(self, seconds: float) -> tuple[Ticket, dict[str, Any] | BaseException] | None:
        try:
            return self._results.get(timeout=seconds) if seconds else self._results.get_nowait()
        except queue.Empty:
            return None

    def _written(
        self, draft: Draft, result: dict[str, Any] | BaseException
    ) -> bytes | RequestError:
        if isinstance(result, dict):
            try:
                return self._line(draft, result)
            except RequestError as error:
                return error
        if not isinstance(result, Exception):
            raise result
        told = api_error(result)
        if told.status >= 500:
            raise EngineLostError(told.message)
        return LineError.of(told)
