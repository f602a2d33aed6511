"""A batch job of `headrace generate`: its files, and rows that go through an engine of its own."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from headrace.cluster import answers
from headrace.cluster.adapters import Adapters
from headrace.cluster.completion import Completion
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.inputs import Input, open_input
from headrace.cluster.job_report import JobReport, Stats, Work
from headrace.cluster.journal import JobIdentity, Journal
from headrace.cluster.progress import Progress, progress_path
from headrace.cluster.row_loop import Finished, RowLoop
from headrace.cluster.rows import Draft, Row, Tokenizer, decode, is_batch, prepare
from headrace.cluster.seeds import derive_seed
from headrace.scheduler.errors import JobError, RequestError
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import FinishReason, SamplingParams

logger = logging.getLogger(__name__)


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
        self,
        token_ids: list[int],
        params: SamplingParams,
        seed: int,
        *,
        keep: bool = False,
        adapter: str | None = None,
        said: Sequence[Sample] = (),
        on_token: Callable[[Sample], None] | None = None,
    ) -> int: ...

    def step(self) -> list[Completion]: ...

    def abort(self, request_id: int) -> None: ...

    def has_started(self, request_id: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class JobAdapters:
    """Adapters that a job's rows may name, and the one of rows that name none, if there is one."""

    named: Adapters = field(default_factory=Adapters)
    default: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What must not change between the runs of a job; nothing without adapters."""
        if not len(self.named):
            return {}
        return {"adapters": self.named.digests(), "default_adapter": self.default}

    @classmethod
    def of(cls, named: Adapters, default: str | None) -> Self:
        """JobError for a default that there is not."""
        if default is not None and default not in named:
            raise JobError(f"--default-adapter {default}: there is no --adapter {default}=DIR")
        return cls(named, default)


class JobFiles:
    """A job's input and journal, open and checked before anything expensive starts.

    Raises JobError as open_input and Journal do: the input cannot be read, the output cannot be
    written, another job writes it or it belongs to another job.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        model_digest: str,
        defaults: SamplingParams,
        adapters: "JobAdapters | None" = None,
    ) -> None:
        self.adapters = adapters or JobAdapters()
        self.path, self.model_digest, self.defaults = source, model_digest, defaults
        self.source: Input = open_input(source)
        if output.exists() and output.samefile(source):
            raise JobError(f"--output {output} is the --input: choose another --output")
        parameters = asdict(defaults) | self.adapters.parameters
        identity = JobIdentity(model_digest, self.source.digest, parameters)
        self.journal = journal = Journal(output, identity)
        try:
            self.progress = Progress(
                progress_path(output),
                {"created": journal.created, **asdict(identity)},
                lambda number: journal.key_of(number) is not None,
            )
        except BaseException:
            journal.close()
            raise

    def close(self) -> None:
        """Unlock and close. Safe to call twice."""
        journal = self.journal
        done = journal.num_answered + journal.num_quarantined
        self.progress.close(complete=done == self.source.total)
        journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JobRows:
    """Rows of either shape, as `headrace generate` takes them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        defaults: SamplingParams,
        digest: str,
        max_context: int,
        adapters: JobAdapters,
    ) -> None:
        self._encoder, self._defaults, self._max_context = Encoder(tokenizer), defaults, max_context
        self._adapters = adapters
        self._salt = digest.encode() + b"\n" + repr(defaults).encode()
        if adapters.parameters:
            self._salt += b"\n" + repr(adapters.parameters).encode()

    def decode(self, number: int, raw: bytes | Mapping[str, Any]) -> Draft:
        return decode(number, raw, self._salt)

    def prepare(self, draft: Draft) -> Row:
        adapters = self._adapters
        row = prepare(draft, self._encoder, self._defaults, self._max_context, adapters.named)
        return replace(row, adapter=row.adapter or adapters.default)

    def refusal(
        self, number: int, raw: bytes | Mapping[str, Any], draft: Draft | None, error: RequestError
    ) -> bytes:
        batch = is_batch(raw) if draft is None else draft.batch
        row_id = None if draft is None else draft.id
        return answers.encode(answers.refusal(number, row_id, batch, str(error)))


@dataclass(slots=True)
class _Running:
    """A row whose n samples are being generated."""

    draft: Draft
    row: Row
    request_ids: list[int]
    done: dict[int, Completion]

    def samples(self) -> list[Completion] | None:
        """All samples in order, or None while one is missing."""
        if len(self.done) < len(self.request_ids):
            return None
        return [self.done[request_id] for request_id in self.request_ids]


class EngineRows:
    """Rows on an engine that does nothing else. `line` makes a row's line of its samples.

    Each sample's seed is derived from the model, the sample's index and the row's seed or, without
    one, the row's id (and `default_seed`, if there is one). Rows are started while fewer than
    `max_waiting` requests wait, and go on from what an earlier run's `progress` has of them.
    """

    def __init__(
        self,
        engine: BatchEngine,
        line: Callable[[Row, list[Completion]], bytes],
        default_seed: int | None,
        max_waiting: int,
        progress: Progress,
    ) -> None:
        self._engine, self._line, self._progress = engine, line, progress
        self._default_seed, self._max_waiting = default_seed, max_waiting
        self._running: dict[int, _Running] = {}

    @property
    def has_room(self) -> bool:
        return self._engine.num_waiting < self._max_waiting

    @property
    def has_work(self) -> bool:
        assert self._engine.has_work or not self._running
        return bool(self._running)

    @property
    def num_started(self) -> int:
        return len({running.row.number for running in self._started()})

    def start(self, draft: Draft, row: Row) -> None:
        running = _Running(draft, row, [], {})
        one = replace(row.params, n=1)
        try:
            for index in range(row.params.n):
                seed = row_seed(self._engine.model_digest, row, self._default_seed, index)
                part = draft.number, draft.key, index
                request_id = self._engine.add(
                    row.token_ids,
                    one,
                    seed,
                    keep=row.keep_context,
                    adapter=row.adapter,
                    said=self._progress.resumed(part),
                    on_token=partial(self._progress.note, part),
                )
                running.request_ids.append(request_id)
                self._running[request_id] = running
        except RequestError:
            self._abort(running.request_ids)
            raise

    def step(self) -> Iterator[Finished]:
        for completion in self._engine.step():
            done = self._collect(completion)
            if done is not None:
                self._progress.forget(done.draft.number)
                yield done
        self._progress.flush()

    def give_up(self, *, all_rows: bool) -> None:
        kept = set() if all_rows else {running.row.number for running in self._started()}
        self._abort([i for i, running in self._running.items() if running.row.number not in kept])

    def _collect(self, completion: Completion) -> Finished | None:
        running = self._running.pop(completion.request_id, None)
        if running is None:
            return None  # given up together with another sample of its row
        if completion.finish_reason == FinishReason.ABORT.value:
            self._abort(running.request_ids)
            error = RequestError(completion.error or "the engine gave the request up")
            return Finished(running.draft, error)
        running.done[completion.request_id] = completion
        samples = running.samples()
        if samples is None:
            return None
        return Finished(running.draft, self._line(running.row, samples))

    def _started(self) -> Iterator[_Running]:
        for request_id, running in self._running.items():
            if self._engine.has_started(request_id):
                yield running

    def _abort(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            if self._running.pop(request_id, None):
                self._engine.abort(request_id)


class Job:
    """One run of a batch job, from what earlier runs left to the end or to `request_stop`."""

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
        self._engine, self._files, self._clock = engine, files, clock
        journal, defaults = files.journal, files.defaults

        def line(row: Row, samples: list[Completion]) -> bytes:
            made = answers.answer(row, samples, tokenizer, model_name, journal.created)
            return answers.encode(made)

        rows = JobRows(tokenizer, defaults, engine.model_digest, engine.max_context, files.adapters)
        self._runner = EngineRows(engine, line, defaults.seed, max_waiting, files.progress)
        self._loop = RowLoop(files.path, files.source, journal, rows, self._runner, clock=clock)

    def request_stop(self) -> None:
        """Start no further rows and finish those that run; a second call gives those up, too.

        Safe in a signal handler and from other threads; takes effect between two passes.
        """
        self._loop.request_stop()

    def run(self, on_progress: Callable[[JobReport], None]) -> JobReport:
        """Work until every row is finished or a stop was requested, then close the files.

        `on_progress` is called after each pass. Raises JobError when the files fail, and what the
        engine raises; finished rows are safe in either case.
        """
        with self._files as files:
            report = self._reporter(files.journal, files.source.total)
            self._loop.run(lambda: on_progress(report()))
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
                running=self._runner.num_started,
                stopping=self._loop.is_stopping,
                seconds=self._clock() - began,
                work=Work.of(self._engine.stats).since(before),
            )

        return report


def row_seed(digest: str, row: Row, default_seed: int | None, index: int) -> int:
    """Of a row's sample `index`: by its own seed or, without one, by its id."""
    own: str | int | None = row.params.seed
    if own is None:
        own = own_identity(row.id, default_seed)
    return derive_seed(digest, own, index)


def own_identity(row_id: str | int, default_seed: int | None = None) -> str:
    """What a row's seeds are derived from where it has no seed."""
    return f"{default_seed} {row_id}"
