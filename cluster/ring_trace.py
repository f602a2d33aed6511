"""Records what the driver and the stages of a ring do while somebody wants it. Without that it costs nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from headrace.cluster.pipeline import Pending, Pipeline
from headrace.cluster.stage_traces import StageTrace, TraceSource
from headrace.runtime.trace import NULL_TRACER, Kind, SwitchTracer, Trace, Tracer
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.plan import Adapter, Pass, PassResult

_SPANS_A_PASS = 4
"""The driver's at most: schedule, and once more in vain, in flight, commit."""

_SPANS_BESIDE = 256
"""Of recoveries and replacements."""


@dataclass(frozen=True, slots=True)
class RingTrace:
    """What the driver and each process of a stage recorded of the newest `passes` passes, and in `notes` what is
    lost."""

    driver: Trace
    stages: tuple[StageTrace, ...]
    passes: int
    notes: tuple[str, ...] = ()

    @property
    def newest(self) -> list[Trace | None]:
        """Of the processes that the stages have now, in their order."""
        return [each.trace for each in self.stages if not each.left]


class RingTracing:
    """Belongs to an engine and its thread. `tracer` is the driver's, whether or not anything is recorded."""

    def __init__(self) -> None:
        self.tracer = SwitchTracer()
        self._source: TraceSource | None = None
        self._passes = 0
        self._notes: list[str] = []
        self._take: Callable[[], Trace] | None = None

    def follow(self, source: TraceSource | None) -> None:
        """Other stages run from now on; what those before them recorded is gone with them."""
        if self._passes:
            if self._source is not None:
                self._notes.append("the stages of an earlier ring are gone with what they recorded")
            if source is not None:
                source.begin_trace(self._passes)
        self._source = source

    def begin(self, passes: int) -> None:
        """Record from now on. HeadraceError when that is done already."""
        if self._passes:
            raise HeadraceError("this ring is being recorded already: wait until that has ended")
        from headrace.runtime.recorder import HostTraceClock, Recorder  # imports torch

        driver = Recorder(HostTraceClock(), spans=_SPANS_A_PASS * passes + _SPANS_BESIDE)
        self._passes, self._take = passes, driver.take
        self._notes.clear()
        self.tracer.turn(driver)
        if self._source is not None:
            self._source.begin_trace(passes)

    def end(self) -> Callable[[], RingTrace]:
        """Record no more. What is returned waits for the passes under way, in any thread."""
        assert self._take is not None, "nothing is recorded"
        driver, passes, notes = self._take(), self._passes, tuple(self._notes)
        collect = self._source.end_trace() if self._source is not None else list
        self.tracer.turn(NULL_TRACER)
        self._take, self._passes = None, 0
        return lambda: RingTrace(driver, tuple(collect()), passes, notes)


class _TracedPending:
    def __init__(self, pending: Pending, tracer: Tracer, step: int, submitted: int) -> None:
        self._pending, self._tracer, self._step = pending, tracer, step
        self._submitted = submitted

    def result(self) -> list[PassResult]:
        results = self._pending.result()
        self._tracer.add_since(self._submitted, Kind.IN_FLIGHT, self._step)
        return results


class TracedPipeline:
    """A pipeline whose passes are noted from their submission until their results are taken."""

    def __init__(self, pipeline: Pipeline, tracer: Tracer) -> None:
        self._pipeline, self._tracer = pipeline, tracer

    def submit(self, a_pass: Pass) -> Pending:
        now = time.time_ns()  # before a stage can begin
        return _TracedPending(self._pipeline.submit(a_pass), self._tracer, a_pass.step, now)

    def wait_host_tier(self) -> None:
        self._pipeline.wait_host_tier()

    def check_adapter(self, adapter: Adapter) -> None:
        self._pipeline.check_adapter(adapter)

    def close(self) -> None:
        self._pipeline.close()
