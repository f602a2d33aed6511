"""Metrics of our table as Ray's, which its agent on each node shows Prometheus."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

import ray
from ray.util import metrics

from headrace.cluster.telemetry.table import Kind, MetricSpec

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""How often metrics are handed to Ray, whose processes send them to the agent every 10 s. Ray forgets a
gauge that was not set for twice as long: that is why an engine without work goes on."""


def has_agent() -> bool:
    """Whether nodes of the cluster that this process is connected to show metrics."""
    return any(node["Alive"] and node.get("MetricsExportPort", -1) > 0 for node in ray.nodes())


class RaySink:
    """Metrics of one source. A record takes Ray some microseconds; nothing is sent here.

    `labels` are the values of the specs' base labels.
    """

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._made: dict[str, Any] = {}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}

    def total(self, spec: MetricSpec, value: float, **labels: str) -> None:
        """A counter stands at `value`; it is shown from 0 on."""
        key = (spec.name, tuple(labels.values()))
        before = self._totals.get(key)
        if before is None or value > before:
            self._totals[key] = value
            # `inc` refuses 0, without which the first of a rare kind would be no increase.
            self._metric(spec)._record(value - (before or 0), tags=self._tags(labels))

    def gauge(self, spec: MetricSpec, value: float, **labels: str) -> None:
        self._metric(spec).set(value, tags=self._tags(labels))

    def observe(self, spec: MetricSpec, values: Iterable[float], **labels: str) -> None:
        metric, tags = self._metric(spec), self._tags(labels)
        for value in values:
            metric.observe(value, tags=tags)

    def _tags(self, labels: dict[str, str]) -> dict[str, str]:
        return {**self._labels, **labels}

    def _metric(self, spec: MetricSpec) -> Any:
        if spec.name not in self._made:
            self._made[spec.name] = _make(spec)
        return self._made[spec.name]


def _make(spec: MetricSpec) -> Any:
    keys = spec.base_labels + spec.labels
    if spec.kind is Kind.HISTOGRAM:
        return metrics.Histogram(spec.name, spec.help, list(spec.buckets), keys)
    make = metrics.Counter if spec.kind is Kind.COUNTER else metrics.Gauge
    return make(spec.name, spec.help, keys)


class Beat:
    """Has metrics handed on every second by a thread of its own, and once more at the end.

    A run does not fail for its metrics: after an error there are no more of them, and a warning says so.
    """

    def __init__(self, flush: Callable[[], None], seconds: float = FLUSH_SECONDS) -> None:
        self._flush, self._seconds = flush, seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._closing.wait(self._seconds):
                self._flush()
            self._flush()
        except Exception:
            log.warning("there are no metrics from here on", exc_info=True)

    def close(self) -> None:
        """Hand on what there is. Safe to call twice."""
        self._closing.set()
        self._thread.join(self._seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
