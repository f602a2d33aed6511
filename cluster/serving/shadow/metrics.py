"""What a shadow found: for Prometheus, and for GET /ring."""

from collections.abc import Iterable, Mapping
from time import monotonic
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.cluster.serving.shadow.samples import DROPPED
from headrace.cluster.serving.shadow.shadow import Shadow
from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.table import Kind, MetricSpec
from headrace.runtime.evaluation.answers import AnswerFigures


class ShadowMetrics(Collector):
    """Counters from 0 on, so that the first of a kind is an increase; gauges once there is a batch that has them."""

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow

    def collect(self) -> Iterable[Metric]:
        shadow, totals = self._shadow, self._shadow.totals
        for spec, value in (
            (table.SHADOW_SEQUENCES, totals.sequences),
            (table.SHADOW_TOKENS, totals.tokens),
            (table.SHADOW_KLD_NATS, totals.kld),
            (table.SHADOW_GREEDY_TOKENS, totals.greedy_tokens),
            (table.SHADOW_RESTARTS, totals.restarts),
            (table.SHADOW_WAITING_TOKENS, shadow.queue.tokens),
            (table.SHADOW_MAX_KLD, shadow.options.max_kld),
        ):
            yield _family(spec, {"": value})
        strayed = {"own": totals.strayed, "reference": totals.strayed_from_reference}
        yield _family(table.SHADOW_STRAYED_TOKENS, strayed)
        dropped = {reason: shadow.queue.dropped[reason] for reason in DROPPED}
        yield _family(table.SHADOW_DROPPED, dropped)
        if totals.last is not None:
            yield from _last(totals.last)


def _last(figures: AnswerFigures) -> Iterable[Metric]:
    yield _family(table.SHADOW_KLD, {"mean": figures.kld_mean, "p99": figures.kld_p99})
    yield _family(table.SHADOW_AGREEMENT, agreement(figures))
    yield _family(table.SHADOW_PERPLEXITY_RATIO, {"": _ratio(figures)})


def _family(spec: MetricSpec, values: Mapping[str, float]) -> Metric:
    """`values` by the spec's label, or under "" where it has none."""
    kind = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
    family = kind(spec.name, spec.help, labels=spec.labels)
    for label, value in values.items():
        family.add_metric([label] if spec.labels else [], value)
    return family


def agreement(figures: AnswerFigures) -> dict[str, float]:
    """Shares of tokens by source; of what was emitted only where some of it was greedy."""
    shares, greedy = {"models": figures.top1}, figures.greedy_tokens
    if greedy:
        shares["own"] = 1 - figures.strayed / greedy
        shares["reference"] = 1 - figures.strayed_from_reference / greedy
    return shares


def _ratio(figures: AnswerFigures) -> float:
    return figures.perplexity / figures.reference_perplexity


def shadow_state(shadow: Shadow | None) -> dict[str, Any] | None:
    """What GET /ring says of it: the newest batch, and how much has been compared; None without a shadow."""
    if shadow is None:
        return None
    totals, last = shadow.totals, shadow.totals.last
    return {
        "sequences": totals.sequences,
        "tokens": totals.tokens,
        "dropped": sum(shadow.queue.dropped.values()),
        "waiting_tokens": shadow.queue.tokens,
        "restarts": totals.restarts,
        "last": None
        if last is None
        else {
            "seconds_ago": monotonic() - totals.ended,
            "sequences": last.sequences,
            "tokens": last.tokens,
            "kld_mean": last.kld_mean,
            "kld_p99": last.kld_p99,
            "agreement": agreement(last),
            "perplexity_ratio": _ratio(last),
        },
    }
