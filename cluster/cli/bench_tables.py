"""Tables and JSON of `headrace bench`."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.cluster.bench.machine import Reading
from headrace.cluster.bench.phases import Phase
from headrace.cluster.bench.profile import Breakdown
from headrace.cluster.bench.run import Result, Work
from headrace.cluster.cli.kv_report import kv_json, kv_table
from headrace.cluster.cli.plan import describe, plan_json
from headrace.cluster.cli.terms import TERMS
from headrace.cluster.run_plan import resolve_device
from headrace.scheduler.sizes import format_size
from headrace.scheduler.speculation import DraftCounts

GIGA = 1e9


def device_name(device: str) -> str:
    if resolve_device(device) == "cuda":
        return torch.cuda.get_device_name(0)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def run_title(shape: str, config: Mapping[str, Any], fmt: str, device: str) -> str:
    return f"{shape}, {config['num_hidden_layers']} layers, {fmt}, on {device_name(device)}"


def run_view(title: str, work: Work, result: Result) -> RenderableType:
    """The table, and under it what was run."""
    table = Table(title=title, title_justify="left")
    table.add_column("seconds", no_wrap=True)
    for name in ("prefill", "decode pass"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("at", no_wrap=True)
    phases = (result.prefill, result.decode)
    for term, speed in _speeds(result).items():
        table.add_row(TERMS[term], *(_seconds(phase.bound.terms[term]) for phase in phases), speed)
    table.add_section()
    table.add_row("bound", *(f"{p.bound.bound_by} {_seconds(p.bound.seconds)}" for p in phases))
    table.add_row("reached", *(_seconds(phase.seconds) for phase in phases))
    table.add_row("share of the bound", *map(_share, phases), style="bold")
    table.add_row(
        "tokens/s", *(f"{phase.tokens_per_second:,.1f}" for phase in phases), style="bold"
    )
    kv = kv_table(result.kv, (), result.logs)
    return Group(table, *(() if kv is None else (kv,)), _setting(work, result))


def _speeds(result: Result) -> dict[str, str]:
    profile, plan = result.profile, result.plan
    hops = f"{profile.hop_seconds * 1e6:.0f} us, {profile.link_gbps:.1f} GB/s"
    return {
        "nvme": f"{profile.nvme_gbps:.2f} GB/s",
        "pcie": f"{profile.host_gbps:.1f} GB/s",
        # 80 columns have no room for more.
        "compute": f"{profile.tflops:.{2 if profile.tflops < 0.1 else 3}g} TFLOP/s",
        "hbm": f"{profile.hbm_gbps:.0f} GB/s",
        "hops": hops if plan.placement.num_stages > 1 else "",
    }


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds else "-"


def _share(phase: Phase) -> str:
    """A run that is faster than its bound shows that a speed was measured too low."""
    return "above 1" if phase.share is None else f"{phase.share:.2f}"


def _setting(work: Work, result: Result) -> Table:
    plan = result.plan
    grid = Table.grid(padding=(0, 2))
    what = f"{result.batch} sequences of {work.prompt} + {work.new} tokens"
    grid.add_row("work", f"{what}; medians of {result.rounds} {_rounds(result)}")
    grid.add_row("placement", describe(plan) + (", without Ray" if work.local else ""))
    nvme, host = sum(plan.nvme_bytes_a_pass), sum(plan.host_bytes_a_pass)
    grid.add_row("streams", f"{format_size(nvme)} from NVMe, {format_size(host)} from host memory")
    if any(plan.expert_slots):
        for i, line in enumerate(_experts(result)):
            grid.add_row("" if i else "experts", line)
    waits = "; ".join(
        f"stage {stage.stage}: weights {stage.weights_wait:.3f} s, links {stage.link_wait:.3f} s"
        for stage in result.stages
    )
    grid.add_row("waits", waits)
    if result.drafts.drafts:
        grid.add_row("drafts", _drafts(result.drafts))
    if result.peak_device_bytes:
        planned = max(memory.device for memory in plan.memory)
        grid.add_row(
            "device memory",
            f"{format_size(result.peak_device_bytes)} at most, {format_size(planned)} planned",
        )
    return grid


def _drafts(counts: DraftCounts) -> str:
    """Random weights say nothing that could be guessed: this is what guesses cost."""
    guesses = counts.drafts / counts.decodes
    return (
        f"{guesses:.1f} blind guesses a sequence and pass, {counts.acceptance:.0%} right: "
        f"{counts.tokens_a_pass:.2f} tokens"
    )


def _experts(result: Result) -> Iterator[str]:
    """Of split layers, whose experts are not in what a pass streams: reached, loaded, and bytes."""
    used = sum(stage.experts_used for stage in result.stages)
    loaded = sum(stage.experts_loaded for stage in result.stages)
    hits = f"{1 - loaded / used:.0%}" if used else "none"
    yield f"{used:,} reached by a decode pass's tokens, {hits} of them on the device"
    for name, phase in (("prefill", result.prefill), ("decode pass", result.decode)):
        needed, moved = format_size(phase.needed_bytes), format_size(phase.moved_bytes)
        yield f"{name}: {needed} needed with them, {moved} moved"
    yield "random weights send most tokens to the same few experts, real ones may not"


def _rounds(result: Result) -> str:
    """What a decode figure is of: a pass, or one of each group in flight."""
    groups = result.plan.passes_in_flight
    return "decode passes" if groups == 1 else f"rounds of {groups} decode passes"


def run_json(
    shape: str, config: Mapping[str, Any], fmt: str, work: Work, result: Result
) -> dict[str, Any]:
    """Seconds, bytes, GB/s and TFLOP/s as JSON types."""
    return {
        "shape": shape,
        "format": fmt,
        "config": dict(config),
        "work": asdict(work) | {"batch": result.batch},
        "speeds": asdict(result.profile),
        "prefill": _phase_json(result.prefill),
        "decode": _phase_json(result.decode) | {"rounds": result.rounds},
        "stages": [asdict(stage) for stage in result.stages],
        "drafts": asdict(result.drafts),
        "start_seconds": result.start_seconds,
        "peak_device_bytes": result.peak_device_bytes,
        "kv": kv_json(result.kv, result.logs),
        "plan": plan_json(result.plan),
    }


def _phase_json(phase: Phase) -> dict[str, Any]:
    return {
        "seconds": phase.seconds,
        "tokens": phase.tokens,
        "tokens_per_second": phase.tokens_per_second,
        "bound_seconds": phase.bound.seconds,
        "bound_by": phase.bound.bound_by,
        "terms": dict(phase.bound.terms),
        "share": phase.share,
        "needed_bytes": phase.needed_bytes,
        "moved_bytes": phase.moved_bytes,
    }


def profile_table(title: str, found: Breakdown) -> Table:
    passes = found.passes
    rows = Table(
        title=f"{title}\na pass: {found.wall / passes:.4f} s in all, "
        f"{found.kernels_busy / passes:.4f} s kernels, {found.copies_busy / passes:.4f} s copies in",
        title_justify="left",
    )
    for column in ("kernel", "calls a pass", "ms a pass", "share"):
        rows.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel in found.top:
        rows.add_row(
            kernel.name[:90],
            f"{kernel.calls / passes:.0f}",
            f"{kernel.seconds / passes * 1e3:.3f}",
            f"{kernel.seconds / found.wall:.1%}",
        )
    return rows


def machine_table(directory: Path, device: str, readings: Iterable[Reading]) -> Table:
    table = Table(title=f"{device_name(device)}; files in {directory}", title_justify="left")
    for name in ("what", "where", "measured", ""):
        table.add_column(name, justify="right" if name == "measured" else "left")
    for reading in readings:
        value = "-" if reading.value is None else f"{reading.value:,.4g} {reading.unit}"
        # Text: an error's brackets are no markup.
        table.add_row(reading.what, reading.where, value, Text(reading.note))
    return table


def machine_json(directory: Path, device: str, readings: Sequence[Reading]) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "directory": str(directory),
        "readings": [asdict(reading) for reading in readings],
    }
