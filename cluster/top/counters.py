"""Counters and gauges as nodes show them, and how fast counters grow."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

WINDOW = 25.0
"""Seconds that rates are taken over. Ray's processes tell their node every 10."""

STALE = 15.0
"""Seconds without growth after which a counter stands still."""

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: Labels
    value: float


def parse(text: str, prefix: str) -> Iterator[Sample]:
    """The samples of metrics whose names begin with `prefix`, from Prometheus' text format. ValueError for another
    one. Nodes show much else, which is not looked into."""
    heads = tuple(start + prefix for start in ("", "# HELP ", "# TYPE "))
    ours = "".join(line for line in text.splitlines(keepends=True) if line.startswith(heads))
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            yield Sample(sample.name, sample.labels, sample.value)


@dataclass(slots=True)
class _Series:
    """One counter or gauge: its value, and when it was seen to change to what."""

    labels: Labels
    first: float
    seen: float
    value: float
    changes: deque[tuple[float, float]] = field(default_factory=deque)

    def note(self, now: float, value: float) -> None:
        self.seen = now
        if value != self.value:
            self.value = value
            self.changes.append((now, value))
        while len(self.changes) > 2 and self.changes[1][0] < now - WINDOW:
            self.changes.popleft()

    def rate(self, now: float) -> float:
        """0 before two changes were seen: how old the first value was is not known."""
        if len(self.changes) < 2:
            return 0.0
        (start, low), (end, high) = self.changes[0], self.changes[-1]
        if now - end > STALE or high <= low:
            return 0.0
        return (high - low) / (end - start)


class Readings:
    """What was seen of metrics by and by; `now` is any clock's, in seconds.

    A counter grows in steps, as its process tells of it. So a rate is taken between two steps, not between two
    looks, which may have seen one step or two.
    """

    def __init__(self) -> None:
        self._series: dict[str, dict[tuple[tuple[str, str], ...], _Series]] = {}
        self._now = 0.0

    def note(self, now: float, samples: Iterable[Sample]) -> None:
        """All that is shown now: what is not among it is gone."""
        self._now = now
        for sample in samples:
            known = self._series.setdefault(sample.name, {})
            key = tuple(sorted(sample.labels.items()))
            series = known.setdefault(key, _Series(sample.labels, now, now, sample.value))
            series.note(now, sample.value)
        for name, known in self._series.items():
            self._series[name] = {k: each for k, each in known.items() if each.seen == now}

    def rate(self, name: str, **labels: str) -> float:
        """Growth a second of all counters with these labels."""
        return sum(each.rate(self._now) for each in self._of(name, labels))

    def total(self, name: str, **labels: str) -> float:
        """What they stand at, summed up."""
        return sum(each.value for each in self._of(name, labels))

    def newest(self, name: str, **labels: str) -> tuple[float, Labels] | None:
        """The value and all labels of the one that came last: a process that was replaced is shown on for a
        while."""
        found = max(self._of(name, labels), key=lambda each: each.first, default=None)
        return None if found is None else (found.value, found.labels)

    def values(self, name: str, label: str, **labels: str) -> list[str]:
        """Which values a label has there, in order."""
        return sorted({each.labels.get(label, "") for each in self._of(name, labels)})

    def _of(self, name: str, labels: Labels) -> Iterator[_Series]:
        for each in self._series.get(name, {}).values():
            if all(each.labels.get(label) == value for label, value in labels.items()):
                yield each
