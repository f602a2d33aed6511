"""Batches over restarts, full disks and the end of their time, on an engine that echoes."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from served import MODEL, EchoEngine

from headrace.cluster.rows import Kind
from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.batches.catalog import Query
from headrace.cluster.serving.batches.file_store import FileLimits, FileStore
from headrace.cluster.serving.batches.lane import BatchLane, LaneRows
from headrace.cluster.serving.batches.lines import BatchLines
from headrace.cluster.serving.batches.manager import Batches
from headrace.cluster.serving.batches.records import BATCH_BYTES, FILE_BYTES, Batch, Status
from headrace.cluster.serving.batches.requests import BatchRequest
from headrace.cluster.serving.batches.space import BatchSpace
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.generation import Order
from headrace.cluster.serving.metrics import Metrics
from headrace.cluster.serving.reader import Model, Reader
from headrace.scheduler.request import SamplingParams

DAY = 86400


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Place:
    """A store, and what serves batches of it."""

    def __init__(self, store: FileStore, engine: EchoEngine, window: int) -> None:
        model = Model(MODEL, engine.tokenizer, engine.model_digest, engine.max_context)
        self.store, self.engine = store, AsyncEngine(engine, Metrics(engine.events), max_waiting=8)
        self.lane = BatchLane(self.engine, model, window, {})
        reader = Reader(model, engine, 8)
        self.reader = reader
        self.batches = Batches(store, self.lane, reader, model, 1 << 20, tick=0.05)

    async def start(self, lines: list[Any], owner: str = "ann") -> Batch:
        upload = self.store.upload()
        upload.write(b"".join(json.dumps(each).encode() + b"\n" for each in lines))
        file = await self.batches.on_disk(upload.finish, owner, "in", "batch", DAY * 20)
        upload.close()
        wanted = BatchRequest(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        return await self.batches.create(owner, wanted)

    async def until(self, batch: Batch, *statuses: Status, completed: int = 0) -> Batch:
        async with asyncio.timeout(20.0):
            while True:
                found = await self.batches.find(batch.owner, batch.id)
                if found.status in statuses and found.completed >= completed:
                    return found
                assert not found.status.has_ended or found.status in statuses, found
                await asyncio.sleep(0.01)

    def lines(self, file_id: str | None) -> dict[str, Any]:
        if file_id is None:
            return {}
        rows = [json.loads(each) for each in self.store.path(file_id).read_text().splitlines()]
        made = {row["custom_id"]: row for row in rows}
        assert len(made) == len(rows)
        return made

    def codes(self, batch: Batch) -> dict[str, str]:
        found = self.lines(batch.error_file_id)
        return {name: row["error"]["code"] for name, row in found.items()}


@asynccontextmanager
async def place(
    directory: Path,
    engine: EchoEngine,
    clock: Clock | None = None,
    total: int = 1 << 20,
    window: int = 8,
) -> AsyncIterator[Place]:
    with FileStore(directory, FileLimits(total, 1 << 20, 30 * DAY), clock or Clock()) as store:
        made = Place(store, engine, window)
        made.engine.start()
        await made.batches.start()
        try:
            yield made
        finally:
            engine.gate.set()
            await made.batches.close()
            await made.engine.close()


def line(number: int, tokens: int = 3) -> dict[str, Any]:
    body = {"prompt": [5 + number % 50] * tokens, "max_tokens": 90}
    return {"custom_id": f"{number}", "method": "POST", "url": "/v1/completions", "body": body}


def asked_and_gone(work: Coroutine[Any, Any, Any]) -> None:
    """Have somebody ask for it who goes away at once."""
    asking = asyncio.ensure_future(work)
    asyncio.get_running_loop().call_soon(asking.cancel)


@pytest.fixture
def engine(tokenizer: Any) -> EchoEngine:
    return EchoEngine(tokenizer)


def test_a_batch_goes_on_where_it_was(tmp_path: Path, engine: EchoEngine) -> None:
    async def work() -> None:
        engine.pace = 0.002
        async with place(tmp_path / "files", engine) as at:
            batch = await at.start([line(i) for i in range(200)])
            before = await at.until(batch, Status.IN_PROGRESS, completed=20)
        assert before.completed < 200
        added = len(engine.tenants)
        assert added < 200
        assert set(engine.tenants) == {"ann"}
        async with place(tmp_path / "files", engine) as at:
            done = await at.until(batch, Status.COMPLETED)
            assert (done.completed, done.failed) == (200, 0)
            assert at.lines(done.output_file_id).keys() == {str(i) for i in range(200)}
            assert len(engine.tenants) <= 200 + 8
            assert at.store.space.used == BATCH_BYTES + sum(
                max(FILE_BYTES, path.stat().st_size)
                for path in (tmp_path / "files" / "files").iterdir()
            )
            assert not any((tmp_path / "files" / "batches").iterdir())

    asyncio.run(work())


def test_a_server_that_stops_lets_lines_finish(tmp_path: Path, engine: EchoEngine) -> None:
    async def work() -> None:
        engine.gate.clear()
        async with place(tmp_path / "files", engine) as at:
            batch = await at.start([line(i) for i in range(50)])
            await asyncio.to_thread(wait_for, lambda: engine.has_work, 10.0, lambda: "not begun")
            at.batches.stop()
            await asyncio.sleep(0.05)
            engine.gate.set()
            await at.batches.close()
            left = at.store.catalog.batch(batch.id)
            assert left is not None
            assert (left.status, left.completed) == (Status.IN_PROGRESS, len(engine.tenants))
            assert engine.aborted == []

    asyncio.run(work())


def test_what_is_not_done_in_a_day_expires(tmp_path: Path, engine: EchoEngine) -> None:
    async def work() -> None:
        clock = Clock()
        async with place(tmp_path / "files", engine, clock) as at:
            done = await at.until(await at.start([line(0)]), Status.COMPLETED)
            engine.gate.clear()
            batch = await at.start([line(i, 1 if i < 4 else 50) for i in range(40)])
            engine.pace = 0.005
            engine.gate.set()
            await at.until(batch, Status.IN_PROGRESS, completed=4)
            clock.now += DAY
            ended = await at.until(batch, Status.EXPIRED)
            assert ended.times["expired_at"] >= batch.expires_at
            assert ended.completed + ended.failed == 40
            answered, codes = at.lines(ended.output_file_id), at.codes(ended)
            assert answered.keys() | codes.keys() == {str(i) for i in range(40)}
            assert set(codes.values()) == {"batch_expired"}
            assert engine.aborted
            assert not engine.has_work
            clock.now += 30 * DAY
            await asyncio.sleep(0.2)
            for each in (done, ended):
                with pytest.raises(ApiError):
                    await at.batches.find("ann", each.id)
            assert at.store.space.used == 0

    asyncio.run(work())


def test_a_batch_of_another_model_waits_and_expires(tmp_path: Path, engine: EchoEngine) -> None:
    async def work() -> None:
        clock = Clock()
        engine.gate.clear()
        async with place(tmp_path / "files", engine, clock) as at:
            batch = await at.start([line(i) for i in range(20)])
            await at.until(batch, Status.IN_PROGRESS)
        engine.model_digest = "another"
        async with place(tmp_path / "files", engine, clock) as at:
            await asyncio.sleep(0.2)
            assert (await at.batches.find("ann", batch.id)).status is Status.IN_PROGRESS
            clock.now += 2 * DAY
            ended = await at.until(batch, Status.EXPIRED)
            assert ended.completed + ended.failed == 20

    asyncio.run(work())


def test_a_cancel_survives_the_server(tmp_path: Path, engine: EchoEngine) -> None:
    async def work() -> None:
        engine.gate.clear()
        async with place(tmp_path / "files", engine) as at:
            batch = await at.start([line(i) for i in range(20)])
            await at.until(batch, Status.IN_PROGRESS)
            assert (await at.batches.cancel("ann", batch.id)).status is Status.CANCELLING
            engine.gate.set()
        async with place(tmp_path / "files", engine) as at:
            ended = await at.until(batch, Status.CANCELLED)
            assert ended.completed + ended.failed == 20
            assert set(at.codes(ended).values()) <= {"batch_cancelled"}

    asyncio.run(work())


def test_a_full_disk_ends_every_line_all_the_same(tmp_path: Path, engine: EchoEngine) -> None:
    async def work() -> None:
        room = BATCH_BYTES + 90_000
        async with place(tmp_path / "files", engine, total=room) as at:
            ended = await at.until(
                await at.start([line(i, 40) for i in range(100)]), Status.COMPLETED
            )
            answered, codes = at.lines(ended.output_file_id), at.codes(ended)
            assert len(answered) == ended.completed > 0
            assert set(codes.values()) == {"storage_full"}
            assert answered.keys() | codes.keys() == {str(i) for i in range(100)}
            assert len(engine.tenants) < 100
            assert at.store.space.used <= room
            with pytest.raises(ApiError, match="no room for a batch"):
                await at.start([line(0)])

    asyncio.run(work())


def test_no_room_for_the_errors_of_all_lines(tmp_path: Path, engine: EchoEngine) -> None:
    async def work() -> None:
        async with place(tmp_path / "files", engine, total=BATCH_BYTES + 40_000) as at:
            failed = await at.until(await at.start([line(i, 40) for i in range(60)]), Status.FAILED)
            assert [fault.code for fault in failed.errors] == ["storage_full"]
            assert not engine.tenants

    asyncio.run(work())


def test_no_line_is_started_while_an_answer_is_to_be_written(
    tmp_path: Path, engine: EchoEngine
) -> None:
    async def work() -> None:
        async with place(tmp_path / "files", engine) as at:
            space = BatchSpace(at.store.space)
            lines = BatchLines(Kind.COMPLETION, "ann", "echo", at.reader, space)
            rows = LaneRows(at.lane, asyncio.get_running_loop(), lines.answer, 1)
            draft = lines.decode(1, json.dumps(line(1)).encode())
            assert rows.has_room
            rows.start(draft, lines.prepare(draft))
            await asyncio.to_thread(wait_for, lambda: not rows.has_room, 10.0, lambda: "no answer")
            (done,) = rows.step()
            assert isinstance(done.result, bytes)
            assert rows.has_room
            assert not rows.has_work

    asyncio.run(work())


def test_tenants_take_turns_and_clients_come_first(tmp_path: Path, engine: EchoEngine) -> None:
    async def work() -> None:
        engine.max_running, engine.pace = 4, 0.002
        async with place(tmp_path / "files", engine, window=3) as at:
            first = await at.start([line(i) for i in range(300)])
            second = await at.start([line(i) for i in range(10)])
            other = await at.start([line(i) for i in range(10)], owner="bob")
            await at.until(other, Status.COMPLETED)
            assert (await at.batches.find("ann", first.id)).completed < 300
            assert (await at.batches.find("ann", second.id)).completed == 0
            seen = 0
            for _ in range(20):
                seen = max(seen, at.engine.state.running + at.engine.state.waiting)
                order = Order([5, 6], SamplingParams(max_tokens=2), 1)
                with at.engine.running([order]) as generation:
                    assert len(engine._live) <= 4
                    while await generation.read():
                        pass
            assert seen <= 4
            await at.until(second, Status.COMPLETED)

    asyncio.run(work())


def test_nothing_is_left_half_done_for_who_goes_away(tmp_path: Path, engine: EchoEngine) -> None:
    async def go() -> None:
        async with place(tmp_path / "files", engine) as at:
            engine.gate.clear()
            first = await at.start([line(1)])
            await at.until(first, Status.IN_PROGRESS)
            wanted = BatchRequest(
                input_file_id=first.input_file_id,
                endpoint="/v1/completions",
                completion_window="24h",
            )
            asked_and_gone(at.batches.create("ann", wanted))
            asked_and_gone(at.batches.cancel("ann", first.id))
            await at.until(first, Status.CANCELLED)
            engine.gate.set()
            second, _ = await at.batches.listed("ann", Query(10))
            done = await at.until(second, Status.COMPLETED)
            assert (done.total, done.completed) == (1, 1)

    asyncio.run(go())
