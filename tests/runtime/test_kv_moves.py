"""Pages come back as they left, by whichever way; what cannot be had is lost, and nothing waits."""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from leftovers import our_threads
from slow_log import SlowLog

from headrace.runtime.kv.copies import StreamLink
from headrace.runtime.kv.host import HostPages
from headrace.runtime.kv.moves import Ended, PageMover
from headrace.runtime.kv.store import KVStore
from headrace.runtime.manifest import LayerShape
from headrace.runtime.streaming.loads import queued_work
from headrace.runtime.streaming.tiers import AlignedBuffer
from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.plan import MoveKind, PageMove

SHAPES = {
    3: LayerShape(2, 16, 16, 0, 0, 0),
    7: LayerShape(1, 32, 16, 0, 0, 0),
    8: LayerShape(3, 16, 32, 0, 0, 0),
}
PAGES, SLOTS = 40, 12
OUT, IN, SPILL, FETCH, _ = MoveKind
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Pages:
    """Pages of random bytes, host slots, a log, and a mover; moves are numbered from 1 on."""

    def __init__(self, device: str, fmt: str, folder: Path, slots: int = SLOTS) -> None:
        self.device = torch.device(device)
        dtype = torch.float32 if fmt == "fp32" else torch.bfloat16
        self.kv = KVStore(SHAPES, PAGES, dtype, self.device, FORMATS[fmt], num_tails=1)
        self.log = SlowLog(folder)
        page_bytes = {layer: self.kv.page_bytes(layer) for layer in self.kv.layers}
        self.host = HostPages(page_bytes, slots, self.device)
        self.mover = PageMover(self.kv, self.host, self.device, self.log)
        for layer in SHAPES:
            pages = self.kv.pages(layer)
            pages.copy_(torch.randint(0, 256, pages.shape, dtype=torch.uint8))
        self._number = 0

    @property
    def page_bytes(self) -> int:
        return sum(self.host.page_bytes)

    def move(self, kind: MoveKind, slot: int, page: int = -1, key: int = 0, cohort: int = 0) -> PageMove:  # fmt: skip
        self._number += 1
        return PageMove(self._number, kind, slot, page, bytes([key]), cohort)

    def read(self, page: int) -> list[torch.Tensor]:
        return [self.kv.pages(layer)[page].cpu().clone() for layer in SHAPES]

    def spoil(self, page: int) -> None:
        for layer in SHAPES:
            self.kv.pages(layer)[page].fill_(0xEE)

    def finish(self, *moves: PageMove) -> Ended:
        """Begin moves, and what ended when all have."""
        self.mover.begin(moves)
        assert self.mover.wait(60.0)
        return self.mover.take()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        yield "cpu"
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield request.param


@pytest.fixture
def pages(device: str, tmp_path: Path) -> Iterator[Pages]:
    made = Pages(device, "int8", tmp_path / "log")
    yield made
    made.log.going.set()
    made.mover.close()


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "int8", "int4"])
def test_pages_come_back_from_host_slots_to_other_pages(
    device: str, fmt: str, tmp_path: Path
) -> None:
    pages = Pages(device, fmt, tmp_path / "log")
    with pages.mover:
        before = {page: pages.read(page) for page in range(PAGES)}
        ended = pages.finish(*(pages.move(OUT, slot, 2 * slot) for slot in range(SLOTS)))
        assert ended.moved == tuple(range(1, SLOTS + 1)) and not ended.lost
        assert (ended.out_bytes, ended.in_bytes) == (SLOTS * pages.page_bytes, 0)
        for slot in range(SLOTS):
            pages.spoil(2 * slot)
        ended = pages.finish(*(pages.move(IN, slot, 39 - slot) for slot in range(SLOTS)))
        assert (ended.out_bytes, ended.in_bytes) == (0, SLOTS * pages.page_bytes)
        for slot in range(SLOTS):
            for found, wanted in zip(pages.read(39 - slot), before[2 * slot], strict=True):
                assert torch.equal(found, wanted)
        for page in range(1, 2 * SLOTS, 2):  # pages between them stay as they are
            for found, wanted in zip(pages.read(page), before[page], strict=True):
                assert torch.equal(found, wanted)


