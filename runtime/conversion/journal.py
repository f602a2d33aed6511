"""The record of an unfinished conversion: what it makes of what, and which blocks are complete."""

import json
import os
from pathlib import Path
from typing import Any, Self

from headrace.runtime.block_file import write_durably
from headrace.runtime.store import JOURNAL
from headrace.scheduler.errors import StoreError


class Journal:
    """The blocks that are complete, as manifest entries by name, on disk and in memory.

    Raises StoreError when the directory holds something else, or an other conversion's journal.
    """

    def __init__(self, dest: Path, identity: dict[str, Any]) -> None:
        self._file = dest / JOURNAL
        self.done: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self._resume(dest, identity)
        else:
            _refuse_occupied(dest)
            write_durably(self._file, journal_line(identity))
        self._out = self._file.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def _resume(self, dest: Path, identity: dict[str, Any]) -> None:
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            # The line that was being written when the process died; appending to it would lose two.
            os.truncate(self._file, len(whole))
        found, *entries = (json.loads(line) for line in whole.splitlines())
        if found != identity:
            what = (
                "from another checkpoint"
                if found["options"] == identity["options"]
                else (f"with other options ({found['options']})")
            )
            raise StoreError(
                f"{dest} holds an unfinished conversion {what}; finish that one, delete it, or "
                "choose another directory"
            )
        for entry in entries:
            file = dest / entry["file"]
            size = entry["data_offset"] + entry["nbytes"]
            if file.exists() and file.stat().st_size == size:
                self.done[entry["name"]] = entry

    def record(self, entry: dict[str, Any]) -> None:
        _write_all(self._out.fileno(), journal_line(entry))
        os.fsync(self._out.fileno())
        self.done[entry["name"]] = entry


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def journal_line(value: dict[str, Any]) -> bytes:
    """Compact JSON and a newline."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _refuse_occupied(dest: Path) -> None:
    other = [file.name for file in dest.iterdir() if file.name != JOURNAL + ".tmp"]
    if other:
        raise StoreError(
            f"{dest} is not empty (it holds {', '.join(sorted(other)[:3])}); choose another directory"
        )
