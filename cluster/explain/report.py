"""`OUTPUT.report.json`: what a run was planned from, and what it measured; for `headrace explain`."""

import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.job_report import JobReport
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import ModelShape
from headrace.scheduler.plan import StageTimes
from headrace.scheduler.plan_inputs import PlanInputs

log = logging.getLogger(__name__)

VERSION = 1
SUFFIX = ".report.json"
WRITE_SECONDS = 30.0
MOST_PASSES = 4096
"""The newest passes that count, so that a long run says what it does now."""

FULL = 0.9
"""Passes with fewer sequences than this share of the most belong to the job's beginning or its end."""


@dataclass(frozen=True, slots=True)
class DecodePasses:
    """Passes of decodes only, the fullest of them: medians of seconds and sequences of one pass."""

    passes: int
    seconds: float
    sequences: int
    context: int


@dataclass(frozen=True, slots=True)
class RunReport:
    """`alternatives` are the model's sizes with other KV formats. Seconds are of this run, not of earlier
    runs of the same job, and with all counts but what is finished of the ring that ran last; `decode` is None while no pass had decodes only."""

    version: int
    model: str
    finished: bool
    inputs: PlanInputs
    alternatives: dict[str, ModelShape]
    seconds: float
    passes: int
    prompt_tokens: int
    output_tokens: int
    busy_seconds: float
    bound_seconds: float
    stages: tuple[StageTimes, ...]
    decode: DecodePasses | None


def read_report(path: Path) -> RunReport:
    """Of a run's output, or the report itself. HeadraceError when there is none or it is no such file."""
    file = path if path.name.endswith(SUFFIX) else path.with_name(path.name + SUFFIX)
    try:
        report = msgspec.json.decode(file.read_bytes(), type=RunReport)
    except FileNotFoundError:
        raise HeadraceError(
            f"there is no {file}: give the --output of a `headrace generate` that has computed a pass"
        ) from None
    except OSError as error:
        raise HeadraceError(f"cannot read {file}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise HeadraceError(f"{file} is no report of a run: {error}") from error
    if report.version != VERSION:
        raise HeadraceError(
            f"{file} is of version {report.version}, this release reads version {VERSION}:"
            " run the job again"
        )
    return report


@dataclass(slots=True)
class _Meter:
    """Passes of decodes only: a decode computes one token and draws one, a prompt computes more."""

    computed: int = 0
    drawn: int = 0
    busy: float = 0.0
    moves: int = 0
    found: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=MOST_PASSES))

    def note(self, stats: EngineStats) -> None:
        if stats.moves != self.moves:
            self.moves = stats.moves
            self.found.clear()  # of another plan
        computed, drawn = stats.tokens - self.computed, stats.output_tokens - self.drawn
        if computed == drawn > 0:
            self.found.append((stats.busy_seconds - self.busy, drawn))
        self.computed, self.drawn, self.busy = (
            stats.tokens,
            stats.output_tokens,
            stats.busy_seconds,
        )

    def passes(self, context: int) -> DecodePasses | None:
        if not self.found:
            return None
        most = max(drawn for _, drawn in self.found)
        full = [one for one in self.found if one[1] >= FULL * most]
        seconds = statistics.median(seconds for seconds, _ in full)
        return DecodePasses(
            len(full), seconds, round(statistics.median(drawn for _, drawn in full)), context
        )


class ReportedEngine(Protocol):
    """`inputs` are what the plan of the ring that runs now was made from."""

    @property
    def inputs(self) -> PlanInputs | None: ...

    @property
    def stats(self) -> EngineStats: ...


class ReportWriter:
    """Writes the report beside the output now and then and at the end, whole or not at all.

    A report that cannot be written is logged: the job goes on.
    """

    def __init__(
        self,
        output: Path,
        model: str,
        engine: ReportedEngine,
        alternatives: dict[str, ModelShape],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.file = output.with_name(output.name + SUFFIX)
        self._model, self._engine, self._alternatives = model, engine, alternatives
        self._clock, self._meter = clock, _Meter()
        self._due = clock() + WRITE_SECONDS

    def note(self, report: JobReport) -> None:
        """After each pass."""
        self._meter.note(self._engine.stats)
        if self._clock() >= self._due:
            self._write(report)
            self._due = self._clock() + WRITE_SECONDS

    def finish(self, report: JobReport) -> None:
        self._write(report)

    def _write(self, report: JobReport) -> None:
        inputs, rows = self._engine.inputs, max(1, report.answered - report.resumed)
        assert inputs is not None, "nothing was planned"
        context = round((report.work.prompt_tokens + report.work.output_tokens / 2) / rows)
        work = report.ring.work
        made = RunReport(
            VERSION,
            self._model,
            report.complete,
            inputs,
            self._alternatives,
            report.ring.seconds,
            work.passes,
            work.prompt_tokens,
            work.output_tokens,
            work.busy_seconds,
            work.bound_seconds,
            work.stages,
            self._meter.passes(max(1, context)),
        )
        temporary = self.file.with_name(self.file.name + ".tmp")
        try:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1))
            os.replace(temporary, self.file)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.file, error.strerror)
