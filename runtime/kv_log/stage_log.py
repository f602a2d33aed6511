"""A stage's log of KV pages: where it lies, who takes it over, and what it has done."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from headrace.runtime.kv.identity import PageIdentity
from headrace.runtime.kv.stage_window import stage_directory, window_bytes
from headrace.runtime.kv_log.endurance import drive_wear
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.log import KVLog
from headrace.runtime.kv_log.start import make_directory
from headrace.runtime.kv_log.stats import LogReport
from headrace.runtime.memory.held import Holding
from headrace.runtime.stage_config import LogConfig, StageConfig
from headrace.scheduler.kv_room import segment_bytes
from headrace.scheduler.memory import slot_bytes


class StageLog:
    """The log in the folder of its stage, whose pages are all of one tenant. It has what the plan's slots
    for pages that are decoded over (stage_window.py) leave of the cap.

    `keys` are what the process had in memory that handed the log over; it had closed it.
    Raises KVLogError for a folder that cannot be used or is another process's, HeadraceError for a
    file of keys that cannot be used.
    """

    def __init__(self, config: StageConfig, keys: Mapping[str, bytes] | None = None) -> None:
        settings = config.kv_log
        assert settings is not None
        identity = PageIdentity.of(config)
        slot = slot_bytes(sum(identity.page_bytes))
        cap = settings.cap - window_bytes(config)
        self._settings = settings
        make_directory(Path(settings.directory))
        self.directory = stage_directory(config)
        self._keys = _key_ring(settings, keys)
        try:
            self._log = KVLog.open(
                self.directory,
                str(identity).encode(),
                cap,
                keys=self._keys,
                keep=settings.keep,
                ttl=settings.ttl,
                daily_writes=settings.daily_writes,
                segment_bytes=segment_bytes(cap, slot),
            )
        except BaseException:
            self._forget_keys()
            raise

    def put(self, cohort: int, pages: Sequence[tuple[bytes, memoryview]]) -> list[bytes]:
        return self._log.put(cohort, pages, tenant=self._settings.tenant)

    def get(self, key: bytes, dest: memoryview) -> bool:
        return self._log.get(key, dest)

    def memory(self) -> Iterator[Holding]:
        return self._log.memory()

    def may_write(self, nbytes: int) -> bool:
        """Whether so much more may be written to the drive today, by whoever; it is booked then."""
        return self._log.budget.take(nbytes)

    @property
    def written(self) -> int:
        """Bytes that this process wrote to the drive, by whatever way."""
        return self._log.budget.written

    @property
    def budget_left(self) -> int | None:
        """Bytes that may be written now; None without a budget."""
        return self._log.budget.left

    def keys(self) -> list[bytes]:
        """Of all pages that it has, oldest first."""
        return self._log.keys()

    def report(self) -> LogReport:
        """What it has done until now; may ask the drive for its wear, which takes a moment."""
        return LogReport(str(self.directory), self._log.stats, drive_wear(self.directory))

    def close(self) -> None:
        """Keep the pages or delete them, as it was told. Nothing moves any more. Safe to call twice."""
        try:
            self._log.close()
        finally:
            self._forget_keys()
        if not self._settings.keep:
            with suppress(OSError):  # there is more in it, such as how much was written today
                self.directory.rmdir()

    def hand_over(self) -> dict[str, bytes]:
        """Close the log and leave its pages to the stage that opens it next, in this folder.

        Returns the keys that are in no file, without which nobody can read them. Nothing moves any more.
        """
        keys = {} if self._keys is None else self._keys.give_away()
        try:
            self._log.close(hand_over=True)
        finally:
            self._forget_keys()
        return keys

    def _forget_keys(self) -> None:
        if self._keys is not None:
            self._keys.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _key_ring(settings: LogConfig, keys: Mapping[str, bytes] | None) -> KeyRing | None:
    if settings.plaintext:
        return None
    return KeyRing(None if settings.key_file is None else Path(settings.key_file), keys)
