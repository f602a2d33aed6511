"""What became of KV pages in a run: where they were found, moved and lost, and what a drive was worn."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from headrace.cluster.engine import Engine
from headrace.runtime.kv_log.record import Miss
from headrace.runtime.kv_log.stats import KVLogStats, LogReport
from headrace.scheduler.kv_stats import KVStats, TierHits
from headrace.scheduler.plan import MoveKind, StageTimes
from headrace.scheduler.sizes import format_size

_MOVES = {
    MoveKind.OUT: "to host RAM",
    MoveKind.IN: "from host RAM",
    MoveKind.SPILL: "to NVMe",
    MoveKind.FETCH: "from NVMe",
    MoveKind.SINK: "to NVMe to decode over",
}

_BAD = (Miss.DAMAGED, Miss.UNAUTHENTIC, Miss.STALE, Miss.IO)
"""Reads of pages that were there and could not be used; others were not there any more."""


def kv_table(
    kv: KVStats, stages: Sequence[StageTimes], logs: Sequence[LogReport | None] = ()
) -> Table | None:
    """Everything that is not 0; None if nothing was found, moved or taken from anybody."""
    rows = [*_found(kv), *_moved(kv, stages), *_logged([log.stats for log in logs if log])]
    if not rows:
        return None
    table = Table(title="KV pages", title_justify="left", show_header=False)
    for name, value in (*rows, *_held(kv), *_worn(logs)):
        table.add_row(name, Text(value))
    return table


def end_of_pages(engine: Engine, *, keep: bool) -> Table | None:
    """The table at the end of a run, whose pages are saved first if they are to be kept."""
    if keep:
        engine.save()
    return kv_table(engine.stats.kv, engine.stats.stages, engine.log_reports())


def _found(kv: KVStats) -> Iterator[tuple[str, str]]:
    if kv.hits.total:
        yield "found", f"{_tiers(kv.hits)}; {kv.misses} more were computed"
        yield "tokens saved", _tiers(kv.hits.tokens)
    swapped, computed = kv.preempted_by_swap, kv.preempted_by_recompute
    if swapped or computed:
        yield "preempted", _joined({"with pages saved": swapped, "to compute again": computed})


def _moved(kv: KVStats, stages: Sequence[StageTimes]) -> Iterator[tuple[str, str]]:
    moved = {name: kv.moved.get(kind, 0) for kind, name in _MOVES.items()}
    lost = {name: kv.lost.get(kind, 0) for kind, name in _MOVES.items()}
    if any(moved.values()):
        yield "moved", _joined(moved)
    if any(lost.values()):
        yield "lost", f"{_joined(lost)}; they were computed again if need be"
    if read := sum(times.kv_sunk_bytes for times in stages):
        yield "decoded over", f"{format_size(read)} read from NVMe, for each token again"
    if kv.spoiled:
        yield "began again", f"{kv.spoiled} sequences: a page on NVMe was damaged"
    waited = max((times.kv_wait for times in stages), default=0.0)
    if waited:
        yield "waited for", f"{waited:.1f} s with nothing else to do"


def _logged(logs: Sequence[KVLogStats]) -> Iterator[tuple[str, str]]:
    """All stages' together; a page is one on each of them."""
    written = sum(log.bytes_written for log in logs)
    if written:
        payload = sum(log.payload_written for log in logs)
        factor = f", {written / payload:.2f} for each byte of a page" if payload else ""
        yield "written to NVMe", f"{format_size(written)}{factor}"
    if refused := sum(log.refused for log in logs):
        yield "not written", f"{refused} pages, beyond --kv-daily-writes"
    if lost := sum(log.lost for log in logs):
        yield "not kept", f"{lost} pages, which the drive did not take"
    bad = {miss.value: sum(log.misses.get(miss, 0) for log in logs) for miss in _BAD}
    if any(bad.values()):
        yield "not readable", _joined(bad)
    if dropped := sum(log.segments_dropped for log in logs):
        yield "deleted for room", f"{dropped} files of pages"


def _held(kv: KVStats) -> Iterator[tuple[str, str]]:
    """At the end; on the device what nobody needs any more."""
    held = {"on the device": kv.device.cached, "host RAM": kv.host.cached, "NVMe": kv.nvme}
    if any(held.values()):
        yield "held at the end", _joined(held)


def _worn(logs: Sequence[LogReport | None]) -> Iterator[tuple[str, str]]:
    """Each drive once, and none that does not tell."""
    found = {log.wear.device: log.wear for log in logs if log and log.wear.percent_used is not None}
    for wear in found.values():
        yield "drive", str(wear)


def _tiers(counts: TierHits) -> str:
    return _joined({"device": counts.device, "host RAM": counts.host, "NVMe": counts.nvme})


def _joined(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def kv_json(kv: KVStats, logs: Sequence[LogReport | None]) -> dict[str, Any]:
    """Everything, zeros too, as JSON types; sizes in bytes. A stage that did not answer is null."""
    return {
        **asdict(kv),
        "moved": {kind.value: kv.moved.get(kind, 0) for kind in MoveKind},
        "lost": {kind.value: kv.lost.get(kind, 0) for kind in MoveKind},
        "tokens_saved": asdict(kv.hits.tokens),
        "logs": [None if log is None else _log_json(log) for log in logs],
    }


def _log_json(log: LogReport) -> dict[str, Any]:
    stats = asdict(log.stats)
    stats["misses"] = {miss.value: count for miss, count in log.stats.misses.items()}
    stats["write_amplification"] = log.stats.write_amplification
    return {"directory": log.directory, **stats, "drive": asdict(log.wear)}
