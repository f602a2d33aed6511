"""Rows on an engine that does nothing else."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from headrace.cluster.completion import Completion
from headrace.cluster.job_report import Stats
from headrace.cluster.progress import Progress
from headrace.cluster.row_loop import Finished
from headrace.cluster.rows import Draft, Row
from headrace.cluster.seeds import row_seed
from headrace.scheduler.errors import RequestError
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import FinishReason, SamplingParams


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
