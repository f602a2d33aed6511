"""One unfinished batch: what its threads do, and how they are told to stop."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import msgspec

from headrace.cluster.inputs import JsonlInput
from headrace.cluster.journal import JobIdentity, Journal
from headrace.cluster.row_loop import Finished, RowLoop
from headrace.cluster.rows import Draft, Kind
from headrace.cluster.serving.batches.file_store import FileStore
from headrace.cluster.serving.batches.lane import BatchLane, LaneRows
from headrace.cluster.serving.batches.lines import BatchLines, LineError, cancelled, expired
from headrace.cluster.serving.batches.records import Batch, Status, StoredFile
from headrace.cluster.serving.batches.space import BatchSpace
from headrace.cluster.serving.reader import Reader, Work

_OUTPUT = "out.jsonl"


class BatchRun:
    """Lives on the event loop; `generate`, `refuse_rest` and `results` are called on other threads, one at
    a time. `verdict` is how the batch is to end before all of its lines have."""

    def __init__(self, batch: Batch, store: FileStore, lane: BatchLane, reader: Reader) -> None:
        self.batch = batch
        self._store, self._lane, self._reader = store, lane, reader
        self._folder = store.folder(batch.id)
        self._completed, self._failed = batch.completed, batch.failed
        self._lock = threading.Lock()
        self._stops = 0
        self._loop: RowLoop[Work] | None = None
        self._rows: LaneRows | None = None
        self._ending: RowLoop[Work] | None = None
        self.verdict: Status | None = None
        self.ended = asyncio.Event()
        self.finished = asyncio.Event()
        self.space = BatchSpace(store.space)
        self.space.count(batch.reserve + _size(self._folder))

    @property
    def current(self) -> Batch:
        """The batch as it stands now."""
        counts = {"completed": self._completed, "failed": self._failed}
        return msgspec.structs.replace(self.batch, **counts)

    @property
    def is_complete(self) -> bool:
        """Whether every line has ended."""
        return 0 < self.batch.total == self._completed + self._failed

    @property
    def is_stopped(self) -> bool:
        """Whether no further line is to be started. Any thread may ask."""
        return self._stops > 0

    def has_stopped(self) -> bool:
        return self.is_stopped

    def end(self, verdict: Status) -> None:
        """Have it end now; the first verdict counts."""
        if self.verdict is None:
            self.verdict = verdict
            self.stop(now=True)

    def stop(self, *, now: bool) -> None:
        """Start no more lines, and give up those that run if it is to be `now`."""
        with self._lock:
            if self._ending is not None:
                self._ending.request_stop()
            while self._stops < 1 + now:
                self._stops += 1
                if self._loop is not None:
                    self._loop.request_stop()
            if self._rows is not None:
                self._rows.wake()
        self.ended.set()

    def generate(self, events: asyncio.AbstractEventLoop) -> None:
        """Return when every line has ended, or when it was stopped.

        Raises JobError and OSError when the disk fails, and EngineLostError.
        """
        lines = self._lines(None)
        source = JsonlInput(self._input)
        with self._journal(source) as journal:
            self._note(journal)
            rows = LaneRows(self._lane, events, lines.answer, journal.created)
            loop = RowLoop(self._input, source, journal, lines, rows)
            with self._lock:
                self._loop, self._rows = loop, rows
                for _ in range(self._stops):
                    loop.request_stop()
            try:
                loop.run(lambda: self._note(journal))
            finally:
                with self._lock:
                    self._loop = self._rows = None
                rows.give_up(all_rows=True)
                self._note(journal)

    def refuse_rest(self) -> None:
        """Have every line that has not ended end with the verdict, unless it is stopped again."""
        error = cancelled if self.verdict is Status.CANCELLED else expired
        source = JsonlInput(self._input)
        with self._journal(source) as journal:
            lines = self._lines(error)
            self._ending = loop = RowLoop(self._input, source, journal, lines, _Nothing())
            try:
                loop.run(lambda: None)
            finally:
                self._ending = None
                self._note(journal)

    def results(self) -> tuple[tuple[StoredFile, Path] | None, tuple[StoredFile, Path] | None]:
        """The files to be of its answers and of its errors; None for one that would be empty."""
        output = self._folder / _OUTPUT
        errors = output.with_name("out.errors.jsonl")
        return self._result(output, "output"), self._result(errors, "error")

    @property
    def _input(self) -> Path:
        return self._store.path(self.batch.input_file_id)

    def _lines(self, verdict: Callable[[], LineError] | None) -> BatchLines:
        batch = self.batch
        return BatchLines(
            Kind(batch.endpoint), batch.owner, batch.digest, self._reader, self.space, verdict
        )

    def _journal(self, source: JsonlInput) -> Journal:
        batch = self.batch
        self._folder.mkdir(0o700, exist_ok=True)
        identity = JobIdentity(batch.digest, source.digest, {"endpoint": batch.endpoint})
        return Journal(self._folder / _OUTPUT, identity, mode=0o600)

    def _note(self, journal: Journal) -> None:
        self._completed, self._failed = journal.num_answered, journal.num_quarantined

    def _result(self, path: Path, name: str) -> tuple[StoredFile, Path] | None:
        size = path.stat().st_size if path.exists() else 0
        if not size:
            return None
        now, batch = self._store.now, self.batch
        file = StoredFile(
            id=f"file-{uuid4().hex}",
            owner=batch.owner,
            filename=f"{batch.id}_{name}.jsonl",
            purpose="batch_output",
            bytes=size,
            created_at=now,
            expires_at=now + batch.expires_after,
        )
        return file, path


class _Nothing:
    """Generates nothing: of lines that all have a verdict, none comes here."""

    has_room, has_work = True, False

    def start(self, draft: Draft, row: Work) -> None:
        raise AssertionError(draft.number)

    def step(self) -> list[Finished]:
        return []

    def give_up(self, *, all_rows: bool) -> None:
        pass


def _size(folder: Path) -> int:
    """What is there of an earlier run, in bytes; nothing of a batch that has not begun."""
    if not folder.exists():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir())
