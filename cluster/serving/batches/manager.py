"""Batches from their creation to their end, over restarts of the server."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from headrace.cluster.serving.batches.catalog import Query
from headrace.cluster.serving.batches.file_store import FileStore, Upload
from headrace.cluster.serving.batches.intake import admit, admit_upload
from headrace.cluster.serving.batches.lane import BatchLane, EngineLostError
from headrace.cluster.serving.batches.records import Batch, Fault, Status, StoredFile
from headrace.cluster.serving.batches.requests import BatchOptions, BatchRequest
from headrace.cluster.serving.batches.results import Results
from headrace.cluster.serving.batches.run import BatchRun
from headrace.cluster.serving.batches.turns import Turns
from headrace.cluster.serving.batches.validate import check_lines
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.reader import Model, Reader
from headrace.scheduler.errors import JobError

log = logging.getLogger(__name__)

T = TypeVar("T")
Result = tuple[StoredFile, Path]

MAX_RUNNING = 4
"""Batches whose lines are generated at once, of different tenants."""

TICK_SECONDS = 5.0
RETRY_SECONDS = 60.0


class Batches:
    """Runs on one event loop, with threads for what waits for disks. `max_line` is in bytes."""

    def __init__(
        self,
        store: FileStore,
        lane: BatchLane,
        reader: Reader,
        model: Model,
        max_line: int,
        *,
        tick: float = TICK_SECONDS,
    ) -> None:
        self._store, self._lane, self._reader, self._model = store, lane, reader, model
        self._max_line, self._tick = max_line, tick
        self._live: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: set[asyncio.Task[Any]] = set()
        self._turns, self._checks = Turns(MAX_RUNNING), Turns(1)
        self._threads = ThreadPoolExecutor(MAX_RUNNING + 2, "headrace-batch")
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Go on with what a server before this one left unfinished."""
        for batch in await self.on_disk(self._store.catalog.open_batches):
            self._take_up(batch)
        self._spawn(self._ticking())

    def stop(self) -> None:
        """Start no more lines; those that run may finish."""
        self._stopping.set()
        self._lane.close()
        for run in self._live.values():
            run.stop(now=False)

    async def close(self) -> None:
        """Return when nothing runs; all that is unfinished goes on when a server starts again."""
        if not self._stopping.is_set():
            self.stop()
            for run in self._live.values():
                run.stop(now=True)
        await asyncio.gather(*self._asked, return_exceptions=True)
        await asyncio.gather(*self._tasks)
        self._threads.shutdown()

    async def on_disk(self, work: Callable[..., T], *arguments: object) -> T:
        """Do it on the thread that owns the catalog."""
        return await asyncio.get_running_loop().run_in_executor(self._store.disk, work, *arguments)

    async def create(self, owner: str, request: BatchRequest) -> Batch:
        """ApiError for a file that is not there, and when there are too many batches."""
        return await self._whole(self._create(admit, owner, request.input_file_id, request))

    def upload(self) -> Upload:
        """For `submit`; who asks closes it."""
        return self._store.upload()

    async def submit(self, owner: str, upload: Upload, options: BatchOptions) -> Batch:
        """Have an upload that is complete be the input of a batch. ApiError as for `create`."""
        return await self._whole(self._create(admit_upload, owner, upload, options))

    async def find(self, owner: str, batch_id: str) -> Batch:
        """ApiError 404 for a batch that is not there or another one's."""
        if (run := self._live.get(batch_id)) is not None and run.batch.owner == owner:
            return run.current
        batch = await self.on_disk(self._store.catalog.batch, batch_id)
        if batch is None or batch.owner != owner:
            told = f"there is no batch {batch_id[:80]!r}"
            raise ApiError(404, told, param="id", code="not_found")
        return batch

    async def listed(self, owner: str, query: Query) -> list[Batch]:
        found = await self.on_disk(self._store.catalog.batches, owner, query)
        return [self._live[each.id].current if each.id in self._live else each for each in found]

    async def ended(self, owner: str, batch_id: str, *, wait: bool) -> Batch:
        """A batch that has ended. ApiError 412 for one that has not, or 503 when it has not and the server
        stops."""
        batch = await self.find(owner, batch_id)
        if wait and (run := self._live.get(batch_id)) is not None:
            await _first_of(run.finished, self._stopping)
            batch = run.batch
        if batch.status.has_ended:
            return batch
        told = f"the batch is {batch.status.value}: there are results when it has ended"
        if wait:
            raise ApiError(503, f"{told}, and the server is stopping", code="server_stopping")
        raise ApiError(412, told, code="batch_not_ended")

    async def results(self, batch: Batch, offset: int) -> Results:
        """Of one that has ended; who asks closes them. ApiError for an offset where no line begins, and when they
        are no longer kept."""
        return await self.on_disk(Results, self._store, batch, offset)

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """Lines that have not ended end with an error. ApiError for a batch that has ended."""
        return await self._whole(self._cancel(owner, batch_id))

    async def _create(self, into_catalog: Callable[..., Batch], *arguments: object) -> Batch:
        if self._stopping.is_set():
            raise ApiError(503, "the server is stopping", code="server_stopping")
        batch = await self.on_disk(into_catalog, self._store, self._model, *arguments)
        self._take_up(batch)
        return batch

    async def _cancel(self, owner: str, batch_id: str) -> Batch:
        batch = await self.find(owner, batch_id)
        run = self._live.get(batch_id)
        if run is None or run.batch.status is Status.FINALIZING:
            told = f"the batch is {batch.status.value}: it cannot be cancelled"
            raise ApiError(400, told, code="batch_ended")
        if run.batch.status is Status.VALIDATING:
            run.end(Status.CANCELLED)
            await run.finished.wait()  # else a crash now would have it go on
            return run.batch
        if run.batch.status is Status.IN_PROGRESS:
            await self._go_on(run, Status.CANCELLING)
        run.end(Status.CANCELLED)
        return run.current

    def _take_up(self, batch: Batch) -> None:
        run = BatchRun(batch, self._store, self._lane, self._reader)
        self._live[batch.id] = run
        if batch.status is Status.CANCELLING:
            run.end(Status.CANCELLED)
        if self._stopping.is_set():  # while it was written to the catalog
            run.stop(now=False)
        self._spawn(self._live_through(run))

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Do all of it, whether or not who asked is still there."""
        task = asyncio.ensure_future(work)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return await asyncio.shield(task)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ticking(self) -> None:
        """Until the server stops: end what is over its time."""
        while not self._stopping.is_set():
            now = self._store.now
            for run in self._live.values():
                if run.batch.expires_at <= now:
                    run.end(Status.EXPIRED)
            await self.on_disk(self._store.expire)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._tick)

    async def _live_through(self, run: BatchRun) -> None:
        try:
            if run.batch.status is Status.VALIDATING:
                await self._validate(run)
            while run.batch.status is Status.IN_PROGRESS and not (
                run.is_complete or run.is_stopped
            ):
                await self._persist(run, self._generate(run))
            if run.batch.status is Status.CANCELLING:
                await run.ended.wait()  # until that is on the disk
            while self._can_end(run):
                await self._persist(run, self._finalize(run))
        except Exception:
            log.exception("%s stands still until the server is started again", run.batch.id)
        finally:
            if not run.batch.status.has_ended:
                with suppress(sqlite3.Error):
                    await self.on_disk(self._store.catalog.put_batch, run.current)
            del self._live[run.batch.id]
            run.finished.set()

    def _can_end(self, run: BatchRun) -> bool:
        """A server that stops leaves lines without an end to the next one."""
        if run.batch.status.has_ended or run.batch.status is Status.VALIDATING:
            return False
        return not self._stopping.is_set() and (run.is_complete or run.verdict is not None)

    async def _persist(self, run: BatchRun, work: Awaitable[None]) -> None:
        """Do it; when a disk fails, wait a while, after which it is to be tried again."""
        try:
            await work
        except (JobError, OSError, sqlite3.Error) as error:
            log.error("%s goes on in %g s: %s", run.batch.id, RETRY_SECONDS, error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), RETRY_SECONDS)

    async def _validate(self, run: BatchRun) -> None:
        batch, store = run.batch, self._store
        path, models = store.path(batch.input_file_id), [batch.model, *self._reader.names]
        async with self._turn(self._checks, run) as is_given:
            if is_given:
                found = await self._in_thread(
                    check_lines, path, batch.endpoint, models, self._max_line, run.has_stopped
                )
        if run.verdict is not None:
            await self._end(run, run.verdict)
        elif run.is_stopped:
            return
        elif found.errors:
            await self._end(run, Status.FAILED, errors=found.errors)
        elif not run.space.reserve(found.reserve):
            told = f"the server has no room for the {found.total} lines of the batch's answers"
            faults = [Fault(code="storage_full", message=told)]
            await self._end(run, Status.FAILED, errors=faults)
        else:
            changes = {"total": found.total, "reserve": found.reserve}
            await self._go_on(run, Status.IN_PROGRESS, **changes)

    async def _generate(self, run: BatchRun) -> None:
        """Have lines generated until all are, or something else is to be done."""
        if run.batch.digest != self._model.digest:
            log.warning("%s waits until its model is served again", run.batch.id)
            await run.ended.wait()
            return
        async with self._turn(self._turns, run) as is_given:
            if is_given:
                try:
                    await self._in_thread(run.generate, asyncio.get_running_loop())
                except EngineLostError:
                    run.stop(now=True)

    async def _finalize(self, run: BatchRun) -> None:
        if run.verdict is not None and not run.is_complete:
            await self._in_thread(run.refuse_rest)
            if not run.is_complete:
                return
        if run.batch.status is Status.IN_PROGRESS:
            has_expired = run.verdict is Status.EXPIRED
            await self._go_on(run, Status.FINALIZING, has_expired=has_expired)
        ends = Status.EXPIRED if run.batch.has_expired else Status.COMPLETED
        if run.batch.status is Status.CANCELLING:
            ends = Status.CANCELLED
        await self._end(run, ends, *await self._in_thread(run.results))

    async def _end(
        self,
        run: BatchRun,
        status: Status,
        output: Result | None = None,
        errors_file: Result | None = None,
        **changes: Any,
    ) -> None:
        now = self._store.now
        ended = run.current.to(
            status,
            now,
            output_file_id=output and output[0].id,
            error_file_id=errors_file and errors_file[0].id,
            removed_at=now + self._store.limits.ttl,
            **changes,
        )
        results = [result for result in (output, errors_file) if result is not None]
        await self.on_disk(self._store.settle, ended, results)
        run.space.give_all()
        run.batch = ended

    async def _go_on(self, run: BatchRun, status: Status, **changes: Any) -> None:
        run.batch = run.current.to(status, self._store.now, **changes)
        await self.on_disk(self._store.catalog.put_batch, run.batch)

    @asynccontextmanager
    async def _turn(self, turns: Turns, run: BatchRun) -> AsyncIterator[bool]:
        """Wait for a turn, or for the run to be stopped; whether it may go on."""
        turn = turns.ask(run.batch.owner)
        try:
            await _first_of(turn.given, run.ended)
            yield turn.given.is_set() and not run.is_stopped
        finally:
            turns.leave(turn)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


async def _first_of(*events: asyncio.Event) -> None:
    """Wait for any of them."""
    told = [asyncio.ensure_future(each.wait()) for each in events]
    try:
        await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in told:
            each.cancel()
