"""What the ring is doing, for who looks at it: GET /ring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from headrace.cluster.job_report import Work
from headrace.cluster.recovered import Recovery
from headrace.cluster.recovery import StageStanding
from headrace.cluster.serving.loop import EngineState
from headrace.cluster.telemetry.adapter_metrics import SLOT_STATES
from headrace.scheduler.kv_stats import PageCounts
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.plan import PAGE_TOKENS, StageTimes


@dataclass(frozen=True, slots=True)
class Standing:
    """How the stages stand, none where they are no processes; how many requests were turned away, by code; how
    often stages were recovered, and the last time."""

    roster: Sequence[StageStanding] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    num_recoveries: int = 0
    last: Recovery | None = None


def ring_state(
    plan: Plan, state: EngineState, now: float, standing: Standing, *, operator: bool
) -> dict[str, Any]:
    """Sequences, KV pages, the passes of the last seconds and each stage's part in them; `now` is on the
    engine's clock. Seconds, bytes a second, and shares of the time that the engine was busy; `passes`,
    and `times` of stages, are None before the first pass. Where processes are, and why they were replaced, is
    for an `operator`."""
    work = None if state.span is None else state.span.work
    stages = range(plan.placement.num_stages)
    if work is not None and len(work.stages) != len(stages):
        work = None  # of a ring whose place another one has just taken
    return {
        "object": "ring",
        "sequences": _sequences(plan, state),
        "kv": _kv(plan, state),
        "adapters": _adapters(plan, state),
        "plan": _planned(plan),
        "passes": None if work is None else _passes(work),
        "seconds_since_pass": None if state.span is None else max(0.0, now - state.span.ended),
        "rejected": dict(standing.refused),
        "recoveries": _recoveries(standing, operator=operator),
        "name": standing.roster[0].ring if standing.roster else "",
        "stages": [
            {**_stage(plan, stage, work), "process": _process(standing, stage, operator=operator)}
            for stage in stages
        ],
    }


def _process(standing: Standing, stage: int, *, operator: bool) -> dict[str, Any] | None:
    if stage >= len(standing.roster):
        return None
    one = standing.roster[stage]
    told: dict[str, Any] = {"state": one.state.value, "seconds": one.seconds}
    return {**told, "node": one.place.node, "pid": one.place.pid} if operator else told


def _recoveries(standing: Standing, *, operator: bool) -> dict[str, Any]:
    last = standing.last
    if last is None:
        return {"count": standing.num_recoveries, "last": None}
    told: dict[str, Any] = {
        "kind": last.kind,
        "stages": list(last.stages),
        "seconds": last.seconds,
        "phases": dict(last.phases),
        "requests": last.requests,
        "seconds_ago": max(0.0, monotonic() - last.ended),
    }
    if operator:
        told["cause"] = last.cause
    return {"count": standing.num_recoveries, "last": told}


def _sequences(plan: Plan, state: EngineState) -> dict[str, Any]:
    batch = {"running": state.batch_running, "waiting": state.batch_waiting}
    return {
        "interactive": {
            "running": state.running - state.batch_running,
            "waiting": state.waiting - state.batch_waiting,
        },
        "batch": batch,
        "max_running": plan.max_sequences * plan.passes_in_flight,
    }


def _kv(plan: Plan, state: EngineState) -> dict[str, Any]:
    kv = state.kv
    # Before the first request nothing has been counted, and all pages are free.
    device = kv.device if kv.device.total else PageCounts(free=plan.num_pages)
    host = kv.host if kv.host.total else PageCounts(free=plan.host_pages)
    return {
        "format": plan.kv_format,
        "page_tokens": PAGE_TOKENS,
        "device": _pages(device),
        "host": _pages(host),
        "nvme": {"used": kv.sunk, "cached": kv.nvme},
    }


def _pages(counts: PageCounts) -> dict[str, int]:
    names = ("total", "free", "used", "cached", "coming", "leaving")
    return {name: getattr(counts, name) for name in names}


def _adapters(plan: Plan, state: EngineState) -> dict[str, Any]:
    stats = state.adapter_slots
    slots = {name: getattr(stats, name) for name in SLOT_STATES}
    # Before the first request nothing has been counted.
    free = plan.adapter_slots - sum(slots.values()) + stats.free
    return {"slots": {**slots, "free": free}, "waiting": stats.waiting}


def _planned(plan: Plan) -> dict[str, Any]:
    """What the planner said of full passes, and what it says binds them."""
    prediction = plan.prediction
    return {
        "sequences": prediction.sequences,
        "pass_seconds": prediction.pass_seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "bound_by": prediction.bound_by,
        "visits": len(plan.placement.visits),
        "passes_in_flight": plan.passes_in_flight,
    }


def _passes(work: Work) -> dict[str, Any]:
    busy, count = work.busy_seconds, max(1, work.passes)
    return {
        "count": work.passes,
        "busy_seconds": busy,
        "pass_seconds": busy / count,
        "bound_seconds": work.bound_seconds / count,
        "share_of_bound": work.share_of_bound,
        "tokens_per_second": _rate(work.output_tokens, busy),
        "nvme_bytes_per_second": _rate(work.nvme_bytes, busy),
        "pcie_bytes_per_second": _rate(work.pcie_bytes, busy),
    }


def _stage(plan: Plan, stage: int, work: Work | None) -> dict[str, Any]:
    tiers = plan.placement.tiers
    layers = [{"layer": i, "tier": tiers[i].value} for i in plan.placement.layers_of(stage)]
    return {
        "stage": stage,
        "layers": layers,
        "resident_layers": sum(each["tier"] == Tier.DEVICE for each in layers),
        "ring_slots": plan.ring_slots[stage],
        "slot_bytes": plan.slot_bytes,
        "device_bytes": plan.memory[stage].device,
        "host_bytes": plan.memory[stage].host,
        "times": None if work is None else _times(work.stages[stage], work.busy_seconds),
    }


def _times(times: StageTimes, busy: float) -> dict[str, Any]:
    """Shares of the time, which add up to 1, and bytes a second."""
    waits = times.weights_wait, times.link_wait, times.kv_wait
    computing = max(0.0, times.total - sum(waits))
    # A pass may have begun before the first reading: parts never are more than the whole.
    whole = max(busy, computing + sum(waits))
    weights, link, kv = (_rate(seconds, whole) for seconds in waits)
    return {
        "computing": _rate(computing, whole),
        "waiting_for_weights": weights,
        "waiting_for_link": link,
        "waiting_for_kv": kv,
        "between_passes": _rate(whole - computing - sum(waits), whole),
        "nvme_bytes_per_second": _rate(times.nvme_bytes, whole),
        "host_bytes_per_second": _rate(times.host_bytes, whole),
        "kv_nvme_bytes_per_second": _rate(times.kv_sunk_bytes, whole),
        "kv_host_bytes_per_second": _rate(
            times.kv_in_bytes + times.kv_out_bytes + times.kv_cold_bytes, whole
        ),
        "experts_on_device": (
            1 - times.experts_loaded / times.experts_used if times.experts_used else None
        ),
    }


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
