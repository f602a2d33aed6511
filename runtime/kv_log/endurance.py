"""How much a drive has been written to: a budget of bytes a day that outlives the process, and wear.

KV pages wear a drive more than anything else here: a consumer SSD is good for some hundred full
writes, and spilling at 100 MB/s is 8.6 TB a day.
"""

import json
import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger(__name__)

_HOUR = 3600
_WINDOW = 24  # hours
_SECTOR = 512  # bytes, in /sys/block/*/stat whatever the drive's sectors are
_NVME_UNIT = 512_000  # bytes in one of NVMe's data units


class _Ledger(msgspec.Struct):
    """The file, as JSON: bytes ever written, and in which hour since the epoch."""

    total: int
    hours: dict[int, int]


class WriteBudget:
    """Bytes written, and whether more may be: at most `a_day` in any 24 hours (by whole hours).

    The sums are kept in `file`, written ahead in steps: a process that is killed has booked up to a
    step (a hundredth of the budget, 64 MiB at most) more than it wrote, never less. Without a budget
    (`a_day` None) everything is allowed and counted in memory only.
    """

    def __init__(
        self, file: Path, a_day: int | None, clock: Callable[[], float] = time.time
    ) -> None:
        if a_day is not None and a_day <= 0:
            raise ValueError(f"a write budget is a positive number of bytes a day, not {a_day}")
        self.file = file
        self.a_day = a_day
        self._clock = clock
        self._lock = threading.Lock()
        self._saving = threading.Lock()
        self._ledger = _load(file) if a_day is not None else _Ledger(0, {})
        self._booked = 0  # of what is written below, already in the file
        self._written = 0  # by this process
        self._step = min((a_day or 0) // 100 + 1, 64 << 20)
        self._warned = False
        self._cannot_save = False

    @property
    def written(self) -> int:
        """Bytes of this process."""
        with self._lock:
            return self._written

    @property
    def left(self) -> int | None:
        """Bytes that may be written now; None without a budget."""
        with self._lock:
            return None if self.a_day is None else max(self.a_day - self._spent(), 0)

    def take(self, nbytes: int) -> bool:
        """Book bytes that are about to be written; False, and a warning once, if they are too many."""
        with self._lock:
            if self.a_day is not None and self._spent() + nbytes > self.a_day:
                self._warn()
                return False
            self._warned = False
        self.add(nbytes)
        return True

    def add(self, nbytes: int) -> None:
        """Book bytes that are written whatever the budget says."""
        with self._lock:
            hour = int(self._clock()) // _HOUR
            self._ledger.hours[hour] = self._ledger.hours.get(hour, 0) + nbytes
            self._ledger.total += nbytes
            self._written += nbytes
            behind = self.a_day is not None and self._written > self._booked
        if behind:
            self._save(self._step)

    def _spent(self) -> int:
        """In the running hour and the 23 before it. Forgets what is older."""
        first = int(self._clock()) // _HOUR - _WINDOW + 1
        for hour in [hour for hour in self._ledger.hours if hour < first]:
            del self._ledger.hours[hour]
        return sum(self._ledger.hours.values())

    def _warn(self) -> None:
        if not self._warned:
            log.warning(
                "%s: the %d bytes a day that may be written to this drive are spent; KV pages are"
                " dropped instead, and computed again when they are needed",
                self.file.parent,
                self.a_day,
            )
        self._warned = True

    def _save(self, ahead: int) -> None:
        """Write the sums, and `ahead` bytes more in the running hour. One thread at a time."""
        with self._saving:
            with self._lock:
                if ahead and self._written <= self._booked:
                    return  # the thread before has booked enough
                hours, now = dict(self._ledger.hours), int(self._clock()) // _HOUR
                hours[now] = hours.get(now, 0) + ahead
                content = msgspec.json.encode(_Ledger(self._ledger.total + ahead, hours))
                self._booked = self._written + ahead
            try:
                new = self.file.with_name(self.file.name + ".new")
                new.write_bytes(content)
                new.rename(self.file)
            except OSError as error:
                if not self._cannot_save:
                    log.warning("%s: what is written cannot be noted: %s", self.file, error)
                self._cannot_save = True

    def close(self) -> None:
        """Save what was really written. May be called again."""
        if self.a_day is not None and self._written:
            self._save(0)


def _load(file: Path) -> _Ledger:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Ledger)
    except FileNotFoundError:
        return _Ledger(0, {})
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        log.warning("%s cannot be read, so that writes are counted from 0: %s", file, error)
        return _Ledger(0, {})


def read_written(file: Path) -> int | None:
    """Bytes ever written by logs with a budget, out of their file; None if there is none."""
    return _load(file).total if file.exists() else None


@dataclass(frozen=True, slots=True)
class DriveWear:
    """What is known of a drive; None for what is not, and `note` says why.

    `written_since_boot` is by all processes, from the kernel; `lifetime_written` and `percent_used` (100
    and more when the vendor's estimate of its life is over) are the drive's own.
    """

    device: str | None
    written_since_boot: int | None
    lifetime_written: int | None
    percent_used: int | None
    note: str

    def __str__(self) -> str:
        if self.percent_used is None:
            return f"wear unknown: {self.note}"
        return f"{self.device}: {self.percent_used}% of its life used ({self.note})"


Run = Callable[[Sequence[str]], str | None]


def drive_wear(path: Path, *, sys: Path = Path("/sys"), run: Run | None = None) -> DriveWear:
    """Wear of the drive that `path` is on, by whatever can be asked without further rights.

    The kernel shows no wear in /sys, so that smartctl or nvme-cli are asked where they are installed and
    may read the drive. `run` is how: command -> output, None if that failed.
    """
    device = block_device(path, sys)
    if device is None:
        return DriveWear(None, None, None, None, "the directory is on no block device of its own")
    since_boot = _written_since_boot(device)
    name, tried = device.name, []
    for command, read in (
        (("smartctl", "--json", "--all", f"/dev/{name}"), _smartctl),
        (("nvme", "smart-log", "--output-format=json", f"/dev/{name}"), _nvme),
    ):
        output = (run or _run)(command)
        tried.append(command[0])
        found = None if output is None else read(output)
        if found is not None:
            return DriveWear(name, since_boot, found[1], found[0], f"by {command[0]}")
    note = f"{' and '.join(tried)} are not installed, may not read {name}, or find no wear there"
    return DriveWear(name, since_boot, None, None, note)


def block_device(path: Path, sys: Path) -> Path | None:
    """The whole disk under a file, in /sys."""
    number = os.stat(path).st_dev
    link = sys / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
    if not link.exists():
        return None
    found = link.resolve()
    return found.parent if (found / "partition").exists() else found


def _written_since_boot(device: Path) -> int | None:
    try:
        return int((device / "stat").read_text().split()[6]) * _SECTOR
    except (OSError, ValueError, IndexError):
        return None


def _run(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        # smartctl's exit status tells of the drive's health, too: its output decides.
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout


def _smartctl(output: str) -> tuple[int, int | None] | None:
    return _wear(output, "nvme_smart_health_information_log", "percentage_used")


def _nvme(output: str) -> tuple[int, int | None] | None:
    return _wear(output, None, "percent_used")


def _wear(output: str, section: str | None, key: str) -> tuple[int, int | None] | None:
    """(percent of its life, bytes written) out of a tool's JSON."""
    try:
        found: Any = json.loads(output)
        found = found if section is None else found[section]
        used, units = int(found[key]), found.get("data_units_written")
        return used, None if units is None else int(units) * _NVME_UNIT
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
