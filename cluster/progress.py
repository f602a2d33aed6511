"""What rows of a batch job have said so far, so that a killed job need not say it again.

A token of a streamed model costs a pass over all of its weights, to compute a prompt one pass for all of
it. So a row that had started goes on from its prompt and the tokens that it had, as if they had been in the
prompt: what is drawn next is what would have been drawn.

The file lies beside the journal and is worth nothing without it. Frames as there: a header, then
`[row, key, sample, first, tokens]` of a row's tokens from the `first`-th on, with log-probabilities where
they were asked for. Whatever is torn, doubled or of another job is ignored: it costs tokens, never an answer.
It is written anew when most of it is of rows that have finished, and goes when the job is complete.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec

from headrace.cluster.append_file import AppendFile, explained, frame
from headrace.scheduler.plan import Sample

log = logging.getLogger(__name__)

VERSION = 1
FLUSH_SECONDS = 2.0
"""How much of what rows say a kill may cost."""

LEAST_BYTES = 4 << 20
"""A file of less is not worth writing anew."""

GARBAGE = 4
"""It is written anew when it has so many times the bytes that are needed."""

Part = tuple[int, int, int]
"""A sample of a row: the row's number, its key, and which of its samples."""

_Token = tuple[int, float | None, tuple[tuple[int, float], ...]]
_Frame = tuple[int, int, int, int, list[_Token]]

FRAME_TOKENS = 1000
"""With twenty log-probabilities each they have room in a frame."""


def progress_path(output: Path) -> Path:
    """`out.jsonl` -> `out.jsonl.progress`"""
    return output.with_name(output.name + ".progress")


class Progress:
    """Owns the file from opening to `close`. The caller has the journal's lock.

    `job` tells one job from another in the same place. Raises JobError when a disk fails.
    """

    def __init__(
        self,
        path: Path,
        job: Mapping[str, Any],
        is_finished: Callable[[int], bool] = lambda number: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is kept of rows that are finished, by number."""
        self._path, self._job, self._clock = path, dict(job), clock
        self._said: dict[Part, list[_Token]] = {}
        self._written: dict[Part, int] = {}  # tokens that the file has
        self._flushed = clock()
        self._file = AppendFile(path)
        self._file.open()
        try:
            self._read()
            for part in [part for part in self._said if is_finished(part[0])]:
                del self._said[part]
            self._rewrite()  # without what was torn, too
        except BaseException:
            self._file.close()
            raise

    def resumed(self, part: Part) -> list[Sample]:
        """What the sample is to go on from.

        All but its last token, which may have ended it: drawn again, it ends it again.
        """
        tokens = self._said.get(part, [])
        del tokens[-1:]
        self._written[part] = min(self._written.get(part, 0), len(tokens))
        return [Sample(-1, *token) for token in tokens]

    def note(self, part: Part, sample: Sample) -> None:
        """The sample's next token."""
        self._said.setdefault(part, []).append((sample.token, sample.logprob, sample.top))

    def forget(self, number: int) -> None:
        """The row has finished."""
        for part in [part for part in self._said if part[0] == number]:
            del self._said[part]
            self._written.pop(part, None)

    def flush(self) -> None:
        """Write what was noted, if it is time. It survives the process; a power cut may cost it."""
        now = self._clock()
        if now - self._flushed < FLUSH_SECONDS:
            return
        self._flushed = now
        frames = b"".join(frame(each) for part in self._said for each in self._new(part))
        if frames:
            self._file.append(frames)
            if self._file.size > LEAST_BYTES and self._file.size > GARBAGE * self._nbytes():
                self._rewrite()

    def close(self, *, complete: bool = False) -> None:
        """`complete`: no row is left that could go on."""
        self._file.close()
        if complete:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new(self, part: Part) -> Iterator[list[Any]]:
        """What the file has not yet of a sample, in payloads of frames."""
        said, written = self._said[part], self._written.get(part, 0)
        self._written[part] = len(said)
        for first in range(written, len(said), FRAME_TOKENS):
            yield [*part, first, said[first : first + FRAME_TOKENS]]

    def _nbytes(self) -> int:
        return sum(len(msgspec.msgpack.encode(said)) for said in self._said.values())

    def _read(self) -> None:
        frames = self._file.frames()
        first = next(frames, None)
        if first is None or first[0] != self._header():
            return
        for payload, _ in frames:
            try:
                found = msgspec.convert(payload, _Frame)
            except msgspec.ValidationError as error:
                log.warning("%s: %s: what follows is drawn again", self._path, error)
                return
            said = self._said.setdefault(found[:3], [])
            if found[3] <= len(said):  # else some of them are missing
                said[found[3] :] = found[4]

    def _rewrite(self) -> None:
        fresh = self._path.with_suffix(".progress-new")
        with explained(fresh, "delete"):
            fresh.unlink(missing_ok=True)
        file = AppendFile(fresh)
        file.append(frame(self._header()))
        self._written.clear()
        for part in self._said:
            for some in self._new(part):
                file.append(frame(some))
        with explained(self._path, "replace"):
            os.replace(fresh, self._path)
        self._file.close()
        self._file = file

    def _header(self) -> dict[str, Any]:
        return {"headrace_progress": VERSION, "job": self._job}
