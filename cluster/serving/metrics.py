"""What Prometheus is told of a server."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from headrace.cluster.serving.loop import EngineState
from headrace.scheduler.speculation import DraftCounts

CONTENT_TYPE = CONTENT_TYPE_LATEST

# A pass of a streamed model takes from milliseconds to a minute.
_FIRST_TOKEN = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_NEXT_TOKEN = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 4.0, 10.0)


class Metrics:
    """Counts on the event loop; what the engine is doing is asked for when somebody looks."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "headrace_requests",
            "Requests that have ended, by path or method and status (499: the client went away).",
            ["path", "status"],
            registry=registry,
        )
        self._prompt = Counter(
            "headrace_prompt_tokens", "Tokens of prompts taken in.", registry=registry
        )
        self._output = Counter("headrace_output_tokens", "Tokens generated.", registry=registry)
        self._first = Histogram(
            "headrace_time_to_first_token_seconds",
            "From a request's admission to its first token.",
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._next = Histogram(
            "headrace_inter_token_seconds",
            "Between two tokens of a sequence.",
            buckets=_NEXT_TOKEN,
            registry=registry,
        )

        self._turned_away = Counter(
            "headrace_turned_away",
            "Requests that were refused or ended early for want of time or room, or for a limit of their"
            " key's, by code.",
            ["code"],
            registry=registry,
        )
        self._forecast = Histogram(
            "headrace_first_token_forecast_ratio",
            "Time to the first token over its forecast, of requests with a time.",
            buckets=_RATIOS,
            registry=registry,
        )

    def watch(self, state: Callable[[], EngineState]) -> None:
        """Show what the engine is doing, too."""
        self._registry.register(_Engine(state))

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

    def forecast(self, ratio: float) -> None:
        self._forecast.observe(ratio)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, state: Callable[[], EngineState]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        state = self._state()
        kv = state.kv
        yield GaugeMetricFamily(
            "headrace_running_sequences", "Sequences that have pages.", value=state.running
        )
        yield GaugeMetricFamily(
            "headrace_waiting_sequences", "Sequences that wait for pages.", value=state.waiting
        )
        yield GaugeMetricFamily(
            "headrace_pass_seconds", "What recent passes took.", value=state.pace.recent
        )
        pages = GaugeMetricFamily(
            "headrace_kv_pages", "KV pages by tier and state.", labels=["tier", "state"]
        )
        for tier, counts in (("device", kv.device), ("host", kv.host)):
            for name in ("free", "used", "cached", "coming", "leaving"):
                pages.add_metric([tier, name], getattr(counts, name))
        pages.add_metric(["nvme", "cached"], kv.nvme)
        yield pages
        yield from _drafts(state.drafts)


def _drafts(counts: DraftCounts) -> Iterable[Metric]:
    """Tokens a sequence and pass are (decodes + accepted) / decodes."""
    for name, text, value in (
        ("decodes", "Times that a pass drew for a sequence.", counts.decodes),
        ("draft_tokens", "Guessed tokens that passes verified.", counts.drafts),
        ("accepted_draft_tokens", "Guessed tokens that were right.", counts.accepted),
    ):
        yield CounterMetricFamily(f"headrace_{name}", text, value=value)
