"""What a run says of KV pages: what is not 0, in a table of 80 columns, and everything as JSON."""

import json
from dataclasses import replace
from io import StringIO

from rich.console import Console

from headrace.cluster.cli.kv_report import kv_json, kv_table
from headrace.cluster.wire import decode, encode
from headrace.runtime.kv_log.endurance import DriveWear
from headrace.runtime.kv_log.record import Miss
from headrace.runtime.kv_log.stats import KVLogStats, LogReport
from headrace.scheduler.kv_stats import KVStats, PageCounts, TierHits
from headrace.scheduler.plan import MoveKind, StageTimes

NOTHING = KVLogStats(
    pages=0,
    bytes_live=0,
    file_bytes=0,
    bytes_written=0,
    payload_written=0,
    hits=0,
    misses=dict.fromkeys(Miss, 0),
    lost=0,
    refused=0,
    segments=0,
    segments_dropped=0,
    segments_locked=0,
    pages_recovered=0,
    seconds_writing=0.0,
    seconds_reading=0.0,
)
UNKNOWN = DriveWear("nvme0n1", None, None, None, "nobody tells")
EVERYTHING = KVStats(
    device=PageCounts(cached=7),
    host=PageCounts(cached=2_000_000),
    nvme=30_000_000,
    hits=TierHits(10, 200, 3000),
    misses=4,
    moved=dict.fromkeys(MoveKind, 1_234_567),
    lost=dict.fromkeys(MoveKind, 5),
    preempted_by_swap=6,
    preempted_by_recompute=1,
)


def said(*arguments: object) -> str:
    table = kv_table(*arguments)  # type: ignore[arg-type]
    console = Console(file=StringIO(), width=80)
    console.print(table)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    return " ".join(text.replace("│", " ").split())


def test_nothing_is_said_of_nothing() -> None:
    empty = LogReport("kv/stage-0", NOTHING, UNKNOWN)
    times = [StageTimes(0, 1.0, 0.0, 0.0, 0, 0)]
    assert kv_table(KVStats(misses=9), times, [empty, None]) is None


def test_everything_is_said() -> None:
    stats = replace(
        NOTHING,
        bytes_written=11 << 20,
        payload_written=10 << 20,
        misses=dict.fromkeys(Miss, 0) | {Miss.DAMAGED: 3, Miss.ABSENT: 50},
        lost=2,
        refused=8,
        segments_dropped=9,
    )
    worn = replace(UNKNOWN, percent_used=12, note="by smartctl")
    logs = [LogReport("a", stats, worn), None, LogReport("b", stats, worn)]
    times = [StageTimes(i, 1.0, 0.0, 0.0, 0, 0, kv_wait=float(i)) for i in range(3)]
    text = said(EVERYTHING, times, logs)
    for part in (
        "10 device, 200 host RAM, 3,000 NVMe; 4 more were computed",
        "640 device, 12,800 host RAM, 192,000 NVMe",
        "6 with pages saved, 1 to compute again",
        "1,234,567 to host RAM, 1,234,567 from host RAM",
        "they were computed again",
        "2.0 s with nothing else to do",
        "22.0 MiB, 1.10 for each byte of a page",
        "16 pages, beyond --kv-daily-writes",
        "4 pages, which the drive did not take",
        "not readable 6 damaged",
        "18 files of pages",
        "7 on the device, 2,000,000 host RAM, 30,000,000 NVMe",
    ):
        assert part in text, part
    assert text.count("nvme0n1: 12% of its life used (by smartctl)") == 1
    assert "absent" not in text


def test_a_report_crosses_the_wire_and_becomes_json() -> None:
    report = LogReport("kv/stage-0", NOTHING, UNKNOWN)
    assert decode(encode(report), LogReport) == report
    found = json.loads(json.dumps(kv_json(EVERYTHING, [report, None])))
    assert found["moved"] == dict.fromkeys(("out", "in", "spill", "fetch", "sink"), 1_234_567)
    assert found["tokens_saved"]["nvme"] == 192_000
    log, missing = found["logs"]
    assert missing is None and log["misses"]["damaged"] == 0
    assert log["write_amplification"] == 1.0 and log["drive"]["device"] == "nvme0n1"
