"""What a stage's process tells of its passes and of the drive of its KV pages."""

import os
import threading
import time
from pathlib import Path
from typing import Protocol

from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.events import Sampled
from headrace.cluster.telemetry.ray_sink import Beat, RaySink
from headrace.runtime.kv_log.endurance import drive_wear
from headrace.scheduler.plan import StageTimes

WEAR_SECONDS = 600.0
"""How often the drive is asked for its wear, which may take seconds."""


class KVDrive(Protocol):
    """A stage's log of KV pages. Bytes."""

    @property
    def directory(self) -> Path: ...

    @property
    def written(self) -> int: ...

    @property
    def budget_left(self) -> int | None: ...


class StageMetrics:
    """Sums up passes, and hands the sums on every second until it is closed."""

    def __init__(self, ring: str, stage: int, drive: KVDrive | None = None) -> None:
        self._sink = RaySink(ring=ring, stage=str(stage))
        self._lock = threading.Lock()
        self._sum, self._passes = StageTimes(stage, 0.0, 0.0, 0.0, 0, 0), Sampled()
        self._drive, self._wear = drive, None if drive is None else _Wear(drive.directory)
        self._beat = Beat(self._flush)

    def passed(self, times: StageTimes) -> None:
        """A pass has ended. All that is done in its time."""
        with self._lock:
            self._sum = self._sum.plus(times)
            self._passes.add(times.total)

    def watch(self, drive: KVDrive) -> None:
        """The stage has places on NVMe from now on."""
        self._wear, self._drive = _Wear(drive.directory), drive

    def _flush(self) -> None:
        with self._lock:
            times, passes, self._passes = self._sum, self._passes, Sampled()
        self._sink.observe(table.STAGE_PASS_SECONDS, passes.values)
        self._sink.gauge(table.STAGE_PID, os.getpid())
        self._parts(times)
        self._bytes(times)
        total = self._sink.total
        total(table.EXPERTS, times.experts_used - times.experts_loaded, found="on the device")
        total(table.EXPERTS, times.experts_loaded, found="loaded")
        if self._drive is not None and self._wear is not None:
            self._show_drive(self._drive, self._wear)

    def _parts(self, times: StageTimes) -> None:
        waits = {"weights": times.weights_wait, "kv": times.kv_wait, "link": times.link_wait}
        for part, seconds in waits.items():
            self._sink.total(table.STAGE_SECONDS, seconds, part=part)
        computing = times.total - sum(waits.values())
        self._sink.total(table.STAGE_SECONDS, max(0.0, computing), part="compute")

    def _bytes(self, times: StageTimes) -> None:
        for tier, content, direction, nbytes in (
            ("nvme", "weights", "in", times.nvme_bytes),
            ("host", "weights", "in", times.host_bytes),
            ("nvme", "kv", "in", times.kv_sunk_bytes),
            (
                "host",
                "kv",
                "in",
                times.kv_in_bytes + max(0, times.kv_cold_bytes - times.kv_sunk_bytes),
            ),
            ("host", "kv", "out", times.kv_out_bytes),
            ("host", "adapters", "in", times.adapter_bytes),
        ):
            self._sink.total(
                table.TIER_BYTES, nbytes, tier=tier, content=content, direction=direction
            )

    def _show_drive(self, drive: KVDrive, wear: "_Wear") -> None:
        self._sink.total(table.KV_DRIVE_WRITTEN, drive.written)
        if (left := drive.budget_left) is not None:
            self._sink.gauge(table.KV_DRIVE_BUDGET, left)
        if (used := wear.ratio()) is not None:
            self._sink.gauge(table.KV_DRIVE_WEAR, used)

    def close(self) -> None:
        """Safe to call twice."""
        self._beat.close()


class _Wear:
    def __init__(self, directory: Path) -> None:
        self._directory, self._asked = directory, -WEAR_SECONDS
        self._ratio: float | None = None

    def ratio(self) -> float | None:
        if time.monotonic() - self._asked > WEAR_SECONDS:
            used = drive_wear(self._directory).percent_used
            self._ratio, self._asked = None if used is None else used / 100, time.monotonic()
        return self._ratio
