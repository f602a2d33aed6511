"""What `headrace generate` shows: progress while it runs, how to resume it, and what bound it."""

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace.cluster.job_report import JobReport, Work
from headrace.cluster.jobs import Job
from headrace.scheduler.errors import HeadraceError, JobError
from headrace.scheduler.placement import Prediction

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 60.0
LINE_SECONDS = 10.0
GB = 1e9


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


def run_job(job: Job, prediction: Prediction, console: Console, *, resume_command: str) -> int:
    """Run a job with a progress display and signal handling; returns the exit code.

    0 every row is answered, 3 some are quarantined, 130 the job was stopped before its end.
    HeadraceErrors pass through; after a stage's one, a line says how to go on.
    """
    hint = f"Finished rows are safe; to go on: {resume_command}"
    try:
        with _stopping(job, hint), _display(console) as show:
            report = job.run(show)
    except HeadraceError as error:
        if not isinstance(error, JobError):  # which says itself what to do
            logger.error("%s", hint)
        raise
    console.print(final_table(report, prediction))
    if not report.complete:
        console.print(Text(f"{report.total - report.finished} rows are left. {hint}"))
        return 130
    if report.quarantined:
        console.print(Text(f"{report.quarantined} rows could not run: see {report.quarantine}"))
        return 3
    return 0


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
    parts.append(f"NVMe {rates.nvme_gb_per_second:.2f} GB/s")
    parts.append(f"PCIe {rates.pcie_gb_per_second:.2f} GB/s")
    if report.stopping:
        parts.append("stopping: finishing the rows that run")
    elif rates.eta is not None:
        parts.append(f"{duration(rates.eta)} left")
    return ", ".join(parts)


def final_table(report: JobReport, prediction: Prediction) -> Group:
    """What the run achieved, what bound it, and where each stage waited."""
    work = report.work
    rates = _rates(work, report.seconds, None)
    summary = Table(title=Text(str(report.output)), show_header=False)
    summary.add_row("rows", _rows(report))
    summary.add_row("tokens", f"{work.output_tokens} generated, {work.prompt_tokens} prompt")
    summary.add_row("time", f"{duration(report.seconds)}, {work.passes} passes")
    summary.add_row("speed", f"{rates.tokens_per_second:.1f} tokens/s")
    summary.add_row("bound by", _bound(prediction))
    if rates.share_of_bound is not None:
        summary.add_row("share of the bound", f"{rates.share_of_bound:.0%}")
    summary.add_row("NVMe", f"{rates.nvme_gb_per_second:.2f} GB/s")
    summary.add_row("PCIe", f"{rates.pcie_gb_per_second:.2f} GB/s")
    return Group(summary, _stage_table(work))


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


def _bound(prediction: Prediction) -> str:
    terms = sorted(prediction.terms.items(), key=lambda term: -term[1])
    parts = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in terms)
    return (
        f"{prediction.bound_by} ({parts} a pass; at most {prediction.tokens_per_second:.1f} "
        f"tokens/s with {prediction.sequences} sequences)"
    )


def _stage_table(work: Work) -> Table:
    table = Table("stage", "busy", "computing", "waited for weights", "waited for hops")
    table.add_column("NVMe GB/s")
    table.add_column("PCIe GB/s")
    for times in work.stages:
        total = times.total or 1.0
        waits = times.weights_wait + times.link_wait
        table.add_row(
            str(times.stage),
            duration(times.total),
            f"{max(total - waits, 0.0) / total:.0%}" if times.total else "-",
            f"{times.weights_wait / total:.0%}",
            f"{times.link_wait / total:.0%}",
            f"{times.nvme_bytes / GB / total:.2f}",
            f"{(times.nvme_bytes + times.host_bytes) / GB / total:.2f}",
        )
    return table


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
