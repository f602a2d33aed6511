"""An engine inside this process: one stage, no Ray. For profiles and for what Ray adds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from headrace.cluster.engine import Engine
from headrace.cluster.launch import (
    EngineOptions,
    plan_run,
    resolve_device,
    resolve_dtype,
    stage_device,
)
from headrace.cluster.pipeline import LocalPipeline, Pending, Pipeline
from headrace.cluster.stage_actor import discover
from headrace.cluster.tokenizer import load_tokenizer, stop_ids
from headrace.runtime.stage import Stage, StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.plan import Pass, PassResult

TOP = 25


class _Done:
    def __init__(self, results: list[PassResult]) -> None:
        self._results = results

    def result(self) -> list[PassResult]:
        return self._results


class InlinePipeline:
    """One stage in the caller's thread, where a profiler sees its operators."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def submit(self, a_pass: Pass) -> Pending:
        return _Done([self._stage.run(a_pass)])

    def close(self) -> None:
        self._stage.close()


def threaded(stage: Stage) -> Pipeline:
    return LocalPipeline([stage])


@contextmanager
def local_engine(
    options: EngineOptions, make_pipeline: Callable[[Stage], Pipeline] = threaded
) -> Iterator[Engine]:
    """What running_engine gives, with its one stage in this process."""
    assert options.stages == 1, "several stages need processes of their own"
    store = Store.open(options.store)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device, store)
    found = discover(stage_device(device), str(store.path.resolve()))
    plan = plan_run(options, store, device, dtype, [found])
    config = StageConfig(
        store=str(store.path),
        stage=0,
        plan=plan,
        device=stage_device(device),
        device_memory=options.device_memory or found.device_free,
        dtype=dtype,
        storage=options.storage,
        deadline=options.deadline,
        threads=torch.get_num_threads(),
    )
    tokenizer = load_tokenizer(store.path)
    pipeline = make_pipeline(Stage(config))
    with Engine(
        plan,
        pipeline,
        tokenizer,
        stop_ids=stop_ids(store, tokenizer),
        digest=store.digest,
    ) as engine:
        yield engine


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


def breakdown_table(name: str, found: Breakdown) -> Table:
    passes = found.passes
    rows = Table(
        title=f"{name}, a pass: {found.wall / passes:.4f} s in all, {found.kernels_busy / passes:.4f}"
        f" s kernels, {found.copies_busy / passes:.4f} s copies in",
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
