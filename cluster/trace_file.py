"""A run's trace as a file that Perfetto and chrome://tracing open: one process a stage, one driver.

Each resource is a track: the threads that read, the copy stream, the compute stream, the link. Spans
that overlap without nesting, as those of two streams of one kind do, get tracks of their own. The
format is Chrome's "Trace Event Format"; times are microseconds since the first span.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from headrace.cluster.job_report import ComputeSplit
from headrace.cluster.ring_trace import RingTrace, RingTracing
from headrace.runtime.trace import KEPT_PASSES, Kind, Span, Trace
from headrace.scheduler.errors import HeadraceError

log = logging.getLogger(__name__)

_TRACKS = {
    Kind.COPY: "copy",
    Kind.KV_COPY: "KV copy",
    Kind.KV_LOG: "KV log",
    Kind.SEND: "link",
    Kind.RECV: "link",
    Kind.SCHEDULE: "schedule and commit",
    Kind.COMMIT: "schedule and commit",
    Kind.IN_FLIGHT: "in flight",
    Kind.RECOVERY: "recovery",
    Kind.REPLACE: "recovery",
}
"""All other kinds happen on the compute stream, but for reads, which have their thread's name."""

_BEGINNING = b'{"displayTimeUnit":"ms","otherData":{"headrace":'
_DRIVER = 1  # Perfetto takes process 0 for the kernel's idle task


class RunTrace:
    """Has a ring recorded from its first pass on, and writes the newest ones to `file` at the end."""

    def __init__(self, file: Path, passes: int = KEPT_PASSES) -> None:
        self.file, self.tracing = file, RingTracing()
        self.tracing.begin(passes)
        self.written = False
        self._trace: RingTrace | None = None

    def close(self) -> None:
        """Write the file, whole or not at all. Safe to call twice.

        What prevents it is logged: the run's results are there already, or its error is on its way.
        """
        if self._trace is not None:
            return
        self._trace = self.tracing.end()()
        for note in notes_of(self._trace):
            log.warning("%s: %s", self.file, note)
        try:
            check_writable(self.file)  # by now it may be the job's output
            write_trace(self.file, self._trace)
            self.written = True
        except (OSError, HeadraceError) as error:
            log.error("the trace was not written to %s: %s", self.file, error)

    def splits(self) -> list[ComputeSplit | None]:
        """What each stage computed, from its process's first pass on. For a trace that is closed."""
        assert self._trace is not None
        return [_split(trace) for trace in self._trace.newest]


