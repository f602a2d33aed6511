"""How long the first pass of an idle ring waits for sequences that may share it."""

import math
from dataclasses import dataclass

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.errors import HeadraceError

SHARE = 0.05
"""Of what the pass is expected to take, the part that it may begin later."""

MOST = 0.1
"""Seconds after which a person would notice."""

LEAST = 0.001
"""Seconds below which nobody comes, and waiting costs as much as it says."""

LONGEST = 60.0
"""Seconds that may be asked for: whoever wants more has mistaken the unit."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Sequences that wait for the first pass of all, and the tokens that they are to have computed."""

    sequences: int
    tokens: int


class BatchWindow:
    """A pass that streams weights costs the same however many sequences it has, and whoever comes just after it
    began waits for all of it. So the first one waits a little, as long as nothing runs that it would delay.

    Times are seconds on one clock, which its callers read.
    """

    def __init__(self, seconds: float | None = None) -> None:
        """Windows of so many `seconds`; 0: there are none, None: a small part of what a pass takes.
        HeadraceError for more than LONGEST, or less than nothing."""
        if seconds is not None and not 0.0 <= seconds <= LONGEST:
            raise HeadraceError(f"--batch-window must be from 0 to {LONGEST:g} s, not {seconds:g}")
        self._seconds = seconds
        self._opened: float | None = None
        self._first = self._newest = 0
        self.until: float | None = None
        """When the pass begins at the latest, while it is being held."""
        self.passes = 0
        """That began after a window."""
        self.joined = 0
        """Sequences that came while a window was open."""

    def length(self, pass_seconds: float) -> float:
        """Of a window before a pass that is expected to take so long; 0 where nothing is known of that."""
        if self._seconds is not None:
            return self._seconds
        seconds = min(SHARE * pass_seconds, MOST)
        return seconds if seconds >= LEAST else 0.0

    def left(
        self,
        now: float,
        gathered: Gathered,
        limits: SchedulerConfig,
        pass_seconds: float,
        begin_by: float = math.inf,
    ) -> float:
        """Seconds for which the pass waits on; 0: it begins. Asked when nothing runs and some wait, as they come.

        The window opens when this is first asked. It ends early when another sequence would have no place in the passes
        that begin then, and at `begin_by`, when one that waits would be too late.
        """
        if self._opened is None:
            self._opened, self._first = now, gathered.sequences
        self._newest = gathered.sequences
        until = min(self._opened + self.length(pass_seconds), begin_by)
        if until <= now or _are_full(gathered, limits):
            return 0.0
        self.until = until
        return until - now

    def begin(self) -> None:
        """A pass begins."""
        if self.until is not None:
            self.passes += 1
            self.joined += max(0, self._newest - self._first)
        self.close()

    def close(self) -> None:
        """Nobody waits any more."""
        self._opened = self.until = None


def _are_full(gathered: Gathered, limits: SchedulerConfig) -> bool:
    """Whether the passes in flight, each with its part of the sequences, have no place for another one."""
    places = limits.max_sequences * limits.passes_in_flight
    places = min(places, limits.num_tails or places)
    tokens = limits.token_budget * limits.passes_in_flight
    return gathered.sequences >= places or gathered.tokens >= tokens
