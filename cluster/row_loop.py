"""Rows of an input through whatever generates, each to exactly one line of the output or of the errors.

Order: rows are started in input order and written as they finish. Two runs over one input write the
same set of lines; only their order may differ. A row that had started when the process died starts
again from its prompt and draws the same tokens, because its seed depends on its identity alone.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from headrace.cluster.id_set import IdSet
from headrace.cluster.inputs import Input
from headrace.cluster.journal import QUARANTINED, Journal
from headrace.cluster.rows import Draft
from headrace.scheduler.errors import JobError, RequestError

logger = logging.getLogger(__name__)

SYNC_SECONDS = 0.5

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
R_contra = TypeVar("R_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Finished:
    """A row and its line for the output, which ends in a newline, or why it has none."""

    draft: Draft
    result: bytes | RequestError


class RowReader(Protocol[R_co]):
    """What rows look like. `decode` and `prepare` raise RequestError for what is wrong with one row."""

    def decode(self, number: int, raw: bytes | Mapping[str, Any]) -> Draft: ...

    def prepare(self, draft: Draft) -> R_co: ...

    def refusal(
        self, number: int, raw: bytes | Mapping[str, Any], draft: Draft | None, error: RequestError
    ) -> bytes:
        """The line of a row that cannot run; `draft` is None if not even its id was found."""
        ...


class RowRunner(Protocol[R_contra]):
    """What generates rows. One thread calls it."""

    @property
    def has_room(self) -> bool:
        """Whether another row should be started."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` will bring anything."""
        ...

    def start(self, draft: Draft, row: R_contra) -> None:
        """RequestError when the row is refused."""
        ...

    def step(self) -> Iterable[Finished]:
        """Go on for a while; what has finished meanwhile, maybe nothing."""
        ...

    def give_up(self, *, all_rows: bool) -> None:
        """Drop rows that wait, or those that are being generated as well; `step` brings none of them."""
        ...


class RowLoop(Generic[R]):
    """Takes what is unfinished in a journal from its source through a runner.

    Rows are started while the runner has room, so that memory does not grow with the input, except for
    some 30 bytes a row that remember ids and finished rows. `path` is the input's, for messages.
    """

    def __init__(
        self,
        path: Path,
        source: Input,
        journal: Journal,
        reader: RowReader[R],
        runner: RowRunner[R],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._source, self._journal = path, source, journal
        self._reader, self._runner, self._clock = reader, runner, clock
        self._stops = 0

    @property
    def is_stopping(self) -> bool:
        return self._stops > 0

    def request_stop(self) -> None:
        """Start no further rows and finish those that run; a second call gives those up, too.

        Safe in a signal handler and from other threads; takes effect between two steps.
        """
        self._stops += 1

    def run(self, on_step: Callable[[], None]) -> None:
        """Work until every row is finished or a stop was requested; `on_step` is called after each step.

        Raises JobError when the files fail, and what the runner raises; finished rows are safe in
        either case.
        """
        rows = self._unfinished()
        last_sync = self._clock()
        while self._fill(rows):
            for done in self._runner.step():
                self._finish(done)
            if self._clock() - last_sync >= SYNC_SECONDS:
                self._journal.sync()
                last_sync = self._clock()
            on_step()
        self._journal.sync()

    def _fill(self, rows: Iterator[tuple[Draft, R]]) -> bool:
        """Start rows until enough wait. False when there is nothing left to wait for."""
        while not self._stops and self._runner.has_room:
            found = next(rows, None)
            if found is None:
                break
            draft, row = found
            try:
                self._runner.start(draft, row)
            except RequestError as error:
                self._refuse(draft.number, draft.data, draft, error)
        if self._stops:
            self._runner.give_up(all_rows=self._stops > 1)
        return self._runner.has_work

    def _finish(self, done: Finished) -> None:
        draft, result = done.draft, done.result
        if isinstance(result, RequestError):
            self._refuse(draft.number, draft.data, draft, result)
        else:
            self._journal.answer(draft.number, draft.key, result)

    def _unfinished(self) -> Iterator[tuple[Draft, R]]:
        """Rows to run, in input order; rows that cannot run are quarantined on the way."""
        ids = IdSet()
        for number, raw in self._source:
            if self._stops:
                return
            try:
                draft = self._reader.decode(number, raw)
            except RequestError as error:
                if self._journal.key_of(number) is None:
                    self._refuse(number, raw, None, error)
                continue
            row = self._check(draft, is_new=ids.add(draft.id))
            if row is not None:
                yield draft, row

    def _check(self, draft: Draft, *, is_new: bool) -> R | None:
        finished = self._journal.key_of(draft.number)
        if finished is not None:
            if finished not in (QUARANTINED, draft.key):
                raise JobError(
                    f"row {draft.number} (id {draft.id!r}) of {self._path} is not the one that "
                    f"{self._journal.output} answers: choose another --output"
                )
            return None
        try:
            if not is_new:
                raise RequestError(f"the id {draft.id!r} was used by an earlier row")
            return self._reader.prepare(draft)
        except RequestError as error:
            self._refuse(draft.number, draft.data, draft, error)
            return None

    def _refuse(
        self,
        number: int,
        raw: bytes | Mapping[str, Any],
        draft: Draft | None,
        error: RequestError,
    ) -> None:
        logger.debug("row %d is quarantined: %s", number, error)
        self._journal.refuse(number, self._reader.refusal(number, raw, draft, error))
