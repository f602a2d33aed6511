"""Keeps the spans of the newest passes, timed by the host's clock or by events on CUDA streams.

The times of events are read after the pass has ended, so that nothing waits within it.
"""

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from headrace.runtime.trace import KEPT_PASSES, NO_SPAN, ON_HOST, Kind, Span, Trace

KEPT_SPANS = 200_000
"""Per stage, of the newest passes: some 40 MB of host memory."""


class _DeviceMoment(NamedTuple):
    """When `event` happens, counted from an event whose wall-clock time is known."""

    event: torch.cuda.Event
    anchor: torch.cuda.Event
    anchor_ns: int


_Moment = int | _DeviceMoment


class TraceClock(Protocol):
    def anchor(self) -> None:
        """A pass begins: the compute stream is current and idle."""

    def can_time(self, kind: Kind) -> bool: ...

    def now(self, kind: Kind) -> _Moment: ...

    def resolve(self, moment: _Moment) -> int | None:
        """Nanoseconds since the epoch; None for what has not happened yet."""

    def release(self, moment: _Moment) -> None:
        """`moment` was resolved and is not needed any more."""


class HostTraceClock:
    """For a CPU, where all work is the host's."""

    def anchor(self) -> None:
        pass

    def can_time(self, kind: Kind) -> bool:
        return True

    def now(self, kind: Kind) -> _Moment:
        return time.time_ns()

    def resolve(self, moment: _Moment) -> int | None:
        assert isinstance(moment, int)
        return moment

    def release(self, moment: _Moment) -> None:
        pass


class CudaTraceClock:
    """Events on the current stream. Their clock is tied to the host's once a pass, to some 10 us."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self.anchor()

    def anchor(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        # After the call: on an idle stream the event happens as soon as it is queued.
        self._anchor = event, time.time_ns()

    def can_time(self, kind: Kind) -> bool:
        # An event recorded into a graph tells no time; a graph's replay is timed from outside.
        return kind in ON_HOST or not torch.cuda.is_current_stream_capturing()

    def now(self, kind: Kind) -> _Moment:
        if kind in ON_HOST:
            return time.time_ns()
        try:
            event = self._free.pop()
        except IndexError:
            event = torch.cuda.Event(enable_timing=True)
        event.record()
        return _DeviceMoment(event, *self._anchor)

    def resolve(self, moment: _Moment) -> int | None:
        if isinstance(moment, int):
            return moment
        if not (moment.event.query() and moment.anchor.query()):
            return None
        milliseconds: float = moment.anchor.elapsed_time(moment.event)
        return moment.anchor_ns + round(milliseconds * 1e6)

    def release(self, moment: _Moment) -> None:
        if isinstance(moment, _DeviceMoment):
            self._free.append(moment.event)


@dataclass(slots=True)
class _Timed:
    """A span that is being timed, or waits for its events to be read."""

    recorder: "Recorder"
    kind: Kind
    thread: str
    name: str
    number: int
    nbytes: int
    start: _Moment = 0
    end: _Moment = 0

    def __enter__(self) -> None:
        self.start = self.recorder.clock.now(self.kind)

    def __exit__(self, *_: object) -> None:
        self.end = self.recorder.clock.now(self.kind)
        self.recorder.add(self)


class Recorder:
    """Keeps the spans of the newest `passes` passes, and no more than `spans` of them.

    A span belongs to the pass in which it ended.
    """

    on = True

    def __init__(
        self, clock: TraceClock, *, passes: int = KEPT_PASSES, spans: int = KEPT_SPANS
    ) -> None:
        self.clock = clock
        self._max_passes, self._max_spans = passes, spans
        self._open: deque[_Timed] = deque(maxlen=spans)
        self._kept: deque[list[Span]] = deque()
        self._num_kept = 0
        self._nanoseconds: Counter[Kind] = Counter()
        self._complete = True

    def span(
        self, kind: Kind, name: str = "", number: int = -1, nbytes: int = 0
    ) -> AbstractContextManager[None]:
        if not self.clock.can_time(kind):
            return NO_SPAN
        thread = threading.current_thread().name if kind is Kind.READ else ""
        return _Timed(self, kind, thread, name, number, nbytes)

    @contextmanager
    def one_pass(self, step: int) -> Iterator[None]:
        try:
            with self.span(Kind.PASS, number=step):
                self.clock.anchor()
                yield
        finally:
            self._keep(self._ended())

    def add(self, timed: _Timed) -> None:
        """Keep a span that has ended."""
        self._open.append(timed)

    def add_since(self, start: int, kind: Kind, number: int) -> None:
        """A span of the host's that began at `start` (time.time_ns) elsewhere, and ends now."""
        self._open.append(_Timed(self, kind, "", "", number, 0, start, time.time_ns()))

    def take(self) -> Trace:
        """All that was kept. Spans whose events are still to come are not in it."""
        spans = [span for some in (*self._kept, self._ended()) for span in some]
        self._kept.clear()
        self._num_kept = 0
        seconds = {kind: ns / 1e9 for kind, ns in self._nanoseconds.items()}
        return Trace(os.uname().nodename, tuple(spans), seconds, self._complete)

    def _keep(self, spans: list[Span]) -> None:
        """Keep a pass, and let go of the oldest ones."""
        self._kept.append(spans)
        self._num_kept += len(spans)
        while len(self._kept) > self._max_passes or self._num_kept > self._max_spans:
            self._num_kept -= len(self._kept.popleft())

    def _ended(self) -> list[Span]:
        """The spans that have ended since the last call; the others stay open."""
        spans = []
        self._complete &= len(self._open) < self._max_spans
        for _ in range(len(self._open)):
            timed = self._open.popleft()
            span = self._resolved(timed)
            if span is None:
                self._open.append(timed)
            else:
                self._nanoseconds[span.kind] += span.end - span.start
                spans.append(span)
        return spans

    def _resolved(self, timed: _Timed) -> Span | None:
        start, end = self.clock.resolve(timed.start), self.clock.resolve(timed.end)
        if start is None or end is None:
            return None
        self.clock.release(timed.start)
        self.clock.release(timed.end)
        return Span(timed.kind, start, end, timed.thread, timed.name, timed.number, timed.nbytes)


def make_recorder(device: torch.device, passes: int = KEPT_PASSES) -> Recorder:
    """For a stage on `device`; on CUDA its compute stream must be current."""
    clock = CudaTraceClock() if device.type == "cuda" else HostTraceClock()
    return Recorder(clock, passes=passes)
