"""Where the time of a few passes goes, by PyTorch's profiler."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TOP = 25


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where `passes` passes went. Busy seconds are of the union of all kernels, or copies in.

    On a CPU the kernels are PyTorch's operators, each without those that it calls.
    """

    passes: int
    wall: float
    kernels_busy: float
    copies_busy: float
    top: tuple[Kernel, ...]


def profile_passes(work: Callable[[], object], passes: int, trace: Path) -> Breakdown:
    """Calls `work` `passes` times under the profiler; the Chrome trace goes to `trace`."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        for _ in range(passes):
            work()
        if on_gpu:
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    wanted = "CUDA" if on_gpu else "CPU"
    spans: dict[str, list[tuple[float, float]]] = {}
    everything: list[tuple[float, float]] = []
    for event in profiler.events() or ():
        span = event.time_range.start / 1e6, event.time_range.end / 1e6
        everything.append(span)
        if event.device_type.name == wanted and not getattr(event, "is_user_annotation", False):
            spans.setdefault(event.name, []).append(span)
    copies = [span for name, found in spans.items() if "HtoD" in name for span in found]
    kernels = [span for name, found in spans.items() if "Memcpy" not in name for span in found]
    return Breakdown(
        passes,
        max(end for _, end in everything) - min(start for start, _ in everything),
        _union(kernels),
        _union(copies),
        _top(spans) if on_gpu else _operators(profiler),
    )


def _top(spans: dict[str, list[tuple[float, float]]]) -> tuple[Kernel, ...]:
    kernels = [
        Kernel(name, len(found), sum(end - start for start, end in found))
        for name, found in spans.items()
    ]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)[:TOP])


def _operators(profiler: profile) -> tuple[Kernel, ...]:
    rows = [Kernel(r.key, r.count, r.self_cpu_time_total / 1e6) for r in profiler.key_averages()]
    return tuple(sorted(rows, key=lambda row: -row.seconds)[:TOP])


def _union(spans: list[tuple[float, float]]) -> float:
    """Seconds that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
