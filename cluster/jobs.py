"""A batch job: rows stream from the input through the engine to the output, each exactly once.

Order: rows are started in input order and written as they finish. Two runs of one job write the
same set of rows; only their order may differ. A row that had started when the process died starts
again from its prompt and draws the same tokens, because its seed depends on its identity alone.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from headrace.cluster import answers
from headrace.cluster.completion import Completion
from headrace.cluster.id_set import IdSet
from headrace.cluster.inputs import Input, open_input
from headrace.cluster.job_report import JobReport, Stats, Work
from headrace.cluster.journal import QUARANTINED, JobIdentity, Journal
from headrace.cluster.rows import Draft, Row, Tokenizer, decode, is_batch, prepare
from headrace.cluster.seeds import derive_seed
from headrace.scheduler.errors import JobError, RequestError
from headrace.scheduler.request import FinishReason, SamplingParams

logger = logging.getLogger(__name__)

SYNC_SECONDS = 0.5


class BatchEngine(Protocol):
    """The part of the engine that a job drives. `add` raises RequestError for what it refuses."""

    @property
    def model_digest(self) -> str: ...

    @property
    def max_context(self) -> int: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def stats(self) -> Stats: ...

    def add(
        self, token_ids: list[int], params: SamplingParams, seed: int, *, keep: bool = False
    ) -> int: ...

    def step(self) -> list[Completion]: ...

    def abort(self, request_id: int) -> None: ...

    def has_started(self, request_id: int) -> bool: ...


@dataclass(slots=True)
class _Running:
    """A row whose n samples are being generated."""

    row: Row
    request_ids: list[int]
    done: dict[int, Completion]

    def samples(self) -> list[Completion] | None:
        """All samples in order, or None while one is missing."""
        if len(self.done) < len(self.request_ids):
            return None
        return [self.done[request_id] for request_id in self.request_ids]


class JobFiles:
    """A job's input and journal, open and checked before anything expensive starts.

    Raises JobError as open_input and Journal do: the input cannot be read, the output cannot be
    written, another job writes it or it belongs to another job.
    """

    def __init__(
        self, source: Path, output: Path, model_digest: str, defaults: SamplingParams
    ) -> None:
        self.path, self.model_digest, self.defaults = source, model_digest, defaults
        self.source: Input = open_input(source)
        if output.exists() and output.samefile(source):
            raise JobError(f"--output {output} is the --input: choose another --output")
        identity = JobIdentity(model_digest, self.source.digest, asdict(defaults))
        self.journal = Journal(output, identity)

    def close(self) -> None:
        """Unlock and close. Safe to call twice."""
        self.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Job:
    """One run of a batch job, from what earlier runs left to the end or to `request_stop`.

    Each sample's seed is derived from the model, the sample's index and the row's seed or, without
    one, the row's id (and `defaults.seed`, if there is one). Rows are admitted while fewer than
    `max_waiting` requests wait in the engine, so memory does not grow with the input, except for
    some 30 bytes a row that remember ids and finished rows.
    """

    def __init__(
        self,
        engine: BatchEngine,
        tokenizer: Tokenizer,
        files: JobFiles,
        *,
        model_name: str,
        max_waiting: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert engine.model_digest == files.model_digest
        self._engine, self._tokenizer, self._defaults = engine, tokenizer, files.defaults
        self._files, self._model_name = files, model_name
        self._max_waiting, self._clock = max_waiting, clock
        self._running: dict[int, _Running] = {}
        self._stops = 0

    def request_stop(self) -> None:
        """Start no further rows and finish those that run; a second call gives those up, too.

        Safe in a signal handler and from other threads; takes effect between two passes.
        """
        self._stops += 1

    def run(self, on_progress: Callable[[JobReport], None]) -> JobReport:
        """Work until every row is finished or a stop was requested, then close the files.

        `on_progress` is called after each pass. Raises JobError when the files fail, and what the
        engine raises; finished rows are safe in either case.
        """
        with self._files as files:
            source, journal = files.source, files.journal
            report = self._reporter(journal, source.total)
            rows = self._unfinished(journal, source)
            last_sync = self._clock()
            while self._fill(journal, rows):
                for completion in self._engine.step():
                    self._collect(journal, completion)
                if self._clock() - last_sync >= SYNC_SECONDS:
                    journal.sync()
                    last_sync = self._clock()
                on_progress(report())
            journal.sync()
            return report()

    def _reporter(self, journal: Journal, total: int) -> Callable[[], JobReport]:
        began, before = self._clock(), Work.of(self._engine.stats)
        resumed = journal.num_answered + journal.num_quarantined
        logger.info("%s: %d of %d rows are finished already", journal.output, resumed, total)

        def report() -> JobReport:
            return JobReport(
                output=journal.output,
                quarantine=journal.quarantine,
                total=total,
                answered=journal.num_answered,
                quarantined=journal.num_quarantined,
                resumed=resumed,
                running=len({running.row.number for running in self._started()}),
                stopping=self._stops > 0,
                seconds=self._clock() - began,
                work=Work.of(self._engine.stats).since(before),
            )

        return report

    def _fill(self, journal: Journal, rows: Iterator[Row]) -> bool:
        """Start rows until enough wait. False when there is nothing left to wait for."""
        while not self._stops and self._engine.num_waiting < self._max_waiting:
            row = next(rows, None)
            if row is None:
                break
            self._start(journal, row)
        if self._stops:
            self._give_up(all_rows=self._stops > 1)
        assert self._engine.has_work or not self._running
        return bool(self._running)

    def _started(self) -> Iterator[_Running]:
        for request_id, running in self._running.items():
            if self._engine.has_started(request_id):
                yield running

    def _give_up(self, *, all_rows: bool) -> None:
        """Drop rows that wait in the engine, or those that are being generated as well."""
        kept = set() if all_rows else {running.row.number for running in self._started()}
        self._abort([i for i, running in self._running.items() if running.row.number not in kept])

    def _start(self, journal: Journal, row: Row) -> None:
        running = _Running(row, [], {})
        one = replace(row.params, n=1)
        try:
            for index in range(row.params.n):
                seed = self._seed(row, index)
                request_id = self._engine.add(row.token_ids, one, seed, keep=row.keep_context)
                running.request_ids.append(request_id)
                self._running[request_id] = running
        except RequestError as error:
            self._abort(running.request_ids)
            self._refuse(journal, row.number, row.id, row.batch, str(error))

    def _collect(self, journal: Journal, completion: Completion) -> None:
        running = self._running.pop(completion.request_id, None)
        if running is None:
            return  # given up together with another sample of its row
        row = running.row
        if completion.finish_reason == FinishReason.ABORT.value:
            self._abort(running.request_ids)
            reason = completion.error or "the engine gave the request up"
            self._refuse(journal, row.number, row.id, row.batch, reason)
            return
        running.done[completion.request_id] = completion
        samples = running.samples()
        if samples is not None:
            line = answers.answer(row, samples, self._tokenizer, self._model_name, journal.created)
            journal.answer(row.number, row.key, answers.encode(line))

    def _abort(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            if self._running.pop(request_id, None):
                self._engine.abort(request_id)

    def _unfinished(self, journal: Journal, source: Input) -> Iterator[Row]:
        """Rows to run, in input order; rows that cannot run are quarantined on the way."""
        salt = self._engine.model_digest.encode() + b"\n" + repr(self._defaults).encode()
        ids = IdSet()
        for number, raw in source:
            if self._stops:
                return
            try:
                draft = decode(number, raw, salt)
            except RequestError as error:
                if journal.key_of(number) is None:
                    self._refuse(journal, number, None, is_batch(raw), str(error))
                continue
            row = self._check(journal, draft, is_new=ids.add(draft.id))
            if row is not None:
                yield row

    def _check(self, journal: Journal, draft: Draft, *, is_new: bool) -> Row | None:
        finished = journal.key_of(draft.number)
        if finished is not None:
            if finished not in (QUARANTINED, draft.key):
                raise JobError(
                    f"row {draft.number} (id {draft.id!r}) of {self._files.path} is not the one that "
                    f"{journal.output} answers: choose another --output"
                )
            return None
        try:
            if not is_new:
                raise RequestError(f"the id {draft.id!r} was used by an earlier row")
            return prepare(draft, self._tokenizer, self._defaults, self._engine.max_context)
        except RequestError as error:
            self._refuse(journal, draft.number, draft.id, draft.batch, str(error))
            return None

    def _refuse(
        self, journal: Journal, number: int, row_id: str | int | None, batch: bool, reason: str
    ) -> None:
        logger.debug("row %d is quarantined: %s", number, reason)
        line = answers.refusal(number, row_id, batch, reason)
        journal.refuse(number, answers.encode(line))

    def _seed(self, row: Row, index: int) -> int:
        own: str | int | None = row.params.seed
        if own is None:
            own = f"{self._defaults.seed} {row.id}"
        return derive_seed(self._engine.model_digest, own, index)
