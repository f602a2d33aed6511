"""What `headrace generate` shows: progress while it runs, how to resume it, and what bound it."""

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace.cluster.cli.stage_table import GB, stage_table
from headrace.cluster.cli.terms import TERMS
from headrace.cluster.explain.report import ReportWriter
from headrace.cluster.job_report import ComputeSplit, JobReport, JobTrace, RingWork, Work
from headrace.cluster.jobs import Job
from headrace.scheduler.errors import HeadraceError, JobError
from headrace.scheduler.placement import Plan
from headrace.scheduler.sizes import format_size
from headrace.scheduler.speculation import DraftCounts

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 60.0
LINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What the run had: the plan, the store's bytes, and device memory for each stage as it was
    asked for (None: what was free)."""

    plan: Plan
    model_bytes: int
    device_memory: int | None

    @property
    def streams(self) -> bool:
        plan = self.plan
        layers = any(plan.nvme_bytes_a_pass) or any(plan.host_bytes_a_pass)
        return layers or any(plan.expert_slots)


@dataclass(frozen=True, slots=True)
class Rates:
    """Speeds over the last minute; `share_of_bound` and `eta` (seconds) are None until known."""

    tokens_per_second: float
    nvme_gb_per_second: float
    pcie_gb_per_second: float
    share_of_bound: float | None
    eta: float | None


class Meter:
    """Turns a stream of reports into speeds over a sliding window."""

    def __init__(self) -> None:
        self._reports: deque[JobReport] = deque()

    def update(self, report: JobReport) -> Rates:
        reports = self._reports
        reports.append(report)
        while len(reports) > 2 and report.seconds - reports[1].seconds >= WINDOW_SECONDS:
            reports.popleft()
        first = reports[0] if len(reports) > 1 else None
        work = report.work.since(first.work) if first else report.work
        seconds = report.seconds - (first.seconds if first else 0.0)
        return _rates(work, seconds, _eta(report))


def run_job(
    job: Job,
    setting: Callable[[], Setting],
    console: Console,
    *,
    resume_command: str,
    trace: JobTrace | None = None,
    kv: Callable[[], RenderableType | None] = lambda: None,
    notes: ReportWriter | None = None,
) -> int:
    """Run a job with a progress display and signal handling; returns the exit code.

    The trace is closed when the job ends, the `setting` asked for that the last ring had, and `kv` asked what became of KV pages; `notes` is what is kept
    for `headrace explain`. 0 every row is answered, 3 some are quarantined, 130 the job was stopped before its end.
    HeadraceErrors pass through; a stage's one says how to go on, too.
    """
    hint = f"Finished rows are safe; to go on: {resume_command}"
    try:
        with _stopping(job, hint), _display(console) as show:
            report = job.run(_both(show, notes))
    except HeadraceError as error:
        if isinstance(error, JobError):  # which says itself what to do
            raise
        raise type(error)(f"{error}\n{hint}") from error
    if notes is not None:
        notes.finish(report)
    console.print(final_table(report, setting(), _close(trace) if trace else (), kv()))
    if trace and trace.written:
        told = f"The trace is in {trace.file}: open it at ui.perfetto.dev"
        console.print(Text(told), soft_wrap=True)
    if not report.complete:
        left = f"{report.total - report.finished} rows are left. {hint}"
        console.print(Text(left), soft_wrap=True)
        return 130
    if report.quarantined:
        told = f"{report.quarantined} rows could not run: see {report.quarantine}"
        console.print(Text(told), soft_wrap=True)
        return 3
    return 0


def _both(
    show: Callable[[JobReport], None], notes: ReportWriter | None
) -> Callable[[JobReport], None]:
    if notes is None:
        return show

    def both(report: JobReport) -> None:
        notes.note(report)
        show(report)

    return both


def status_line(report: JobReport, rates: Rates) -> str:
    """One line: rows, speed, share of the bound, bytes and what is left."""
    parts = [
        f"{report.finished}/{report.total} rows",
        f"{report.running} running",
        f"{rates.tokens_per_second:.1f} tokens/s",
    ]
    if report.quarantined:
        parts.insert(1, f"{report.quarantined} quarantined")
    if rates.share_of_bound is not None:
        parts.append(f"{rates.share_of_bound:.0%} of the bound")
    if rates.nvme_gb_per_second:
        parts.append(f"NVMe {rates.nvme_gb_per_second:.2f} GB/s")
    if rates.pcie_gb_per_second > rates.nvme_gb_per_second:  # else the same bytes, or no link
        parts.append(f"PCIe {rates.pcie_gb_per_second:.2f} GB/s")
    if report.stopping:
        parts.append("stopping: finishing the rows that run")
    elif rates.eta is not None:
        parts.append(f"{duration(rates.eta)} left")
    return ", ".join(parts)


def _close(trace: JobTrace) -> list[ComputeSplit | None]:
    trace.close()
    return trace.splits()


def final_table(
    report: JobReport,
    setting: Setting,
    splits: Sequence[ComputeSplit | None] = (),
    kv: RenderableType | None = None,
) -> Group:
    """What the run achieved, what bound it, where its time went, and the same in two sentences."""
    work = report.work
    rates = _rates(work, report.seconds, None)
    summary = Table(title=Text(str(report.output)), title_justify="left", show_header=False)
    summary.add_row("rows", _rows(report))
    summary.add_row("tokens", f"{work.output_tokens} generated, {work.prompt_tokens} prompt")
    summary.add_row("time", f"{duration(report.seconds)}, {work.passes} passes")
    summary.add_row("speed", f"{rates.tokens_per_second:.1f} tokens/s")
    if work.drafts.drafts:
        summary.add_row("drafts", drafted(work.drafts))
    if setting.streams:
        summary.add_row("streamed", _streamed(report.ring))
    if not work.passes:
        return Group(summary)
    told = Text(f"{_moved(report)}{_fitted(setting)} {_bound(report, setting)}")
    stages = stage_table(report, splits, expert_bytes=setting.plan.expert_slot_bytes)
    return Group(summary, stages, *(() if kv is None else (kv,)), told)


def drafted(counts: DraftCounts) -> str:
    """What guessed tokens brought."""
    return (
        f"{counts.tokens_a_pass:.2f} tokens a sequence and pass; {counts.acceptance:.0%} of"
        f" {counts.drafts:,} guesses were right"
    )


def _moved(report: JobReport) -> str:
    """Which part of the run the stages' figures are of, where it is not all of it."""
    if report.last_ring is None:
        return ""
    return (
        f"Stages were lost, and the model was planned anew for {len(report.work.stages)}: what stages did and"
        f" streamed is of the last {duration(report.last_ring.seconds)}, and the plan is theirs. "
    )


