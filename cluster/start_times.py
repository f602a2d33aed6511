"""Where the seconds of a start went: one line for people who tune clusters."""

import time
from collections.abc import Callable

from headrace.scheduler.placement import Plan
from headrace.scheduler.sizes import format_size


class StartTimes:
    """Seconds of the steps of a start, which follow each other."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._steps: list[str] = []

    def ended(self, step: str) -> None:
        """`step` has taken the time since the one before it."""
        now = self._clock()
        self._steps.append(f"{step} {now - self._last:.1f}")
        self._last = now

    def __str__(self) -> str:
        return f"started in {self._last - self._started:.1f} s: {', '.join(self._steps)}"


def read_at_start(plan: Plan) -> str:
    """The bytes that stages read before their first pass."""
    return format_size(sum(m.resident + m.head + m.embed for m in plan.memory))
