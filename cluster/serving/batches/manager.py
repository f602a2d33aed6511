"""Batches from their creation to their end, over restarts of the server."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from headrace.cluster.serving.batches.catalog import Query
from headrace.cluster.serving.batches.file_store import FileStore
from headrace.cluster.serving.batches.lane import BatchLane, EngineLostError
from headrace.cluster.serving.batches.records import (
    BATCH_BYTES,
    Batch,
    Fault,
    Status,
    StoredFile,
)
from headrace.cluster.serving.batches.requests import BatchRequest
from headrace.cluster.serving.batches.run import BatchRun
from headrace.cluster.serving.batches.turns import Turns
from headrace.cluster.serving.batches.validate import check_lines
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.reader import Model, Reader
from headrace.scheduler.errors import JobError

log = logging.getLogger(__name__)

T = TypeVar("T")
Result = tuple[StoredFile, Path]

WINDOW_SECONDS = 24 * 3600
MAX_RUNNING = 4
"""Batches whose lines are generated at once, of different tenants."""

MAX_OPEN = 100
"""Batches of one tenant that are unfinished."""

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
        await asyncio.gather(*self._tasks)
        self._threads.shutdown()

    async def on_disk(self, work: Callable[..., T], *arguments: object) -> T:
        """Do it on the thread that owns the catalog."""
        return await asyncio.get_running_loop().run_in_executor(self._store.disk, work, *arguments)

    async def create(self, owner: str, request: BatchRequest) -> Batch:
        """ApiError for a file that is not there, and when there are too many batches."""
        if self._stopping.is_set():
            raise ApiError(503, "the server is stopping", code="server_stopping")
        batch = await self.on_disk(self._admit, owner, request)
        self._take_up(batch)
        return batch

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

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """Lines that have not ended end with an error. ApiError for a batch that has ended."""
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

    def _admit(self, owner: str, request: BatchRequest) -> Batch:
        store = self._store
        file = store.find(owner, request.input_file_id)
        if file.purpose != "batch":
            raise ApiError(
                400,
                f"{file.id} was not uploaded for a batch",
                param="input_file_id",
                code="invalid_value",
            )
        if len(store.catalog.open_batches(owner)) >= MAX_OPEN:
            told = f"there are {MAX_OPEN} batches unfinished, as many as may be: try again later"
            raise ApiError(429, told, code="too_many_batches", retry_after=60)
        if not store.space.take(BATCH_BYTES):
            raise ApiError(413, "the server has no room for a batch", code="storage_full")
        wanted = request.output_expires_after
        batch = Batch(
            id=f"batch_{uuid4().hex}",
            owner=owner,
            digest=self._model.digest,
            model=self._model.name,
            endpoint=request.endpoint,
            input_file_id=file.id,
            metadata=request.metadata,
            created_at=store.now,
            expires_at=store.now + WINDOW_SECONDS,
            expires_after=store.limits.ttl if wanted is None else wanted.seconds,
        )
        store.catalog.put_batch(batch)
        return batch

    def _take_up(self, batch: Batch) -> None:
        run = BatchRun(batch, self._store, self._lane, self._reader)
        self._live[batch.id] = run
        if batch.status is Status.CANCELLING:
            run.end(Status.CANCELLED)
        self._spawn(self._live_through(run))

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
        path = store.path(batch.input_file_id)
        async with self._turn(self._checks, run) as is_given:
            if is_given:
                found = await self._in_thread(
                    check_lines, path, batch.endpoint, batch.model, self._max_line, run.has_stopped
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
        told = [asyncio.ensure_future(each.wait()) for each in (turn.given, run.ended)]
        try:
            await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
            yield turn.given.is_set() and not run.is_stopped
        finally:
            for each in told:
                each.cancel()
            turns.leave(turn)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
