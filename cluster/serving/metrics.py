"""What Prometheus is told of a server."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from headrace.cluster.serving.loop import EngineState
from headrace.cluster.serving.shadow.metrics import ShadowMetrics
from headrace.cluster.serving.shadow.shadow import Shadow
from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.adapter_metrics import Reading, adapter_readings
from headrace.cluster.telemetry.engine_metrics import kv_pages
from headrace.cluster.telemetry.events import EngineEvents
from headrace.cluster.telemetry.table import Kind, MetricSpec
from headrace.scheduler.speculation import DraftCounts

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts on the event loop; what the engine is doing is asked for when somebody looks.

    Requests that are turned away are among the engine's `events`, too, so that Ray's metrics have them.
    """

    def __init__(self, events: EngineEvents) -> None:
        self._events = events
        self._registry = CollectorRegistry()
        self._requests = self._counter(table.REQUESTS)
        self._prompt = self._counter(table.PROMPT_TOKENS)
        self._output = self._counter(table.OUTPUT_TOKENS)
        self._first = self._histogram(table.FIRST_TOKEN)
        self._next = self._histogram(table.INTER_TOKEN)
        self._turned_away = self._counter(table.TURNED_AWAY)
        self._forecast = self._histogram(table.FORECAST_RATIO)

    def _counter(self, spec: MetricSpec) -> Counter:
        return Counter(spec.name, spec.help, spec.labels, registry=self._registry)

    def _histogram(self, spec: MetricSpec) -> Histogram:
        return Histogram(spec.name, spec.help, buckets=spec.buckets, registry=self._registry)

    def watch(self, state: Callable[[], EngineState]) -> None:
        """Show what the engine is doing, too."""
        self._registry.register(_Engine(state, self._events))

    def watch_shadow(self, shadow: Shadow) -> None:
        """Show what the shadow found, too."""
        self._registry.register(ShadowMetrics(shadow))

    def answered(self, path: str, status: int | str) -> None:
        self._requests.labels(path, str(status)).inc()

    def begun(self, prompt_tokens: int) -> None:
        self._prompt.inc(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        self._output.inc()
        self._first.observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        self._output.inc(count)
        for _ in range(count):
            self._next.observe(seconds / count)

    def batch_tokens(self, count: int) -> None:
        """Tokens of a sequence whose times nobody waits for."""
        self._output.inc(count)

    def turned_away(self, code: str) -> None:
        self._turned_away.labels(code).inc()
        self._events.turned_away(code)

    def forecast(self, ratio: float) -> None:
        self._forecast.observe(ratio)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, state: Callable[[], EngineState], events: EngineEvents) -> None:
        self._state, self._events = state, events

    def collect(self) -> Iterable[Metric]:
        state = self._state()
        yield _gauge(table.RUNNING, state.running)
        yield _gauge(table.WAITING, state.waiting)
        yield _gauge(table.RECENT_PASS_SECONDS, state.pace.recent)
        yield _count(table.WINDOWS, state.windows)
        yield _count(table.JOINED, state.joined)
        spec = table.KV_PAGES
        pages = GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
        for tier, name, count in kv_pages(state.kv):
            pages.add_metric([tier, name], count)
        yield pages
        yield from _drafts(state.drafts)
        readings = adapter_readings(state.adapter_slots, state.adapter_wait_seconds, self._events)
        yield from _families(readings)


def _gauge(spec: MetricSpec, value: float) -> Metric:
    return GaugeMetricFamily(spec.name, spec.help, value=value)


def _count(spec: MetricSpec, value: float) -> Metric:
    return CounterMetricFamily(spec.name, spec.help, value=value)


def _families(readings: Iterable[Reading]) -> Iterable[Metric]:
    """One for each spec."""
    found: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
    for spec, value, labels in readings:
        make = GaugeMetricFamily if spec.kind is Kind.GAUGE else CounterMetricFamily
        family = found.setdefault(spec.name, make(spec.name, spec.help, labels=spec.labels))
        family.add_metric([labels[name] for name in spec.labels], value)
    return found.values()


def _drafts(counts: DraftCounts) -> Iterable[Metric]:
    """Tokens a sequence and pass are (decodes + accepted) / decodes."""
    for spec, value in (
        (table.DECODES, counts.decodes),
        (table.DRAFT_TOKENS, counts.drafts),
        (table.ACCEPTED_DRAFT_TOKENS, counts.accepted),
    ):
        yield _count(spec, value)
