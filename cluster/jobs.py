"""A batch job of `headrace generate`: its files, and rows that go through an engine of its own."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from headrace.cluster import answers
from headrace.cluster.completion import Completion
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.engine_rows import BatchEngine, EngineRows
from headrace.cluster.job_files import JobAdapters, JobFiles
from headrace.cluster.job_report import JobReport, RingWork, Work
from headrace.cluster.journal import Journal
from headrace.cluster.row_loop import RowLoop
from headrace.cluster.rows import Draft, Row, Tokenizer, decode, is_batch, prepare
from headrace.scheduler.errors import RequestError
from headrace.scheduler.request import SamplingParams

logger = logging.getLogger(__name__)


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
        stats = self._engine.stats
        began, before = self._clock(), Work.of(stats)
        ring_began, ring_before = began, before
        resumed = journal.num_answered + journal.num_quarantined
        logger.info("%s: %d of %d rows are finished already", journal.output, resumed, total)

        def report() -> JobReport:
            nonlocal ring_began, ring_before
            now, work = self._clock(), Work.of(stats)
            if work.moves != ring_before.moves:
                ring_began, ring_before = now, stats.ring_start
            is_another = work.moves != before.moves
            return JobReport(
                output=journal.output,
                quarantine=journal.quarantine,
                total=total,
                answered=journal.num_answered,
                quarantined=journal.num_quarantined,
                resumed=resumed,
                running=self._runner.num_started,
                stopping=self._loop.is_stopping,
                seconds=now - began,
                work=work.since(before),
                last_ring=(
                    RingWork(work.since(ring_before), now - ring_began) if is_another else None
                ),
            )

        return report