def check_writable(file: Path, option: str = "--trace") -> None:
    """HeadraceError when `file` cannot become a trace: to be asked before anything runs.

    An earlier trace is replaced, no other file is.
    """
    if file.is_file() and not is_trace(file):
        raise HeadraceError(f"{option} {file} is there and is no trace: choose another file")
    folder = file.absolute().parent
    if file.is_dir():
        raise HeadraceError(f"{option} {file} is a directory: name a file in it")
    if not folder.is_dir():
        raise HeadraceError(f"{option} {file}: there is no directory {folder}: create it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HeadraceError(f"{option} {file}: {folder} may not be written to: choose another file")


def is_trace(file: Path) -> bool:
    """Whether it begins as the traces do that are written here."""
    with file.open("rb") as opened:
        return opened.read(len(_BEGINNING)) == _BEGINNING


def _split(trace: Trace | None) -> ComputeSplit | None:
    if trace is None or not trace.complete:
        return None
    seconds = trace.seconds
    return ComputeSplit(
        seconds.get(Kind.DEQUANT, 0.0),
        seconds.get(Kind.MATMUL, 0.0),
        seconds.get(Kind.ATTENTION, 0.0),
        seconds.get(Kind.GRAPH, 0.0),
    )


def notes_of(trace: RingTrace) -> list[str]:
    """What the trace lacks, and why."""
    notes = list(trace.notes)
    for each in trace.stages:
        if each.trace is None and each.left:
            died = "whose place another one took, is gone with what it recorded"
            notes.append(f"lacks a process of stage {each.stage}, {died}")
        elif each.trace is None:
            notes.append(f"lacks stage {each.stage}, which did not answer")
        elif not each.trace.complete:
            notes.append(f"stage {each.stage} had more spans a pass than a trace can hold")
    return notes


def write_trace(file: Path, trace: RingTrace) -> None:
    """Write what was recorded, replacing `file` when all of it is on disk."""
    with replacing(file) as out:
        out.writelines(trace_json(trace))


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `file` when the block ends without an error."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as out:
            yield out
        partial.replace(file)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def trace_json(trace: RingTrace) -> Iterator[bytes]:
    """The file, a span at a time."""
    processes, encode = _processes(trace), msgspec.json.Encoder().encode
    yield _BEGINNING
    yield encode(_about(trace, processes))
    yield b'},"traceEvents":[\n'
    origin = min((p.origin for p in processes if p.trace.spans), default=0)
    events = (event for process in processes for event in process.events(origin))
    for i, event in enumerate(events):
        yield b",\n" * (i > 0) + encode(event)
    yield b"\n]}\n"


def _processes(trace: RingTrace) -> list["_Process"]:
    """The driver, the stages in their order, and then those whose places they took."""
    made = [_Process(_DRIVER, _DRIVER, "driver", trace.driver)]
    stages = 1 + max((each.stage for each in trace.stages), default=-1)
    earlier = 0
    for each in trace.stages:
        number, name = _DRIVER + 1 + each.stage, f"stage {each.stage}"
        place = number
        if each.left:
            earlier += 1
            number, name = _DRIVER + stages + earlier, f"{name} (process {earlier} that left)"
        if each.trace is not None:
            made.append(_Process(number, place, name, each.trace))
    return made


@dataclass(frozen=True, slots=True)
class _Process:
    """One row of the trace viewer, with a track for each of its resources."""

    number: int
    place: int
    name: str
    trace: Trace

    @property
    def origin(self) -> int:
        """When its first span began, by the driver's clock."""
        return min(span.start for span in self.trace.spans) - self.trace.ahead

    def events(self, origin: int) -> Iterator[dict[str, Any]]:
        """Trace events, in microseconds since `origin`."""
        yield self._named("process_name", 0, f"{self.name} on {self.trace.node}")
        yield {**self._named("process_sort_index", 0, ""), "args": {"sort_index": self.place}}
        tracks: dict[str, list[Span]] = defaultdict(list)
        for span in self.trace.spans:
            tracks[_track(span)].append(span)
        thread = 0
        for track in sorted(tracks):
            for i, lane in enumerate(lanes(tracks[track])):
                thread += 1
                yield self._named("thread_name", thread, f"{track} {i + 1}" if i else track)
                for span in lane:
                    yield from self._span(span, thread, origin + self.trace.ahead)

    def _named(self, what: str, thread: int, name: str) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": self.number, "tid": thread, "args": {"name": name}}

    def _span(self, span: Span, thread: int, origin: int) -> Iterator[dict[str, Any]]:
        event: dict[str, Any] = {
            "ph": "X",
            "cat": span.kind.value,
            "name": _label(span),
            "pid": self.number,
            "tid": thread,
            "ts": (span.start - origin) / 1e3,
            "dur": (span.end - span.start) / 1e3,
        }
        if span.nbytes:
            event["args"] = {"bytes": span.nbytes}
        yield event
        if span.kind in (Kind.SEND, Kind.RECV):
            yield _arrow(span, event)


def _arrow(span: Span, event: dict[str, Any]) -> dict[str, Any]:
    """An end of the arrow from a message's send to its receipt."""
    sends = span.kind is Kind.SEND
    return {
        "ph": "s" if sends else "f",
        "bp": "e",
        "cat": "hop",
        "name": "hop",
        "id": f"{span.name} {span.number}",
        "pid": event["pid"],
        "tid": event["tid"],
        "ts": event["ts"] if sends else event["ts"] + event["dur"],
    }


def lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """The spans in as few lists as this order finds, each of spans that follow or nest."""
    found: list[list[Span]] = []
    ends: list[list[int]] = []  # of the spans that are open, by lane, innermost last
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        for stack in ends:
            while stack and stack[-1] <= span.start:
                stack.pop()
        fitting = (i for i, stack in enumerate(ends) if not stack or span.end <= stack[-1])
        lane = next(fitting, len(found))
        if lane == len(found):
            found.append([])
            ends.append([])
        found[lane].append(span)
        ends[lane].append(span.end)
    return found


def _track(span: Span) -> str:
    return span.thread or _TRACKS.get(span.kind, "compute")


def _label(span: Span) -> str:
    number = str(span.number) if span.number >= 0 else ""
    return " ".join(part for part in (span.kind.value, span.name, number) if part)


def _about(trace: RingTrace, processes: Iterable[_Process]) -> dict[str, Any]:
    """How the clocks of the processes were put on one scale, and what is left out."""
    return {
        "passes": f"the newest {trace.passes} of each process",
        "notes": notes_of(trace),
        "clocks": {
            p.name: {
                "node": p.trace.node,
                "ahead_of_driver_us": p.trace.ahead / 1e3,
                "uncertain_us": p.trace.uncertain / 1e3,
            }
            for p in processes
        },
    }
