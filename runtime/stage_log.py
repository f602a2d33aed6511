"""A stage's log of KV pages: where it lies, what its pages are good for, and what it has done."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from headrace.runtime.endurance import drive_wear
from headrace.runtime.kv_keys import KeyRing
from headrace.runtime.kv_log import KVLog
from headrace.runtime.kv_start import make_directory
from headrace.runtime.kv_stats import LogReport
from headrace.runtime.stage_config import LogConfig, StageConfig
from headrace.runtime.stage_window import stage_directory, stage_page_bytes, window_bytes
from headrace.runtime.store import Store
from headrace.scheduler.kv_room import segment_bytes
from headrace.scheduler.memory import slot_bytes

_PAGES = 1
"""Of how bytes lie in a page; pages of another version are another log's."""


class StageLog:
    """The log in the folder of its stage, whose pages are all of one tenant. It has what the plan's slots
    for pages that are decoded over (stage_window.py) leave of the cap.

    Raises KVLogError for a folder that cannot be used or is another process's, HeadraceError for a
    file of keys that cannot be used.
    """

    def __init__(self, config: StageConfig) -> None:
        settings = config.kv_log
        assert settings is not None
        identity, slot = _pages_of(config)
        cap = settings.cap - window_bytes(config)
        self._settings = settings
        make_directory(Path(settings.directory))
        self.directory = stage_directory(config)
        self._keys = _keys(settings)
        try:
            self._log = KVLog.open(
                self.directory,
                identity,
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

    def may_write(self, nbytes: int) -> bool:
        """Whether so much more may be written to the drive today, by whoever; it is booked then."""
        return self._log.budget.take(nbytes)

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

    def _forget_keys(self) -> None:
        if self._keys is not None:
            self._keys.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _keys(settings: LogConfig) -> KeyRing | None:
    if settings.plaintext:
        return None
    return KeyRing(None if settings.key_file is None else Path(settings.key_file))


def _pages_of(config: StageConfig) -> tuple[bytes, int]:
    """What pages of this stage are good for, and the bytes of one.

    On another kind of device the same numbers are rounded otherwise, so that pages of it would not
    give just the same tokens.
    """
    store, plan = Store.open(Path(config.store)), config.plan
    layers = plan.placement.layers_of(config.stage)
    sizes = list(stage_page_bytes(config).values())
    kind = config.device.partition(":")[0]
    parts = (_PAGES, store.digest, plan.kv_format, config.dtype, kind, layers, sizes)
    return " ".join(map(str, parts)).encode(), slot_bytes(sum(sizes))
