"""What an engine did over the last seconds, from readings of its totals."""

from collections import deque
from dataclasses import dataclass

from headrace.cluster.job_report import Work

_WINDOW = 5.0
"""Seconds that a span has, or one pass where that takes longer."""

_APART = 0.25
"""Seconds between two readings that are kept: a pass may take milliseconds."""


@dataclass(frozen=True, slots=True)
class Span:
    """The totals at both ends of some passes; the last one returned at `ended`, on the engine's clock."""

    first: Work
    last: Work
    ended: float

    @property
    def work(self) -> Work:
        return self.last.since(self.first)


class RecentWork:
    """Belongs to the thread that steps the engine; anybody may read its spans, which do not change."""

    def __init__(self, start: Work) -> None:
        self._readings: deque[tuple[float, Work]] = deque([(float("-inf"), start)])
        self.span: Span | None = None

    def note(self, now: float, work: Work) -> None:
        """A pass has returned, and these are the totals now."""
        readings = self._readings
        if work.moves != readings[-1][1].moves:
            readings.clear()  # stages' shares are of the time that they were there
            readings.append((now, work))
        while len(readings) > 1 and readings[1][0] <= now - _WINDOW:
            readings.popleft()
        self.span = Span(readings[0][1], work, now)
        if now - readings[-1][0] >= _APART:
            readings.append((now, work))
