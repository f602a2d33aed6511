"""`headrace plan`: what a run would keep where, what a pass streams and how fast that is."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.cluster.cli.sizes import parse_size
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.placement import Placement, Plan, Tier
from headrace.scheduler.planner import make_plan
from headrace.scheduler.sizes import format_size

TERMS = {
    "nvme": "reading from NVMe",
    "pcie": "copying from host memory",
    "compute": "arithmetic",
    "hbm": "device memory traffic",
    "hops": "hops between stages",
}


def make_plan_for(
    shape: ModelShape,
    profile: DeviceProfile,
    *,
    stages: int,
    device_memory: str,
    host_memory: str = "0",
    hosts: int = 1,
    process_bytes: int = 0,
    context: int | None = None,
    concurrent_sequences: int | None = None,
    choices: Choices | None = None,
) -> Plan:
    """The plan of `stages` equal stages on `hosts` equal hosts; sizes are per stage ("600MB").

    Raises HeadraceError for a malformed size and DoesNotFitError as make_plan does.
    """
    budget = Budget(parse_size(device_memory), parse_size(host_memory), process_bytes)
    share = profile.shared_by(-(-stages // hosts))
    workload = Workload(context, concurrent_sequences)
    return make_plan(shape, [share] * stages, [budget] * stages, workload, choices)


def render_plan(plan: Plan) -> RenderableType:
    """Tables and a summary for a rich console."""
    return Group(_stages(plan), _memory(plan), _summary(plan))


def _stages(plan: Plan) -> Table:
    table = Table(title="Stages", title_justify="left")
    for name in ("stage", "layers", "visits", "device", "host", "nvme", "streams a pass", "ring"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    placement = plan.placement
    for stage in range(placement.num_stages):
        layers = placement.layers_of(stage)
        tiers = [placement.tiers[layer] for layer in layers]
        slots = plan.ring_slots[stage]
        streamed = plan.nvme_bytes_a_pass[stage] + plan.host_bytes_a_pass[stage]
        table.add_row(
            str(stage),
            f"{len(layers)}: {layer_ranges(layers)}",
            str(len(placement.visits_of(stage))),
            *(str(tiers.count(tier)) for tier in Tier),
            format_size(streamed),
            f"{slots} x {format_size(plan.slot_bytes)}" if slots else "-",
        )
    return table


def layer_ranges(layers: Sequence[int]) -> str:
    """Consecutive layers as "0-19", others as "0, 4, ..., 76"."""
    if len(layers) <= 3:
        return ", ".join(map(str, layers))
    if layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    return f"{layers[0]}, {layers[1]}, ..., {layers[-1]}"


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory", title_justify="left")
    device = ("resident", "ring", "head", "kv", "scratch", "activations")
    host = ("host_layers", "embed", "process")
    for name in ("stage", *device, "device in all", *(name.replace("_", " ") for name in host)):
        table.add_column(name, justify="right")
    for stage, memory in enumerate(plan.memory):
        parts = asdict(memory)
        table.add_row(
            str(stage),
            *(format_size(parts[name]) for name in device),
            format_size(memory.device),
            *(format_size(parts[name]) for name in host),
        )
    return table


def _summary(plan: Plan) -> Table:
    prediction = plan.prediction
    table = Table.grid(padding=(0, 2))
    nvme, host = sum(plan.nvme_bytes_a_pass), sum(plan.host_bytes_a_pass)
    table.add_row("placement", describe(plan.placement))
    table.add_row(
        "a pass",
        f"up to {plan.max_sequences} sequences, {plan.token_budget} tokens in"
        f" {plan.micro_batches} micro-batches; {plan.passes_in_flight} in flight",
    )
    table.add_row("KV", f"{plan.num_pages} pages of 64 tokens; context up to {plan.max_context}")
    table.add_row("streams", f"{format_size(nvme)} from NVMe, {format_size(host)} from host memory")
    table.add_row("predicted", Text(f"{prediction.tokens_per_second:.1f} tokens/s", style="bold"))
    table.add_row("", f"{prediction.sequences} sequences every {_seconds(prediction.pass_seconds)}")
    table.add_row("bound by", TERMS[prediction.bound_by])
    for name, seconds in sorted(prediction.terms.items(), key=lambda item: -item[1]):
        if seconds:
            table.add_row("", f"{_seconds(seconds):>9}  {TERMS[name]}")
    return table


def describe(placement: Placement) -> str:
    """One line: how layers are shared and how many of them stay."""
    resident = placement.tiers.count(Tier.DEVICE)
    kept = "all" if resident == placement.num_layers else f"{resident} of {placement.num_layers}"
    stages = f"{placement.num_stages} stage{'s' if placement.num_stages > 1 else ''}"
    return f"{_kind(placement)}, {stages}, {kept} layers resident"


def _kind(placement: Placement) -> str:
    turns = sum(
        a.stage != b.stage for a, b in zip(placement.visits, placement.visits[1:], strict=False)
    )
    return "cyclic" if turns >= placement.num_stages > 1 else "contiguous"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON types: sizes in bytes, times in seconds."""
    return {
        **{name: value for name, value in asdict(plan).items() if name != "placement"},
        "memory": [asdict(memory) | {"device": memory.device} for memory in plan.memory],
        "placement": {
            "kind": _kind(plan.placement),
            "num_stages": plan.placement.num_stages,
            "visits": [
                {"stage": visit.stage, "layers": list(visit.layers)}
                for visit in plan.placement.visits
            ],
            "tiers": [tier.value for tier in plan.placement.tiers],
        },
    }
