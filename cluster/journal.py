"""The files of a batch job, and the proof that each row is written exactly once.

Three files grow together: the output, the quarantine (made when the first row needs it) and the
journal. Finishing a row is two appends, in this order:

    1. its line, to the output or the quarantine
    2. a journal record: row number, row key, which file, offset, length and CRC-32 of the line

A row counts as finished exactly when its record is in the journal and the line it names is in
place. Opening the journal makes that true of every byte, whatever instant the process died at:

    - a torn record at the journal's end (its own CRC fails) is cut off;
    - bytes behind the last recorded line, torn or whole, are cut off each file, and their row runs
      again. Random numbers depend on model, id and position alone, so it gives the same line.

SIGKILL leaves the page cache alone, so this order of appends is the order on reopening. A power cut
keeps no order: `sync` therefore flushes the line files, then the journal with a mark that
everything before it is durable, and records behind the last mark count only if their lines match
their CRCs. Lines before the last mark are trusted, except that a file shorter than its records is
an error: somebody changed it.

An exclusive flock on the journal keeps a second job out; the kernel drops it with the process.
The journal stays when the job is complete, so that the same command again finds nothing to do. It
takes some 40 bytes a row and belongs to the output: delete both to start over.

Frames: length and CRC-32 of the payload (two little-endian u32), then msgpack. The first frame is
the header, `[row, key, file, offset, length, crc]` a record, `[]` a mark.
"""

import fcntl
import json
import time
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from headrace.cluster.append_file import AppendFile, frame
from headrace.scheduler.errors import JobError

VERSION = 1
QUARANTINED = 1
"""The key of a row that ended in the quarantine; real keys are larger."""

_OUTPUT, _QUARANTINE = 0, 1


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """What must not change between the runs of one job. `parameters` hold plain JSON values."""

    model: str
    input: str
    parameters: dict[str, Any]


def quarantine_path(output: Path) -> Path:
    """`out.jsonl` -> `out.errors.jsonl`"""
    return output.with_name(f"{output.stem}.errors{output.suffix}")


def journal_path(output: Path) -> Path:
    """`out.jsonl` -> `out.jsonl.journal`"""
    return output.with_name(output.name + ".journal")