def _streamed(ring: RingWork) -> str:
    work, rates = ring.work, _rates(ring.work, ring.seconds, None)
    text = f"{format_size(work.nvme_bytes)} from NVMe, {rates.nvme_gb_per_second:.2f} GB/s"
    if rates.pcie_gb_per_second > rates.nvme_gb_per_second:
        text += f"; {format_size(work.pcie_bytes)} over PCIe, {rates.pcie_gb_per_second:.2f} GB/s"
    return text


def _fitted(setting: Setting) -> str:
    """How large the model is, what memory it had and what every pass streamed."""
    plan, stages = setting.plan, setting.plan.placement.num_stages
    who = "1 stage" if stages == 1 else f"{stages} stages"
    given = sum(memory.device for memory in plan.memory)
    had = f"planned {format_size(given)}"
    if setting.device_memory is not None:
        had = f"had {format_size(setting.device_memory)}" + (" each" if stages > 1 else "")
    text = (
        f"The model takes {format_size(setting.model_bytes)}; {who} {had} for weights, KV and work"
    )
    if not setting.streams:
        return f"{text}, and all of it stayed there."
    sources = ((sum(plan.nvme_bytes_a_pass), "NVMe"), (sum(plan.host_bytes_a_pass), "host memory"))
    parts = " and ".join(f"{format_size(size)} from {name}" for size, name in sources if size)
    if plan.expert_slots:
        rest = "experts as tokens reached them"
        parts = f"{parts}, and {rest}" if parts else rest
    return f"{text}, and every pass streamed {parts}."


def _bound(report: JobReport, setting: Setting) -> str:
    """What was done in what time, and which resource set the pace."""
    work, prediction = report.work, setting.plan.prediction
    rows = report.finished - report.resumed
    text = (
        f"{rows} row{'s' * (rows != 1)} and {work.output_tokens} tokens took "
        f"{duration(report.seconds)}. By the plan {TERMS[prediction.bound_by]} sets the pace, "
        f"at most {prediction.tokens_per_second:.1f} tokens/s with {prediction.sequences} "
        f"sequence{'s' * (prediction.sequences != 1)} at a time"
    )
    share = work.share_of_bound
    return f"{text}; passes reached {share:.0%} of that bound." if share else f"{text}."


def duration(seconds: float) -> str:
    """As "42s", "3m 05s" or "2h 07m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02}m"


def _rates(work: Work, seconds: float, eta: float | None) -> Rates:
    per_second = 1 / seconds if seconds > 0 else 0.0
    return Rates(
        work.output_tokens * per_second,
        work.nvme_bytes / GB * per_second,
        work.pcie_bytes / GB * per_second,
        work.share_of_bound,
        eta,
    )


def _eta(report: JobReport) -> float | None:
    """At this run's pace. None until a row has finished."""
    done = report.finished - report.resumed
    return report.seconds * (report.total - report.finished) / done if done else None


def _rows(report: JobReport) -> str:
    text = f"{report.answered} of {report.total} answered"
    if report.quarantined:
        text += f", {report.quarantined} quarantined"
    if report.resumed:
        text += f", {report.resumed} of them by earlier runs"
    return text


@contextmanager
def _display(console: Console) -> Iterator[Callable[[JobReport], None]]:
    """A bar that is redrawn on a terminal; elsewhere a log line every ten seconds."""
    meter = Meter()
    if not console.is_terminal:
        yield _line_logger(meter)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def redraw(report: JobReport) -> None:
            line = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=max(report.total, 1), completed=report.finished, width=20)
            line.add_row(bar, Text(status_line(report, meter.update(report))))
            live.update(line)

        yield redraw


def _line_logger(meter: Meter) -> Callable[[JobReport], None]:
    next_line = 0.0

    def log(report: JobReport) -> None:
        nonlocal next_line
        rates = meter.update(report)
        if report.seconds >= next_line:
            next_line = report.seconds + LINE_SECONDS
            logger.info("%s", status_line(report, rates))

    return log


@contextmanager
def _stopping(job: Job, hint: str) -> Iterator[None]:
    """First signal: start no further rows. Second: give up those that run. Third: the default."""
    told = [
        f"Stopping: the rows that run will be finished. Again to give them up. {hint}",
        f"Stopping now. {hint}",
    ]

    def stop(number: int, _: FrameType | None) -> None:
        job.request_stop()
        # Not a logger or a console: the signal may have come while either was writing.
        os.write(2, f"\n{told.pop(0)}\n".encode())
        if not told:
            restore()

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    try:
        yield
    finally:
        restore()
