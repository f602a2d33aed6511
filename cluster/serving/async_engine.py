"""An engine as asyncio sees it: how much may wait, tokens as they come, and what is given up."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Protocol, TypeVar

from headrace.cluster.completion import Completion
from headrace.cluster.serving.admission import Admission
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.generation import Generation, Order
from headrace.cluster.serving.loop import EngineLoop, EngineState, News
from headrace.cluster.serving.rates import Rates
from headrace.cluster.serving.ring import Standing
from headrace.cluster.serving.served_engine import ServedEngine
from headrace.cluster.serving.terms import Terms
from headrace.scheduler.batch_window import BatchWindow
from headrace.scheduler.errors import HeadraceError, RequestError
from headrace.scheduler.placement import Plan
from headrace.scheduler.request import Priority

T = TypeVar("T")

RETRY_SECONDS = 2
"""When a client that was turned away should come back."""


class Meter(Protocol):
    """What is measured of tokens; times in seconds."""

    def begun(self, prompt_tokens: int) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def next_tokens(self, count: int, seconds: float) -> None: ...

    def batch_tokens(self, count: int) -> None: ...

    def turned_away(self, code: str) -> None: ...

    def forecast(self, ratio: float) -> None: ...


class AsyncEngine:
    """Runs on one event loop; its engine runs in a thread of its own.

    At most `max_waiting` sequences of each tenant and priority wait for their first token, so that nobody's
    can keep others' out; that is also the most that one request may ask for. How many go on at once is up to the scheduler. An interactive request that does not say by
    when it wants its first token is held to `max_ttft` seconds, if they are given. When nothing runs, the first pass is held
    for as long as the `window` says; without one for no time. `on_end` is told of
    each sequence that ends by itself while somebody waits for it; it must not wait or fail.
    """

    def __init__(
        self,
        engine: ServedEngine,
        meter: Meter,
        max_waiting: int,
        clock: Callable[[], float] = monotonic,
        *,
        max_ttft: float | None = None,
        window: BatchWindow | None = None,
        rates: Rates | None = None,
        on_end: Callable[[Order, Completion], None] | None = None,
    ) -> None:
        self._engine = engine
        self._window = window or BatchWindow(0.0)
        self._loop = EngineLoop(engine, self._post_news, self._post_failure, clock, self._window)
        self._admission, self._max_ttft = Admission(engine.limits), max_ttft
        self._meter, self._max_waiting, self._clock = meter, max_waiting, clock
        self._rates, self._on_end = rates or Rates(), on_end
        self._open: dict[Generation, list[float]] = {}  # when each sequence last had a token
        self._waiting: Counter[tuple[str, Priority]] = Counter()
        self._events: asyncio.AbstractEventLoop | None = None
        self._is_draining = False
        self.error: HeadraceError | None = None
        self.failed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        return self._events is not None and self.error is None and not self._is_draining

    @property
    def num_open(self) -> int:
        """Requests that somebody waits for."""
        return len(self._open)

    @property
    def state(self) -> EngineState:
        return self._loop.state

    @property
    def plan(self) -> Plan:
        """Of the ring that runs: another one may have taken its place."""
        return self._engine.plan

    @property
    def passes(self) -> int:
        """How many have returned until now."""
        return self._engine.stats.passes

    def standing(self) -> Standing:
        """Of the stages and what befell them. It asks Ray: for another thread than the event loop's."""
        stats, roster = self._engine.stats, self._engine.roster()
        last = stats.recoveries[-1] if stats.recoveries else None
        refused = dict(self._engine.events.refused)
        return Standing(roster, refused, stats.num_recoveries, last)

    async def call(self, work: Callable[[ServedEngine], T]) -> T:
        """What the engine's thread makes of the engine, between two passes. HeadraceError from there, and when
        it has ended."""
        return await asyncio.wrap_future(self._loop.call(lambda: work(self._engine)))

    def start(self) -> None:
        """Called on the event loop."""
        self._events = asyncio.get_running_loop()
        self._loop.start()

    def drain(self) -> None:
        """Take no new requests."""
        self._is_draining = True

    def give_up(self) -> None:
        """Let all requests that are open end with an error."""
        for generation in list(self._open):
            generation.fail(ApiError(503, "the server is stopping", code="server_stopping"))

    def end(self, generation: Generation, error: ApiError) -> None:
        """Give a request up, whether or not its reader keeps up."""
        generation.fail(error)
        self._loop.abort(generation)

    async def close(self) -> None:
        """Return when the engine is left alone."""
        await asyncio.to_thread(self.join)

    def join(self) -> None:
        """`close` for another thread than the event loop's, which may be gone."""
        self.drain()
        self._loop.close()

    def now(self) -> float:
        """What `running` may be told of when a request came."""
        return self._clock()

    @contextmanager
    def running(
        self,
        orders: Sequence[Order],
        terms: Terms | None = None,
        since: float | None = None,
        *,
        of_batch: bool = False,
    ) -> Iterator[Generation]:
        """Have sequences generated; what has not ended when the block does is given up.

        `terms` say in which class and by when, counted from `since`, on the clock, or else from now. The
        generation fails with ApiError 504 when a time is over. Those `of_batch` are heard of when they have
        ended, and have their place from somebody else: they do not count among those that wait, nor among
        the tokens that a key may have a minute.

        ApiError when the engine takes no requests, or no more at the moment, or when it could not keep to
        the terms.
        """
        now = self._clock()
        since = now if since is None else since
        terms = (terms or Terms()).by_default(self._max_ttft).after(now - since)
        try:
            queue = orders[0].tenant, terms.priority
            self._admit(0 if of_batch else len(orders), queue)
            held = self._held(orders, now)
            promise = self._admission.promise(orders, terms, self.state.pace, now, held)
            if not of_batch:
                self._rates.take_prompt(orders[0].tenant, _prompt_tokens(orders))
        except ApiError as error:
            self._meter.turned_away(error.code or "")
            raise
        generation = Generation(orders, terms, of_batch=of_batch, begin_by=promise.begin_by)
        self._admission.enter(generation, promise)
        self._open[generation] = [now] * len(orders)
        self._waiting[queue] += 0 if of_batch else len(orders)
        for order in orders:
            self._meter.begun(len(order.token_ids))
        self._loop.submit(generation)
        timers = self._set_timers(generation)
        try:
            yield generation
        finally:
            for timer in timers:
                timer.cancel()
            del self._open[generation]
            self._admission.leave(generation)
            self._waiting[queue] -= 0 if of_batch else generation.num_waiting
            self._loop.abort(generation)

    def _held(self, orders: Sequence[Order], now: float) -> float | None:
        """Seconds for which the first pass may be held from `now` on; None: passes are under way."""
        state = self.state
        if state.held_until is not None:
            return max(0.0, state.held_until - now)
        if self._open:
            return None
        tokens = min(_prompt_tokens(orders), self._engine.limits.token_budget)
        return self._window.length(state.pace.seconds(tokens))

    def _set_timers(self, generation: Generation) -> list[asyncio.TimerHandle]:
        assert self._events is not None
        terms = generation.terms
        times = ((terms.first_within, True), (terms.done_within, False))
        return [
            self._events.call_later(seconds, partial(self._expire, generation, is_first))
            for seconds, is_first in times
            if seconds is not None
        ]

    def _expire(self, generation: Generation, is_first: bool) -> None:
        """A time is over: what has not come by now is of no use."""
        if generation.has_ended or (is_first and not generation.num_waiting):
            return
        if is_first:
            self._admission.came_first(generation, self._clock())
        else:
            self._admission.came_last(generation, self._clock())
        what = "a first token" if is_first else "the answer"
        self._meter.turned_away("deadline_passed")
        generation.fail(
            ApiError(504, f"the time for {what} is over", code="deadline_passed", is_final=True)
        )
        self._loop.abort(generation)

    def _admit(self, count: int, queue: tuple[str, Priority]) -> None:
        if not self.is_ready:
            raise ApiError(503, "the server takes no requests now", code="not_ready")
        assert count <= self._max_waiting, count
        waiting = self._waiting[queue]
        if waiting + count > self._max_waiting:
            raise ApiError(
                429,
                f"{waiting} sequences wait already, of at most {self._max_waiting}:"
                " try again later",
                code="queue_full",
                retry_after=RETRY_SECONDS,
            )

    def _post_news(self, news: list[News]) -> None:
        assert self._events is not None
        self._events.call_soon_threadsafe(self._feed, news)

    def _post_failure(self, error: HeadraceError) -> None:
        assert self._events is not None
        self._events.call_soon_threadsafe(self._end, error)

    def _feed(self, news: list[News]) -> None:
        now = self._clock()
        for each in news:
            times = self._open.get(each.generation)
            if times is None or each.generation.has_failed:
                continue  # given up meanwhile
            if each.error is not None:
                each.generation.fail(_refusal(each.error))
                continue
            if self._on_end is not None and each.completion is not None:
                self._on_end(each.generation.orders[each.index], each.completion)
            if each.generation.of_batch:
                each.generation.feed(each.index, each.samples, each.completion)
                assert each.completion is not None
                count = len(each.completion.token_ids)
                self._admission.advance(each.generation, each.index, count, has_ended=True)
                self._meter.batch_tokens(count)
                continue
            before = each.generation.num_waiting
            each.generation.feed(each.index, each.samples, each.completion)
            begun = before - each.generation.num_waiting
            tenant = each.generation.orders[0].tenant
            queue = tenant, each.generation.terms.priority
            self._rates.take_output(tenant, len(each.samples))
            self._waiting[queue] -= begun
            self._follow(each, bool(begun), now)
            self._measure(len(each.samples), bool(begun), now - times[each.index])
            times[each.index] = now

    def _follow(self, news: News, has_begun: bool, now: float) -> None:
        """Compare what came with what was forecast."""
        generation, admission = news.generation, self._admission
        has_ended = news.completion is not None
        admission.advance(generation, news.index, len(news.samples), has_ended=has_ended)
        if has_begun and not generation.num_waiting:
            ratio = admission.came_first(generation, now)
            if ratio is not None:
                self._meter.forecast(ratio)
        if generation.has_ended:
            admission.came_last(generation, now)

    def _measure(self, count: int, has_begun: bool, seconds: float) -> None:
        if has_begun:
            self._meter.first_token(seconds)
        elif count:
            self._meter.next_tokens(count, seconds)

    def _end(self, error: HeadraceError) -> None:
        self.error = error
        for generation in list(self._open):
            # What happened is for whoever runs the server; clients cannot act upon it.
            generation.fail(ApiError(500, "the engine failed", code="engine_failed"))
        self.failed.set()


def _prompt_tokens(orders: Sequence[Order]) -> int:
    """As `usage` counts them: once for all the sequences of a prompt, which have one list."""
    return sum({id(order.token_ids): len(order.token_ids) for order in orders}.values())


def _refusal(error: HeadraceError) -> Exception:
    return error if isinstance(error, RequestError) else ApiError(500, "the engine failed")
