"""`OUTPUT.report.json`: what a run was planned from, and what it measured; for `headrace explain`."""

import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.job_report import JobReport
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import ModelShape
from headrace.scheduler.plan import StageTimes
from headrace.scheduler.plan_inputs import PlanInputs

log = logging.getLogger(__name__)

VERSION = 2
SUFFIX = ".report.json"
WRITE_SECONDS = 30.0
MOST_PASSES = 4096
"""The newest passes that count, so that a long run says what it does now."""

FULL = 0.9
"""Passes with fewer sequences than this share of the most belong to the job's beginning or its end."""

EMPTIER = 0.5
ENOUGH = 8
"""So many passes with at most that share of the most sequences tell what a pass takes with fewer of them."""


@dataclass(frozen=True, slots=True)
class EmptierPasses:
    """Medians of passes that had much fewer sequences than the fullest, as at the end of a job."""

    seconds: float
    sequences: int


@dataclass(frozen=True, slots=True)
class DecodePasses:
    """Passes of decodes only, the fullest of them: medians of seconds and sequences of one pass.

    `context` is how many tokens a sequence had on average, in `pages` KV pages. In a share `waiting` of
    the passes other requests waited for room. `emptier` is None where there were too few such passes.
    """

    passes: int
    seconds: float
    sequences: int
    context: int
    pages: float
    waiting: float
    emptier: EmptierPasses | None = None


@dataclass(frozen=True, slots=True)
class RunReport:
    """`alternatives` are the model's sizes with other KV formats. Seconds are of this run, not of earlier
    runs of the same job, and with all counts but what is finished of the ring that ran last; `decode` is None while no pass had decodes only.
    That ring had `requests` to serve (for some rows more than one; those count once they are known), the
    longest of which came to `longest` tokens."""

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
    requests: int
    longest: int
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


class ReportedEngine(Protocol):
    """`inputs` are what the plan of the ring that runs now was made from."""

    @property
    def inputs(self) -> PlanInputs | None: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...


class _Pass(NamedTuple):
    """What one pass of decodes took and had, summed up over its sequences; whether requests waited."""

    seconds: float
    sequences: int
    contexts: int
    pages: int
    waiting: bool


class _Totals(NamedTuple):
    """Since the engine started."""

    computed: int = 0
    drawn: int = 0
    contexts: int = 0
    pages: int = 0
    busy: float = 0.0

    @classmethod
    def of(cls, stats: EngineStats) -> "_Totals":
        contexts, pages = stats.contexts, stats.slice_pages
        return cls(stats.tokens, stats.output_tokens, contexts, pages, stats.busy_seconds)


@dataclass(slots=True)
class _Meter:
    """Passes of decodes only: a decode computes one token and draws one, a prompt computes more."""

    before: _Totals = field(default_factory=_Totals)
    moves: int = 0
    requests: int = 0
    found: deque[_Pass] = field(default_factory=lambda: deque(maxlen=MOST_PASSES))

    def note(self, engine: ReportedEngine, unfinished: int) -> None:
        """`unfinished` rows are left, each of at least one request."""
        stats, waiting = engine.stats, engine.num_waiting
        if stats.moves != self.moves:
            self.moves, self.requests = stats.moves, 0
            self.found.clear()  # of another plan
        self.requests = max(self.requests, unfinished, waiting + engine.num_running)
        before, now = self.before, _Totals.of(stats)
        computed, drawn = now.computed - before.computed, now.drawn - before.drawn
        if computed == drawn > 0:
            contexts, pages = now.contexts - before.contexts, now.pages - before.pages
            self.found.append(_Pass(now.busy - before.busy, drawn, contexts, pages, waiting > 0))
        self.before = now

    def passes(self) -> DecodePasses | None:
        if not self.found:
            return None
        most = max(one.sequences for one in self.found)
        full = [one for one in self.found if one.sequences >= FULL * most]
        sequences = sum(one.sequences for one in full)
        seconds, middle = _medians(full)
        return DecodePasses(
            passes=len(full),
            seconds=seconds,
            sequences=middle,
            context=max(1, round(sum(one.contexts for one in full) / sequences)),
            pages=sum(one.pages for one in full) / sequences,
            waiting=sum(one.waiting for one in full) / len(full),
            emptier=self._emptier(most),
        )

    def _emptier(self, most: int) -> EmptierPasses | None:
        few = [one for one in self.found if one.sequences <= EMPTIER * most]
        return EmptierPasses(*_medians(few)) if len(few) >= ENOUGH else None


def _medians(passes: Sequence[_Pass]) -> tuple[float, int]:
    """Of seconds and of sequences."""
    sequences = statistics.median(one.sequences for one in passes)
    return statistics.median(one.seconds for one in passes), round(sequences)


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
        self._meter.note(self._engine, report.total - report.finished)
        if self._clock() >= self._due:
            self._write(report)
            self._due = self._clock() + WRITE_SECONDS

    def finish(self, report: JobReport) -> None:
        self._write(report)

    def _write(self, report: JobReport) -> None:
        inputs, stats = self._engine.inputs, self._engine.stats
        assert inputs is not None, "nothing was planned"
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
            self._meter.requests,
            stats.longest,
            work.stages,
            self._meter.passes(),
        )
        temporary = self.file.with_name(self.file.name + ".tmp")
        try:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1))
            os.replace(temporary, self.file)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.file, error.strerror)
