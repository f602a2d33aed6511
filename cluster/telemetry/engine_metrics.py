"""What the driver of an engine tells of its passes, requests and KV pages."""

from collections.abc import Iterable, Sequence
from typing import Protocol, Self

from headrace.cluster.recovered import KINDS
from headrace.cluster.recovery import StageState
from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.adapter_metrics import adapter_readings
from headrace.cluster.telemetry.events import EngineEvents
from headrace.cluster.telemetry.ray_sink import Beat, RaySink
from headrace.cluster.telemetry.table import Kind
from headrace.scheduler.adapters import AdapterStats
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import MoveKind, StageTimes
from headrace.scheduler.request import FinishReason, Priority
from headrace.scheduler.speculation import DraftCounts

STATES = ("free", "used", "cached", "coming", "leaving")


class Totals(Protocol):
    """EngineStats, from another thread than the engine's: numbers that may be of two passes."""

    @property
    def passes(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...

    @property
    def busy_seconds(self) -> float: ...

    @property
    def bound_seconds(self) -> float: ...

    @property
    def kv(self) -> KVStats: ...

    @property
    def drafts(self) -> DraftCounts: ...

    @property
    def adapter_slots(self) -> AdapterStats: ...

    @property
    def adapter_wait_seconds(self) -> float: ...

    @property
    def stages(self) -> Sequence[StageTimes]: ...

    def idle_seconds(self) -> Sequence[float]: ...


class WatchedEngine(Protocol):
    @property
    def plan(self) -> Plan: ...

    @property
    def stats(self) -> Totals: ...

    @property
    def events(self) -> EngineEvents: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def max_sequences(self) -> int: ...

    @property
    def stage_states(self) -> list[StageState]: ...


class EngineMetrics:
    """Reads an engine's totals every second and hands them on; the engine itself is not held up."""

    def __init__(self, engine: WatchedEngine, ring: str) -> None:
        self._engine, self._sink = engine, RaySink(ring=ring)
        self._beat = Beat(self._flush)

    def _flush(self) -> None:
        stats = self._engine.stats
        self._show_passes(stats)
        self._show_tokens(stats)
        self._show_requests(self._engine.events)
        self._show_kv(stats.kv)
        self._show_adapters(stats)
        self._show_recoveries(self._engine.events)

    def _show_passes(self, stats: Totals) -> None:
        total = self._sink.total
        total(table.BUSY_SECONDS, stats.busy_seconds)
        total(table.BOUND_SECONDS, stats.bound_seconds)
        total(table.PASSES, stats.passes)
        for stage, idle in enumerate(stats.idle_seconds()):
            total(table.STAGE_SECONDS, idle, stage=str(stage), part="idle")
        for term, seconds in self._engine.plan.prediction.terms.items():
            self._sink.gauge(table.PLANNED_PASS_SECONDS, seconds, term=term)

    def _show_tokens(self, stats: Totals) -> None:
        for spec, count in (
            (table.COMPUTED_TOKENS, stats.tokens),
            (table.PROMPT_TOKENS, self._engine.events.prompt_tokens),
            (table.OUTPUT_TOKENS, stats.output_tokens),
            (table.DECODES, stats.drafts.decodes),
            (table.DRAFT_TOKENS, stats.drafts.drafts),
            (table.ACCEPTED_DRAFT_TOKENS, stats.drafts.accepted),
        ):
            self._sink.total(spec, count)

    def _show_requests(self, events: EngineEvents) -> None:
        sink, engine = self._sink, self._engine
        sink.gauge(table.RUNNING, engine.num_running)
        sink.gauge(table.WAITING, max(0, engine.num_waiting))
        sink.gauge(table.MAX_RUNNING, engine.max_sequences)
        for priority in Priority:
            sink.total(table.ADMITTED, events.admitted[priority.value], priority=priority.value)
        for reason in FinishReason:
            sink.total(table.ENDED, events.ended_by[reason.value], reason=reason.value)
        for code in {*table.TURNED_AWAY_CODES, *dict(events.refused)}:
            sink.total(table.TURNED_AWAY, events.refused[code], code=code)
        observed = events.take()
        sink.observe(table.FIRST_TOKEN, observed.first_token.values)
        sink.observe(table.INTER_TOKEN, observed.inter_token.values)
        sink.observe(table.END_TO_END, observed.end_to_end.values)

    def _show_kv(self, kv: KVStats) -> None:
        sink = self._sink
        for tier, state, pages in kv_pages(kv):
            sink.gauge(table.KV_PAGES, pages, tier=tier, state=state)
        for tier in ("device", "host", "nvme"):
            sink.total(table.KV_HITS, getattr(kv.hits, tier), tier=tier)
        sink.total(table.KV_MISSES, kv.misses)
        for kind in MoveKind:
            sink.total(table.KV_MOVES, kv.moved.get(kind, 0), move=kind.value, result="moved")
            sink.total(table.KV_MOVES, kv.lost.get(kind, 0), move=kind.value, result="lost")
        sink.total(table.KV_PREEMPTIONS, kv.preempted_by_swap, by="swap")
        sink.total(table.KV_PREEMPTIONS, kv.preempted_by_recompute, by="recompute")
        sink.total(table.KV_EVICTIONS, kv.evicted_from_device, tier="device")
        sink.total(table.KV_EVICTIONS, kv.evicted_from_host, tier="host")
        sink.total(table.KV_SPOILED, kv.spoiled)

    def _show_adapters(self, stats: Totals) -> None:
        events = self._engine.events
        for reading in adapter_readings(stats.adapter_slots, stats.adapter_wait_seconds, events):
            is_gauge = reading.spec.kind is Kind.GAUGE
            show = self._sink.gauge if is_gauge else self._sink.total
            show(reading.spec, reading.value, **reading.labels)

    def _show_recoveries(self, events: EngineEvents) -> None:
        for stage, now in enumerate(self._engine.stage_states):
            for state in StageState:
                labels = {"stage": str(stage), "state": state.value}
                self._sink.gauge(table.STAGE_STATE, state is now, **labels)
        for kind in KINDS:
            self._sink.total(table.RECOVERIES, events.recoveries[kind], kind=kind)
        for stage in range(len(self._engine.stats.stages)):
            count = events.replaced_stages[stage]
            self._sink.total(table.REPLACED_STAGES, count, stage=str(stage))
        for phase, seconds in dict(events.recovery_seconds).items():
            self._sink.total(table.RECOVERY_SECONDS, seconds, phase=phase)

    def close(self) -> None:
        """Safe to call twice."""
        self._beat.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kv_pages(kv: KVStats) -> Iterable[tuple[str, str, int]]:
    """(tier, state, pages) of all that there are."""
    for tier, counts in (("device", kv.device), ("host", kv.host)):
        for state in STATES:
            yield tier, state, getattr(counts, state)
    yield "nvme", "cached", kv.nvme
    yield "nvme", "used", kv.sunk