def test_pages_come_back_from_a_log(pages: Pages) -> None:
    wanted = pages.read(5)
    pages.finish(pages.move(OUT, 3, 5))
    ended = pages.finish(pages.move(SPILL, 3, key=9))
    assert len(ended.moved) == 1 and ended[1:] == ((), 0, 0)
    pages.finish(pages.move(OUT, 3, 6))
    pages.finish(pages.move(FETCH, 8, key=9))
    pages.finish(pages.move(IN, 8, 0))
    for found, one in zip(pages.read(0), wanted, strict=True):
        assert torch.equal(found, one)


def test_spills_of_a_cohort_are_put_together(pages: Pages) -> None:
    cohorts = [1, 1, 1, 2, 2, 1]
    spills = [pages.move(SPILL, i, key=i, cohort=cohort) for i, cohort in enumerate(cohorts)]
    pages.log.going.clear()
    pages.mover.begin(spills)
    pages.log.going.set()
    assert pages.mover.wait(60.0) and len(pages.mover.take().moved) == len(cohorts)
    assert sorted(pages.log.cohorts) == [(1, 4), (2, 2)]


def test_slots_are_aligned_for_direct_writes(pages: Pages) -> None:
    assert pages.host.slot_bytes % 4096 == 0
    assert 0 <= pages.host.slot_bytes - pages.page_bytes < 4096
    for slot in range(SLOTS):
        assert pages.host.slot(slot).data_ptr() % 4096 == 0


def test_what_a_log_has_not_is_lost(pages: Pages) -> None:
    kept, missing = pages.move(SPILL, 0, key=1), pages.move(FETCH, 1, key=2)
    ended = pages.finish(kept, missing)
    assert (ended.moved, ended.lost) == ((kept.number,), (missing.number,))


def test_what_a_log_has_no_room_for_is_lost(device: str, tmp_path: Path) -> None:
    pages = Pages(device, "int8", tmp_path / "log")
    pages.log._room = 2
    with pages.mover:
        ended = pages.finish(*(pages.move(SPILL, slot, key=slot) for slot in range(4)))
        assert (ended.moved, ended.lost) == ((1, 2), (3, 4))


def test_a_log_that_fails_loses_pages_and_says_why(
    pages: Pages, caplog: pytest.LogCaptureFixture
) -> None:
    pages.log.broken = True
    moves = [pages.move(SPILL, 0, key=1), pages.move(FETCH, 1, key=1), pages.move(OUT, 2, 2)]
    ended = pages.finish(*moves)
    assert (ended.moved, sorted(ended.lost)) == ((3,), [1, 2])
    assert caplog.text.count("the drive is gone") == 2


def test_a_copy_that_fails_loses_the_pages_that_have_not_arrived(
    pages: Pages, caplog: pytest.LogCaptureFixture
) -> None:
    moves = [pages.move(OUT, 0, 0), pages.move(OUT, 1, PAGES), pages.move(OUT, 2, 2)]
    ended = pages.finish(*moves)
    assert (ended.moved, sorted(ended.lost)) == ((1,), [2, 3])
    assert "moving KV pages (out)" in caplog.text
    wanted = pages.read(4)
    assert pages.finish(pages.move(OUT, 2, 4), pages.move(IN, 1, 1)).lost == ()
    pages.finish(pages.move(IN, 2, 7))
    assert all(map(torch.equal, pages.read(7), wanted))


def test_without_a_log_nothing_goes_there(device: str) -> None:
    dev = torch.device(device)
    kv = KVStore(SHAPES, 2, torch.float32, dev)
    host = HostPages({layer: kv.page_bytes(layer) for layer in kv.layers}, 1, dev)
    with PageMover(kv, host, dev) as mover, pytest.raises(AssertionError, match="no log"):
        mover.begin([PageMove(1, SPILL, 0, -1, b"", 0)])


