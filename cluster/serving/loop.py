"""The thread that owns an engine: it takes requests in between passes and hands out their tokens."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import monotonic
from typing import Any, TypeVar

from headrace.cluster.completion import Completion
from headrace.cluster.job_report import Work
from headrace.cluster.serving.generation import Generation
from headrace.cluster.serving.pass_model import Pace, PassModel
from headrace.cluster.serving.recent_work import RecentWork, Span
from headrace.cluster.serving.served_engine import ServedEngine
from headrace.scheduler.adapters import AdapterStats
from headrace.scheduler.batch_window import BatchWindow
from headrace.scheduler.errors import HeadraceError, RequestError, StageError
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.plan import Sample
from headrace.scheduler.speculation import DraftCounts

log = logging.getLogger(__name__)

T = TypeVar("T")

TEND_SECONDS = 1.0
"""How often an engine without work is asked to look after its stages."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine was doing between two passes, and how long these take. Of the sequences,
    `batch_running` and `batch_waiting` are of batch requests. While it holds the first pass back, that begins
    at `held_until` on its clock; `windows` passes began after such a wait, in which `joined` sequences came."""

    running: int = 0
    waiting: int = 0
    batch_running: int = 0
    batch_waiting: int = 0
    kv: KVStats = field(default_factory=KVStats)
    pace: Pace = field(default_factory=Pace)
    drafts: DraftCounts = field(default_factory=DraftCounts)
    adapter_slots: AdapterStats = field(default_factory=AdapterStats)
    adapter_wait_seconds: float = 0.0
    span: Span | None = None
    held_until: float | None = None
    windows: int = 0
    joined: int = 0


@dataclass(slots=True)
class News:
    """What one pass, or a refusal, brought for one sequence."""

    generation: Generation
    index: int
    samples: list[Sample]
    completion: Completion | None = None
    error: HeadraceError | None = None


class EngineLoop:
    """Steps an engine while it has work and sleeps while it has none, or while the `window` is open before its first pass.

    `deliver` and `fail` are called by its thread and must not wait: once a pass with all that it
    brought, and once at most with the error that ended the loop.
    """

    def __init__(
        self,
        engine: ServedEngine,
        deliver: Callable[[list[News]], None],
        fail: Callable[[HeadraceError], None],
        clock: Callable[[], float] = monotonic,
        window: BatchWindow | None = None,
    ) -> None:
        """Without a `window` no pass is held back."""
        self._engine, self._deliver, self._fail, self._clock = engine, deliver, fail, clock
        self._window = window or BatchWindow(0.0)
        self._model, self._since, self._counted = PassModel(), 0.0, (0, 0)
        self._recent = RecentWork(Work.of(engine.stats))
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._is_closing, self._has_ended = False, False
        self._calls: list[Future[Any]] = []
        self._news: dict[int, News] = {}  # of the pass under way, by request
        self._ids: dict[Generation, list[int]] = {}
        self.state = EngineState()
        self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Add all its sequences before the next pass."""
        self._command(partial(self._add, generation, monotonic()))

    def abort(self, generation: Generation) -> None:
        """Give up what of it has not ended before the next pass."""
        self._command(partial(self._abort, generation))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """What the engine's thread finds between two passes. HeadraceError when it has ended before."""
        future: Future[T] = Future()

        def settle() -> None:
            try:
                future.set_result(work())
            except HeadraceError as error:
                future.set_exception(error)

        with self._wake:
            if self._has_ended:
                future.set_exception(StageError("the engine has ended"))
                return future
            self._calls = [*(each for each in self._calls if not each.done()), future]
        self._command(settle)
        return future

    def close(self) -> None:
        """Return when the pass under way has ended and the engine is left alone."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._obey():
                completions = self._engine.step()
                self._measure()
                for completion in completions:
                    self._complete(completion)
                self._hand_out()
        except HeadraceError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the engine failed")
            self._fail(StageError(f"the engine failed: {type(error).__name__}: {error}"))
        finally:
            self._end_calls()

    def _end_calls(self) -> None:
        with self._wake:
            self._has_ended = True
            calls, self._calls = self._calls, []
        for future in calls:
            if not future.done():
                future.set_exception(StageError("the engine has ended"))

    def _obey(self) -> bool:
        """Carry out what was asked for, waiting for it if there is nothing else to do. False at the
        end; True when a pass begins or is under way."""
        while True:
            pause = self._pause()
            with self._wake:
                if pause and not (self._commands or self._is_closing):
                    self._wake.wait(pause)
                    self._since = self._clock()
                if self._is_closing:
                    return False
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            is_due = not self._pause()
            if is_due:
                self._window.begin()
            self._hand_out()
            if is_due:
                return True
            if not (commands or self._engine.has_work):
                self._engine.tend()

    def _pause(self) -> float:
        """Seconds for which there is nothing to do unless something is asked for."""
        engine, window = self._engine, self._window
        if not engine.has_work:
            window.close()
            return TEND_SECONDS
        if (gathered := engine.gathered) is None:
            return 0.0
        tokens = min(gathered.tokens, engine.limits.token_budget)
        begin_by = min((each.begin_by for each in self._ids), default=inf)
        expected = self._model.pace.seconds(tokens)
        return window.left(self._clock(), gathered, engine.limits, expected, begin_by)

    def _measure(self) -> None:
        """Learn from a pass that has returned, if one has, how long passes take."""
        stats, now = self._engine.stats, self._clock()
        passes, tokens = stats.passes - self._counted[0], stats.tokens - self._counted[1]
        if passes:
            self._model.observe(round(tokens / passes), (now - self._since) / passes)
            self._counted, self._since = (stats.passes, stats.tokens), now
            self._recent.note(now, Work.of(stats))

    def _add(self, generation: Generation, arrived: float) -> None:
        self._ids[generation] = ids = []
        for index, order in enumerate(generation.orders):
            news = News(generation, index, [])
            try:
                request_id = self._engine.add(
                    order.token_ids,
                    order.params,
                    order.seed,
                    tenant=order.tenant,
                    keep=order.keep,
                    adapter=order.adapter,
                    priority=generation.terms.priority,
                    weight=generation.terms.weight,
                    on_token=None if generation.of_batch else news.samples.append,
                    arrived=arrived,
                )
            except RequestError as error:
                news.error = error
                self._abort(generation)
                self._deliver([news])
                return
            ids.append(request_id)
            self._news[request_id] = news

    def _abort(self, generation: Generation) -> None:
        for request_id in self._ids.pop(generation, ()):
            if self._news.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def _complete(self, completion: Completion) -> None:
        if (news := self._news.get(completion.request_id)) is not None:
            news.completion = completion
            if completion.error is not None:
                news.error = RequestError(completion.error)

    def _hand_out(self) -> None:
        engine = self._engine
        stats = engine.stats
        self.state = EngineState(
            engine.num_running,
            engine.num_waiting,
            *engine.batch_counts,
            kv=stats.kv,
            pace=self._model.pace,
            drafts=stats.drafts,
            adapter_slots=stats.adapter_slots,
            adapter_wait_seconds=stats.adapter_wait_seconds,
            span=self._recent.span,
            held_until=self._window.until,
            windows=self._window.passes,
            joined=self._window.joined,
        )
        fresh = []
        for request_id, news in list(self._news.items()):
            if not news.samples and news.completion is None:
                continue
            samples = news.samples[:]
            news.samples.clear()  # the engine holds on to the list
            fresh.append(News(news.generation, news.index, samples, news.completion, news.error))
            if news.completion is not None:
                del self._news[request_id]
                self._forget(news.generation, request_id)
        if fresh:
            self._deliver(fresh)

    def _forget(self, generation: Generation, request_id: int) -> None:
        left = self._ids[generation]
        left.remove(request_id)
        if not left:
            del self._ids[generation]