class Journal:
    """Owns a job's files from opening to `close`. Every method raises JobError when a disk fails.

    Raises JobError on opening when the output cannot be written, another job writes it, it was
    not made by a job, or its job had another model, input or parameters. New files get `mode`.
    """

    def __init__(self, output: Path, identity: JobIdentity, *, mode: int = 0o644) -> None:
        self.output = output
        self.quarantine = quarantine_path(output)
        self._keys = array("Q")  # by row number; 0 is not finished
        self._counts = [0, 0]
        self._dirty = False
        self._files: list[AppendFile] = []
        if not output.parent.is_dir():
            raise JobError(f"--output {output}: the folder {output.parent} does not exist; make it")
        self._log = AppendFile(journal_path(output), mode)
        try:
            self._log.open()
            self._lock()
            self._files = [AppendFile(output, mode), AppendFile(self.quarantine, mode)]
            self._files[_OUTPUT].open()
            if self._files[_QUARANTINE].path.exists():
                self._files[_QUARANTINE].open()
            self.created = self._resume(identity)
        except BaseException:
            self.close()
            raise

    @property
    def num_answered(self) -> int:
        return self._counts[_OUTPUT]

    @property
    def num_quarantined(self) -> int:
        return self._counts[_QUARANTINE]

    def key_of(self, number: int) -> int | None:
        """The key of a finished row, QUARANTINED for a quarantined one, None for any other."""
        return (self._keys[number] or None) if number < len(self._keys) else None

    def answer(self, number: int, key: int, line: bytes) -> None:
        """Finish row `number` with its output line, which ends in a newline."""
        assert key > QUARANTINED
        self._finish(number, key, _OUTPUT, line)

    def refuse(self, number: int, line: bytes) -> None:
        """Finish row `number` with its line in the quarantine."""
        self._finish(number, QUARANTINED, _QUARANTINE, line)

    def sync(self) -> None:
        """Make everything finished so far survive a power cut."""
        if not self._dirty:
            return
        for file in self._files:
            file.sync()
        self._log.append(frame([]))
        self._log.sync()
        self._dirty = False

    def close(self) -> None:
        for file in (*self._files, self._log):
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, number: int, key: int, index: int, line: bytes) -> None:
        assert self.key_of(number) is None, f"row {number} finished twice"
        assert line.endswith(b"\n")
        self._dirty = True
        offset = self._files[index].append(line)
        record = [number, key, index, offset, len(line), zlib.crc32(line)]
        self._log.append(frame(record))
        self._note(number, key, index)

    def _note(self, number: int, key: int, index: int) -> None:
        if number >= len(self._keys):
            size = max(number + 1, 2 * len(self._keys))
            self._keys.frombytes(bytes(8 * (size - len(self._keys))))
        self._keys[number] = key
        self._counts[index] += 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._log.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobError(
                f"another job is writing {self.output}: wait for it or choose another --output"
            ) from error
        except OSError as error:
            raise JobError(f"cannot lock {self._log.path}: {error.strerror}") from error

    def _resume(self, identity: JobIdentity) -> int:
        """Replay what is there, cut off what is not finished, return when the job began."""
        frames = self._log.frames()
        first = next(frames, None)
        if first is None:
            return self._begin(identity)
        header = first[0]
        self._compare(header, identity)
        log_end, ends = self._replay(frames, first[1])
        for file, end in zip(self._files, ends, strict=True):
            if file.size < end:
                raise JobError(
                    f"{file.path} has {file.size} bytes where the job wrote {end}: it was changed "
                    f"or deleted. Restore it, or delete {self._log.path} too to start over"
                )
            file.cut(end)
        self._log.cut(log_end)
        self._dirty = True
        self.sync()
        return int(header["created"])

    def _begin(self, identity: JobIdentity) -> int:
        foreign = [str(file.path) for file in self._files if file.size]
        if foreign:
            if self._log.size == 0:
                self._log.path.unlink()
            raise JobError(
                f"{' and '.join(foreign)} has content, and {self._log.path} is no readable journal "
                "of it: this is not an unfinished job. Choose another --output, or delete it"
            )
        created = int(time.time())
        self._log.cut(0)
        self._log.append(frame({"headrace_job": VERSION, "created": created, **asdict(identity)}))
        self._log.sync()
        return created

    def _compare(self, header: Any, identity: JobIdentity) -> None:
        if not isinstance(header, dict) or header.get("headrace_job") != VERSION:
            raise JobError(
                f"{self._log.path} is not a job journal of version {VERSION}: finish the job with "
                "the release that began it, or choose another --output"
            )
        old, new = header["parameters"], json.loads(json.dumps(identity.parameters))
        changed = [
            f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        if header["model"] != identity.model:
            changed.append(f"the model was {header['model']} and is {identity.model}")
        if header["input"] != identity.input:
            changed.append(f"the input's digest was {header['input']} and is {identity.input}")
        if changed:
            raise JobError(
                f"{self.output} belongs to another job: {'; '.join(changed)}. Repeat the command "
                "that began it, or choose another --output"
            )

    def _replay(
        self, frames: Iterator[tuple[Any, int]], log_end: int
    ) -> tuple[int, tuple[int, int]]:
        """Note every finished row; return where the journal and the files stop being valid."""
        ends = [0, 0]
        tail: list[tuple[Any, int]] = []
        for payload, end in frames:
            if payload:
                tail.append((payload, end))
                continue
            for (number, key, index, offset, length, _), _ in tail:
                self._note(number, key, index)
                ends[index] = offset + length
            tail.clear()
            log_end = end
        for (number, key, index, offset, length, crc), end in tail:
            if not self._files[index].holds(offset, length, crc):
                break
            self._note(number, key, index)
            ends[index] = offset + length
            log_end = end
        return log_end, (ends[0], ends[1])