def test_other_moves_pass_those_that_wait_for_a_log(pages: Pages) -> None:
    pages.log.going.clear()
    slow = pages.move(FETCH, 0, key=1)
    pages.mover.begin([slow])
    assert pages.log.begun.acquire(timeout=60.0)
    pages.mover.begin([pages.move(OUT, 1, 1)])
    deadline = time.monotonic() + 60.0
    while not (ended := pages.mover.take()).moved:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert ended.moved == (2,)
    assert not pages.mover.wait(0.02)
    pages.log.going.set()
    assert pages.mover.wait(60.0) and pages.mover.take().lost == (slow.number,)


def test_close_ends_what_is_under_way_and_whoever_waits(device: str, tmp_path: Path) -> None:
    before = our_threads()
    pages = Pages(device, "int8", tmp_path / "log")
    pages.log.going.clear()
    pages.mover.begin([pages.move(SPILL, slot, key=slot, cohort=slot) for slot in range(SLOTS)])
    pages.mover.begin([pages.move(OUT, slot % SLOTS, slot % PAGES) for slot in range(2000)])
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(pages.mover.wait(60.0)))
    waiting.start()
    threading.Timer(0.1, pages.log.going.set).start()
    pages.mover.close()
    pages.mover.close()
    waiting.join()
    assert answers == [False]
    deadline = time.monotonic() + 10.0
    while our_threads() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert our_threads() == before


def test_memory_that_is_not_there_names_the_option() -> None:
    with pytest.raises(DoesNotFitError, match="--kv-host-memory"):
        HostPages({0: 1 << 50}, 1 << 12, torch.device("cpu"))


@pytest.mark.gpu
def test_slots_are_pinned_in_parts_and_waited_for() -> None:
    page_bytes = {0: 5000, 1: 3000}
    with HostPages(page_bytes, SLOTS, torch.device("cuda"), pin_bytes=3 * 8192) as host:
        assert host.slot(SLOTS - 1).is_pinned()
        host.wait()
        host.check()
        assert all(host.slot(slot).is_pinned() for slot in range(SLOTS))
        assert [len(part) for part in host.layers(4)] == [5000, 3000]
    assert not host.slot(0).is_pinned()


@pytest.mark.gpu
def test_a_page_that_leaves_holds_what_is_still_being_computed(tmp_path: Path) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        pages = Pages("cuda", "bf16", tmp_path / "log")
        with pages.mover:
            pages.mover.wait_host()
            torch.cuda._sleep(50_000_000)
            pages.spoil(3)
            pages.mover.begin([pages.move(OUT, 0, 3)])
            assert pages.mover.take().moved == ()  # it waits for the device, and we do not
            assert pages.mover.wait(60.0)
            pages.finish(pages.move(IN, 0, 5))
            assert all((layer == 0xEE).all() for layer in pages.read(5))


@pytest.mark.gpu
def test_what_is_larger_than_a_piece_arrives_whole() -> None:
    device = torch.device("cuda")
    link = StreamLink(device)
    with AlignedBuffer(60 << 20, pinned=True) as buffer:
        host = buffer.tensor.random_(0, 256)
        there = torch.zeros(60 << 20, dtype=torch.uint8, device=device)
        sizes = [30 << 20, 1000, (4 << 20) - 1000, 4 << 20, (22 << 20)]
        pairs = list(zip(there.split(sizes), host.split(sizes), strict=True))
        arrived: list[int] = []
        link.follow(queued_work(device))
        link.copy(pairs[:3], nullcontext(), lambda: arrived.append(0))
        link.copy(pairs[3:], nullcontext(), lambda: arrived.append(1))
        link.drain()
        assert arrived == [0, 1]
        assert torch.equal(there.cpu(), host)
