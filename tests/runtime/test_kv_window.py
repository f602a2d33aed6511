"""Slots on NVMe give what was written last, or say that they cannot."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kv_logs import on_drive, run

from headrace.runtime.kv.window import NamelessFile, PageWindow, open_unlinked
from headrace.runtime.kv_log.record import BLOCK
from headrace.scheduler.errors import DoesNotFitError, KVLogError

SIZES = {3: 5000, 7: 8192, 8: 64}
SLOTS = 6
NBYTES = SLOTS * (8192 + 8192 + 4096)


class Memory:
    """Blocks in memory, and what was asked of them."""

    def __init__(self, nbytes: int = NBYTES) -> None:
        self.data = bytearray(nbytes)
        self.reads: list[tuple[int, int]] = []
        self.fails: set[int] = set()  # blocks that no read may touch

    def write(self, offset: int, data: memoryview) -> None:
        assert offset % BLOCK == len(data) % BLOCK == 0 and offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data

    def read(self, offset: int, memory: memoryview) -> int:
        self.reads.append((offset, len(memory)))
        touched = range(offset // BLOCK, (offset + len(memory)) // BLOCK)
        if self.fails & set(touched):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        memory[:] = self.data[offset : offset + len(memory)]
        return len(memory)

    def close(self) -> None:
        pass


def page(seed: int) -> dict[int, bytes]:
    generator = np.random.default_rng(seed)
    return {layer: generator.bytes(nbytes) for layer, nbytes in SIZES.items()}


def put(window: PageWindow, slot: int, seed: int) -> None:
    assert window.write(slot, [memoryview(part) for part in page(seed).values()])


def got(window: PageWindow, layer: int, first: int, count: int) -> list[bytes | None]:
    dest = np.zeros((count, SIZES[layer]), np.uint8)
    lost = window.read(layer, first, dest)
    return [None if row in lost else dest[row].tobytes() for row in range(count)]


@pytest.fixture(params=["encrypted", "clear"])
def window(request: pytest.FixtureRequest) -> Iterator[PageWindow]:
    with PageWindow(SIZES, SLOTS, Memory(), encrypted=request.param == "encrypted") as made:
        yield made


def blocks(window: PageWindow) -> Memory:
    assert isinstance(window._blocks, Memory)
    return window._blocks


def test_what_was_written_last_is_read(window: PageWindow) -> None:
    for slot in range(SLOTS - 1):
        put(window, slot, slot)
    put(window, 2, 22)
    want = [0, 1, 22, 3, 4]
    for layer in SIZES:
        found = got(window, layer, 0, SLOTS)
        assert found == [*(page(seed)[layer] for seed in want), None], "nothing was written last"
    assert window.page_size * SLOTS == NBYTES


def test_neighbours_are_one_read(window: PageWindow) -> None:
    for slot in range(SLOTS):
        put(window, slot, slot)
    blocks(window).reads.clear()
    assert got(window, 7, 1, 4) == [page(i)[7] for i in range(1, 5)]
    assert blocks(window).reads == [(SLOTS * 8192 + 8192, 4 * 8192)]


def test_only_what_is_damaged_is_lost(window: PageWindow) -> None:
    for slot in range(SLOTS):
        put(window, slot, slot)
    place = SLOTS * 8192 + 2 * 8192
    blocks(window).data[place + 100] ^= 1
    found = got(window, 7, 0, SLOTS)
    assert found == [page(i)[7] if i != 2 else None for i in range(SLOTS)]
    blocks(window).fails.add((place + 8192) // BLOCK)
    found = got(window, 7, 0, SLOTS)
    assert found == [page(i)[7] if i not in (2, 3) else None for i in range(SLOTS)]
    assert got(window, 3, 0, SLOTS) == [page(i)[3] for i in range(SLOTS)]


def test_an_old_part_is_none(window: PageWindow) -> None:
    """As a drive gives that lost a write."""
    put(window, 1, 1)
    before = bytes(blocks(window).data)
    put(window, 1, 2)
    blocks(window).data[:] = before
    assert got(window, 7, 1, 1) == [None]


def test_encrypted_no_two_writes_are_alike_and_none_is_clear() -> None:
    with PageWindow(SIZES, SLOTS, Memory(), encrypted=True) as window:
        memory = blocks(window)
        put(window, 0, 5)
        first = bytes(memory.data)
        put(window, 0, 5)
        put(window, 1, 5)
        second = bytes(memory.data)
        for part in page(5).values():
            assert part[:32] not in first and part[:32] not in second
        assert first[:4096] != second[:4096] != second[8192:12288]
        assert window._writes == 3 * len(SIZES)
    with PageWindow(SIZES, SLOTS, Memory(), encrypted=False) as window:
        put(window, 0, 5)
        assert page(5)[7] in blocks(window).data


def test_no_more_than_may_be_written_is() -> None:
    asked: list[int] = []

    def may_write(nbytes: int) -> bool:
        asked.append(nbytes)
        return len(asked) < 2

    with PageWindow(SIZES, SLOTS, Memory(), encrypted=True, may_write=may_write) as window:
        put(window, 0, 1)
        assert not window.write(1, [memoryview(part) for part in page(2).values()])
        assert asked == [window.page_size] * 2 and got(window, 3, 1, 1) == [None]


def test_the_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    with PageWindow(SIZES, SLOTS, NamelessFile(tmp_path, NBYTES), encrypted=True) as window:
        assert not [*tmp_path.iterdir()] and not on_drive(tmp_path)
        descriptor = window._blocks._descriptor  # type: ignore[attr-defined]
        status = os.fstat(descriptor)
        assert status.st_nlink == 0 and status.st_size == NBYTES
        assert status.st_blocks * 512 >= NBYTES
        for slot in range(SLOTS):
            put(window, slot, slot)
        assert got(window, 7, 0, SLOTS) == [page(i)[7] for i in range(SLOTS)]
        assert os.fstat(descriptor).st_size == NBYTES
        os.ftruncate(descriptor, NBYTES // 2)
        assert got(window, 8, 0, SLOTS) == [None] * SLOTS


def test_a_file_loses_its_name_where_there_are_none_without(tmp_path: Path) -> None:
    (tmp_path / "headrace-kv-window.tmp").write_text("of a process that was killed")
    descriptor = open_unlinked(tmp_path)
    assert os.fstat(descriptor).st_nlink == os.fstat(descriptor).st_size == 0
    assert not [*tmp_path.iterdir()]
    os.close(descriptor)


def test_nothing_is_left_of_a_process_that_is_killed(tmp_path: Path) -> None:
    found = run(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from headrace.runtime.kv.window import NamelessFile\n"
        "if not os.fork():\n"
        "    NamelessFile(Path(sys.argv[1]), 1 << 20).write(0, memoryview(bytearray(4096)))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.wait()\n"
        "print(os.listdir(sys.argv[1]))\n",
        tmp_path,
    )
    assert found.strip() == "[]"


def test_a_drive_without_the_room_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(
        DoesNotFitError, match=r"free, but KV pages .* make room, or lower"
    ) as error:
        NamelessFile(tmp_path, 1 << 60)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(KVLogError, match="another folder, or leave --kv-hot-window out"):
        NamelessFile(tmp_path / "nowhere", 4096)
