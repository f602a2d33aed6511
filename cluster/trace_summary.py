"""What a trace file says, in a terminal: time by kind and process, and the longest waits."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cluster.trace_file import is_trace
from headrace.runtime.trace import Kind
from headrace.scheduler.errors import HeadraceError

_WAITS = frozenset(
    {Kind.WEIGHTS_WAIT.value, Kind.LINK_WAIT.value, Kind.KV_WAIT.value, Kind.RECOVERY.value}
)
_KINDS = [kind.value for kind in Kind]


@dataclass(frozen=True, slots=True)
class Wait:
    """One span in which a process waited; `at` seconds after the first span of the trace."""

    process: str
    name: str
    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """Of each process, in the order of the file, its node, spans and seconds by kind, which overlap: a pass has
    visits, and a visit matmuls. `seconds` are from the first span to the end of the last one."""

    seconds: float
    nodes: dict[str, str]
    spans: dict[str, Counter[str]]
    times: dict[str, dict[str, float]]
    waits: tuple[Wait, ...]
    notes: tuple[str, ...]

    @property
    def kinds(self) -> list[str]:
        """All that there are, in the order of `Kind`."""
        found = {kind for each in self.spans.values() for kind in each}
        return [kind for kind in _KINDS if kind in found]

    @property
    def passes(self) -> int:
        """As many as the stage with the most of them had."""
        return max((each[Kind.PASS.value] for each in self.spans.values()), default=0)


def summarize(file: Path, longest: int = 5) -> TraceSummary:
    """HeadraceError for a file that is no trace of ours."""
    try:
        if not is_trace(file):
            raise HeadraceError(f"{file} is no trace that headrace wrote")
        loaded = json.loads(file.read_bytes())
        about, events = loaded["otherData"]["headrace"], loaded["traceEvents"]
    except OSError as error:
        raise HeadraceError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise HeadraceError(f"{file} is a trace that was cut off or changed: {error}") from error
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    told = {pid: name.partition(" on ") for pid, name in names.items()}
    nodes = {process: node for process, _, node in told.values()}
    spans: dict[str, Counter[str]] = {process: Counter() for process in nodes}
    times: dict[str, dict[str, float]] = {process: {} for process in nodes}
    waits: list[Wait] = []
    end = 0.0
    for event in events:
        if event["ph"] == "X":
            process = told[event["pid"]][0]
            _count(event, process, spans[process], times[process], waits)
            end = max(end, event["ts"] + event["dur"])
    waits.sort(key=lambda wait: -wait.seconds)
    notes = tuple(about.get("notes", ()))
    return TraceSummary(end / 1e6, nodes, spans, times, tuple(waits[:longest]), notes)


def _count(
    event: dict[str, Any],
    process: str,
    spans: Counter[str],
    times: dict[str, float],
    waits: list[Wait],
) -> None:
    kind, seconds = event["cat"], event["dur"] / 1e6
    spans[kind] += 1
    times[kind] = times.get(kind, 0.0) + seconds
    if kind in _WAITS:
        waits.append(Wait(process, event["name"], event["ts"] / 1e6, seconds))
