"""Where the time of a run went, stage by stage."""

from collections.abc import Callable, Iterator, Sequence

from rich.console import Group
from rich.table import Table

from headrace.cluster.job_report import ComputeSplit, JobReport
from headrace.scheduler.plan import StageTimes
from headrace.scheduler.sizes import format_size

GB = 1e9
STAGES_ABREAST = 4
"""As many as fit 80 columns."""


def stage_table(
    report: JobReport, splits: Sequence[ComputeSplit | None] = (), *, expert_bytes: int = 0
) -> Group:
    """Seconds and shares of the time of the ring that ran last, and bytes moved; `splits` are those of all stages, or none.

    `expert_bytes` are those of one expert, where layers are split.
    """
    stages = range(len(report.work.stages))
    starts = stages[::STAGES_ABREAST]
    return Group(
        *(
            _table(report, splits, stages[start : start + STAGES_ABREAST], expert_bytes)
            for start in starts
        )
    )


def _table(
    report: JobReport,
    splits: Sequence[ComputeSplit | None],
    stages: Sequence[int],
    expert_bytes: int,
) -> Table:
    table = Table(title="Where the time went", title_justify="left")
    table.add_column("stage")
    for stage in stages:
        table.add_column(str(stage), justify="right")
    times = [report.work.stages[stage] for stage in stages]
    for name, seconds in _times(report):
        table.add_row(name, *(_time(seconds(one), report.ring.seconds) for one in times))
        if name == "computing" and any(splits):
            _add_split(table, report, [splits[stage] for stage in stages], times)
    _add_experts(table, report, times, expert_bytes)
    _add_bytes(table, report, "from NVMe", lambda one: one.nvme_bytes, times)
    _add_bytes(table, report, "from host RAM", lambda one: one.host_bytes, times)
    _add_bytes(table, report, "KV from NVMe", lambda one: one.kv_sunk_bytes, times)
    _add_bytes(table, report, "KV to host RAM", lambda one: one.kv_out_bytes, times)
    _add_bytes(table, report, "KV from host RAM", lambda one: one.kv_in_bytes, times)
    return table


def _times(report: JobReport) -> Iterator[tuple[str, Callable[[StageTimes], float]]]:
    """Parts that add up to that time; between passes the stage is idle."""
    yield "computing", computing
    yield "wait for weights", lambda one: one.weights_wait
    yield "wait for link", lambda one: one.link_wait
    if any(one.kv_wait for one in report.work.stages):
        yield "wait for KV", lambda one: one.kv_wait
    yield "between passes", lambda one: max(report.ring.seconds - one.total, 0.0)


def computing(times: StageTimes) -> float:
    """Seconds of passes in which the stage did not wait."""
    return max(times.total - times.weights_wait - times.link_wait - times.kv_wait, 0.0)


def _add_split(
    table: Table,
    report: JobReport,
    splits: Sequence[ComputeSplit | None],
    times: Sequence[StageTimes],
) -> None:
    parts: dict[str, Callable[[ComputeSplit, StageTimes], float]] = {
        "dequant": lambda split, _: split.dequant,
        "matmul": lambda split, _: split.matmul,
        "attention": lambda split, _: split.attention,
        "CUDA graphs": lambda split, _: split.graphs,
        "other": lambda split, one: max(computing(one) - split.known, 0.0),
    }
    if not any(split.graphs for split in splits if split is not None):
        del parts["CUDA graphs"]
    for name, part in parts.items():
        cells = (
            "-" if split is None else _time(part(split, one), report.ring.seconds)
            for split, one in zip(splits, times, strict=True)
        )
        table.add_row(f"  {name}", *cells)


def _add_experts(
    table: Table, report: JobReport, times: Sequence[StageTimes], expert_bytes: int
) -> None:
    """Experts of split layers that tokens reached, the share of them that was on the device, and
    what the others take; three rows if any stage of the run has them."""
    if not any(one.experts_used for one in report.work.stages):
        return
    table.add_row("experts reached", *(f"{one.experts_used:,}" for one in times))
    table.add_row("  on the device", *map(_hits, times))
    table.add_row("  loaded", *(format_size(one.experts_loaded * expert_bytes) for one in times))


def _hits(times: StageTimes) -> str:
    if not times.experts_used:
        return "-"
    return f"{1 - times.experts_loaded / times.experts_used:.0%}"


def _add_bytes(
    table: Table,
    report: JobReport,
    name: str,
    moved: Callable[[StageTimes], int],
    times: Sequence[StageTimes],
) -> None:
    """Two rows if any stage of the run has them, so that all tables are alike."""
    if not any(moved(one) for one in report.work.stages):
        return
    table.add_row(name, *(format_size(moved(one)) for one in times))
    rates = (
        moved(one) / GB / report.ring.seconds if report.ring.seconds > 0 else 0.0 for one in times
    )
    table.add_row("  GB/s", *(f"{rate:.2f}" for rate in rates))


def _time(seconds: float, run: float) -> str:
    share = f"{seconds / run:4.0%}" if run > 0 else "   -"
    return f"{seconds:.{1 if seconds < 1000 else 0}f}s {share}"
