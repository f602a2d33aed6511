"""What metrics of adapters stand at, for whoever shows them: Ray, or a server at its /metrics."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.events import EngineEvents
from headrace.cluster.telemetry.table import MetricSpec
from headrace.scheduler.adapters import AdapterStats

SLOT_STATES = ("free", "used", "cached", "coming")


class Reading(NamedTuple):
    spec: MetricSpec
    value: float
    labels: Mapping[str, str]


def adapter_readings(
    stats: AdapterStats, wait_seconds: float, events: EngineEvents
) -> Iterator[Reading]:
    """All of an engine; of names those that requests have had. Any thread may ask."""
    for state in SLOT_STATES:
        yield Reading(table.ADAPTER_SLOTS, getattr(stats, state), {"state": state})
    for spec, value in (
        (table.ADAPTERS_WAITING, stats.waiting),
        (table.ADAPTER_WAIT_SECONDS, wait_seconds),
        (table.ADAPTER_HITS, stats.hits),
        (table.ADAPTER_MISSES, stats.misses),
        (table.ADAPTER_EVICTIONS, stats.evictions),
    ):
        yield Reading(spec, value, {})
    yield Reading(table.ADAPTER_LOADS, stats.loads, {"result": "loaded"})
    yield Reading(table.ADAPTER_LOADS, stats.failed, {"result": "failed"})
    for name, count in dict(events.adapter_sequences).items():
        yield Reading(table.ADAPTER_SEQUENCES, count, {"adapter": name})
    for kind, counts in (
        ("prompt", events.adapter_prompt_tokens),
        ("output", events.adapter_output_tokens),
    ):
        for name, count in dict(counts).items():
            yield Reading(table.ADAPTER_TOKENS, count, {"adapter": name, "kind": kind})
