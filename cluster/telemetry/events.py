"""What happens to the requests of an engine, noted as it happens and read now and then."""

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.cluster.recovered import Recovery

KEPT = 100
"""Times of a kind that are kept between two readings, drawn evenly from all that there were: what
histograms cost is bounded so, and their quantiles are the same."""


class Sampled:
    """At most KEPT of the values that it was given, each as likely as any other."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._seen = 0

    def add(self, value: float) -> None:
        self._seen += 1
        if len(self.values) < KEPT:
            self.values.append(value)
        elif (place := int(random.random() * self._seen)) < KEPT:
            self.values[place] = value


@dataclass(slots=True)
class Observed:
    """Seconds since the reading before, as far as they were kept."""

    first_token: Sampled = field(default_factory=Sampled)
    inter_token: Sampled = field(default_factory=Sampled)
    end_to_end: Sampled = field(default_factory=Sampled)


@dataclass(slots=True)
class _Times:
    arrived: float
    adapter: str | None
    newest: float | None = None


class EngineEvents:
    """Totals since the engine started, and the newest times. Any thread; nothing here waits or fails.

    Counts are by priority (`admitted`), reason (`ended`), code (`turned_away`), kind (`recoveries`),
    stage (`replaced_stages`), phase (`recovery_seconds`), and name (those of adapters).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, _Times] = {}
        self._observed = Observed()
        self.prompt_tokens = 0
        self.admitted: Counter[str] = Counter()
        self.adapter_sequences: Counter[str] = Counter()
        self.adapter_prompt_tokens: Counter[str] = Counter()
        self.adapter_output_tokens: Counter[str] = Counter()
        self.ended_by: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.recoveries: Counter[str] = Counter()
        self.replaced_stages: Counter[int] = Counter()
        self.recovery_seconds: dict[str, float] = {}

    def added(
        self,
        request: int,
        prompt_tokens: int,
        priority: str,
        arrived: float | None = None,
        adapter: str | None = None,
    ) -> None:
        """A sequence is taken in, which runs with an `adapter` if one is named; it `arrived` then on
        time.monotonic, or now."""
        with self._lock:
            self.prompt_tokens += prompt_tokens
            self.admitted[priority] += 1
            if adapter is not None:
                self.adapter_sequences[adapter] += 1
                self.adapter_prompt_tokens[adapter] += prompt_tokens
            begun = time.monotonic() if arrived is None else arrived
            self._live[request] = _Times(begun, adapter)

    def committed(self, counts: Mapping[int, int]) -> None:
        """A pass brought so many tokens for each of these requests."""
        now = time.monotonic()
        with self._lock:
            observed, live = self._observed, self._live
            for request, count in counts.items():
                times = live.get(request)
                if times is None:
                    continue  # given up meanwhile
                if times.newest is None:
                    observed.first_token.add(now - times.arrived)
                else:
                    observed.inter_token.add((now - times.newest) / count)
                times.newest = now
                if times.adapter is not None:
                    self.adapter_output_tokens[times.adapter] += count

    def ended(self, request: int, reason: str) -> None:
        """A sequence is over, whether or not it was known; given up is "abort"."""
        with self._lock:
            times = self._live.pop(request, None)
            if times is None:
                return
            self.ended_by[reason] += 1
            if reason != "abort":
                self._observed.end_to_end.add(time.monotonic() - times.arrived)

    def turned_away(self, code: str) -> None:
        """A request was refused, or ended early, and why."""
        with self._lock:
            self.refused[code] += 1

    def recovered(self, recovery: Recovery) -> None:
        """The ring goes on, or another one."""
        with self._lock:
            self.recoveries[recovery.kind] += 1
            self.replaced_stages.update(recovery.stages)
            for phase, seconds in recovery.phases.items():
                self.recovery_seconds[phase] = self.recovery_seconds.get(phase, 0.0) + seconds

    def take(self) -> Observed:
        """The times since this was called before."""
        with self._lock:
            taken, self._observed = self._observed, Observed()
            return taken
