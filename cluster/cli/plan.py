"""`headrace plan`: what a run would keep where, what a pass streams and how fast that is."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.cluster.cli.terms import TERMS
from headrace.cluster.kv_options import describe_costs
from headrace.scheduler.placement import Placement, Plan, Tier
from headrace.scheduler.sizes import format_size

FEW_STAGES = 6
"""More columns than these do not fit a terminal; then the least and the most are shown."""


def render_plan(plan: Plan) -> RenderableType:
    """Tables and a summary for a rich console."""
    return Group(_stages(plan), _memory(plan), _summary(plan))


def _stages(plan: Plan) -> Table:
    table = Table(title="Stages", title_justify="left")
    for name in ("stage", "layers", "visits", "device", "host", "nvme", "streams a pass"):
        table.add_column(name, justify="left" if name == "layers" else "right", no_wrap=True)
    placement = plan.placement
    for stage in range(placement.num_stages):
        layers = placement.layers_of(stage)
        tiers = [placement.tiers[layer] for layer in layers]
        streamed = plan.nvme_bytes_a_pass[stage] + plan.host_bytes_a_pass[stage]
        table.add_row(
            str(stage),
            f"{len(layers)}: {layer_ranges(layers)}",
            str(len(placement.visits_of(stage))),
            *(str(tiers.count(tier)) for tier in Tier),
            format_size(streamed) if streamed else "-",
        )
    return table


def layer_ranges(layers: Sequence[int]) -> str:
    """Consecutive layers as "0-19", others as "0, 4, ..., 76"."""
    if len(layers) <= 3:
        return ", ".join(map(str, layers))
    if layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    return f"{layers[0]}, {layers[1]}, ..., {layers[-1]}"


PARTS = (
    ("resident", "layers that stay"),
    ("ring", "ring for streamed layers"),
    ("experts", "slots for experts"),
    ("head", "final norm and LM head"),
    ("kv", "KV pages"),
    ("kv_ring", "ring for KV pages in host memory"),
    ("tails", "newest KV pages, as computed"),
    ("scratch", "one dequantized matrix"),
    ("activations", "activations"),
    ("graphs", "CUDA graphs of decodes"),
    ("adapters", "slots for adapters"),
    ("device", "device memory in all"),
    ("host_layers", "layers in host memory"),
    ("host_experts", "experts in host memory"),
    ("host_kv", "KV pages in host memory"),
    ("host_window", "KV pages on their way from NVMe"),
    ("host_log", "KV pages on their way to NVMe"),
    ("host_adapters", "adapters in host memory"),
    ("embed", "embedding in host memory"),
    ("process", "the process itself"),
)


def _memory(plan: Plan) -> Table:
    """A row for each part that takes memory, a column a stage (or the least and the most)."""
    few = len(plan.memory) <= FEW_STAGES
    table = Table(title="Memory", title_justify="left")
    table.add_column("part", no_wrap=True)
    names = [f"stage {i}" for i in range(len(plan.memory))] if few else ["least", "most"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for part, what in PARTS:
        sizes = [getattr(memory, part) for memory in plan.memory]
        if any(sizes):
            cells = sizes if few else [min(sizes), max(sizes)]
            style = "bold" if part == "device" else None
            table.add_row(what, *(format_size(n) if n else "-" for n in cells), style=style)
    return table


def _summary(plan: Plan) -> Table:
    prediction = plan.prediction
    table = Table.grid(padding=(0, 2))
    nvme, host = sum(plan.nvme_bytes_a_pass), sum(plan.host_bytes_a_pass)
    table.add_row("placement", describe(plan))
    table.add_row(
        "a pass",
        f"up to {plan.max_sequences} sequences, {plan.token_budget} tokens in"
        f" {plan.micro_batches} micro-batches; {plan.passes_in_flight} in flight"
        + (f", {plan.ahead} more ahead" if plan.ahead else ""),
    )
    table.add_row(
        "KV",
        f"{plan.num_pages} pages of 64 tokens in {plan.kv_format}; context up to {plan.max_context}",
    )
    if plan.num_tails:
        table.add_row("", f"{plan.num_tails} sequences at once have room for their newest page")
    if plan.host_pages:
        table.add_row("", f"{plan.host_pages} more pages have room in host memory")
        if plan.nvme_pages:
            table.add_row("", f"{plan.nvme_pages} more pages have room on NVMe")
        table.add_row("", f"a page takes {describe_costs(plan)}")
    if prediction.guests:
        on_device = prediction.sequences - prediction.guests
        table.add_row(
            "", f"{on_device} sequences on the device, {prediction.guests} more in host memory"
        )
    if plan.window_pages:
        table.add_row(
            "",
            f"{plan.window_pages} of their pages older than {plan.hot_window} tokens have room on NVMe",
        )
    table.add_row("streams", f"{format_size(nvme)} from NVMe, {format_size(host)} from host memory")
    if prediction.guests:
        table.add_row("", _cold(plan))
    if nvme + host:
        slots = f"{max(plan.ring_slots)} slots of {format_size(plan.slot_bytes)}"
        table.add_row("ring", f"{slots} on each stage that streams")
    for i, line in enumerate(_experts(plan)):
        table.add_row("" if i else "experts", line)
    if plan.drafts.most:
        table.add_row("drafts", _drafts(plan))
    table.add_row("predicted", Text(f"{prediction.expected_rate:.1f} tokens/s", style="bold"))
    expected = prediction.expected_seconds or prediction.pass_seconds
    table.add_row(
        "",
        f"{prediction.sequences} sequences every {_seconds(expected)}, {prediction.share:.0%} of the bound",
    )
    if prediction.prompt_seconds:
        rate = prediction.prompt_tokens / prediction.prompt_seconds
        passes = _seconds(prediction.prompt_seconds)
        table.add_row(
            "",
            f"prompts {rate:.0f} tokens/s: {prediction.prompt_tokens} beside them every {passes}",
        )
    table.add_row("bound by", TERMS[prediction.bound_by])
    for name, seconds in sorted(prediction.terms.items(), key=lambda item: -item[1]):
        if seconds:
            table.add_row("", f"{_seconds(seconds):>9}  {TERMS[name]}")
    return table


def _drafts(plan: Plan) -> str:
    drafts = plan.drafts
    least = f" and at least {drafts.least_tokens} without" if drafts.least_tokens else ""
    return (
        f"up to {drafts.most} guessed tokens a sequence, in passes of at most {drafts.most_tokens} tokens"
        f" with them{least}"
    )


def _cold(plan: Plan) -> str:
    """What a pass brings of sequences whose pages are not on the device, over all stages."""
    page = sum(memory.kv for memory in plan.memory) // plan.num_pages
    prediction = plan.prediction
    pages = (prediction.cold_pages - prediction.sunk_pages) // plan.passes_in_flight
    sunk = round(prediction.sunk_bytes / plan.passes_in_flight)
    from_nvme = f" and {format_size(sunk)} from NVMe" if sunk else ""
    return (
        f"and {format_size(page * pages)} of KV pages from host memory{from_nvme}, in up to"
        f" {plan.cold_micro_batches} more micro-batches"
    )


def _experts(plan: Plan) -> Iterator[str]:
    """Where experts of split layers have room, and what a pass is expected to load of them."""
    traffic = plan.prediction.experts
    if traffic is None:
        return
    slots, host = _span(plan.expert_slots), _span(plan.host_experts)
    yield f"{slots} slots of {format_size(plan.expert_slot_bytes)} on a device, {host} in host memory"
    nvme, pinned = format_size(round(traffic.nvme_bytes)), format_size(round(traffic.host_bytes))
    yield f"a pass reaches {traffic.reached:,.0f} and loads {traffic.loaded:,.0f} of them:"
    yield f"{nvme} from NVMe, {pinned} from host memory"


def _span(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{most}" if least == most else f"{least} to {most}"


def describe(plan: Plan) -> str:
    """One line: how layers are shared and how many of them stay."""
    placement = plan.placement
    resident = placement.tiers.count(Tier.DEVICE)
    kept = "all" if resident == placement.num_layers else f"{resident} of {placement.num_layers}"
    stages = f"{placement.num_stages} stage{'s' if placement.num_stages > 1 else ''}"
    without = " without their experts" if plan.expert_slots else ""
    return f"{_kind(placement)}, {stages}, {kept} layers resident{without}"


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
