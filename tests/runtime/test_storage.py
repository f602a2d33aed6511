"""Reads land where they should, whatever the alignment, and failures say which file and why."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from leftovers import descriptors_of, our_threads

from headrace.runtime.streaming.direct import BufferedStorage, DirectStorage, ThreadedStorage
from headrace.runtime.streaming.storage import choose_storage
from headrace.runtime.streaming.tiers import AlignedBuffer
from headrace.scheduler.errors import HeadraceError, StoreError

CPU = torch.device("cpu")
PAGE = 4096
MiB = 1 << 20

Maker = Callable[..., ThreadedStorage]


def random_file(path: Path, nbytes: int) -> Path:
    path.write_bytes(os.urandom(nbytes))
    return path


def direct_allowed(folder: Path) -> bool:
    file = random_file(folder / "direct-probe", PAGE)
    try:
        with DirectStorage(CPU, threads=1) as storage:
            storage.load(file, 0, AlignedBuffer(PAGE).tensor).wait()
    except StoreError:
        return False
    return True


@pytest.fixture(params=["direct", "buffered", "cached"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    if request.param == "direct" and not direct_allowed(tmp_path):
        pytest.skip("the filesystem of tmp_path refuses O_DIRECT")

    def maker(threads: int = 3, chunk_bytes: int = 8 * PAGE) -> ThreadedStorage:
        if request.param == "direct":
            return DirectStorage(CPU, threads, chunk_bytes)
        return BufferedStorage(CPU, threads, chunk_bytes, keep_cache=request.param == "cached")

    return maker


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    file = Path(f"/dev/shm/headrace-test-{os.getpid()}")
    if not os.access(file.parent, os.W_OK):
        pytest.skip("no /dev/shm")
    yield file
    file.unlink(missing_ok=True)


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 16, 65])
def test_an_extent_lands_byte_for_byte(make: Maker, tmp_path: Path, pages: int) -> None:
    file = random_file(tmp_path / "weights", 100 * PAGE)
    dest = AlignedBuffer(pages * PAGE).tensor
    with make() as storage:
        storage.load(file, 3 * PAGE, dest).wait()
    assert dest.numpy().tobytes() == file.read_bytes()[3 * PAGE : (3 + pages) * PAGE]


def test_an_unaligned_destination_goes_through_a_bounce_buffer(make: Maker, tmp_path: Path) -> None:
    file = random_file(tmp_path / "weights", 50 * PAGE)
    memory = AlignedBuffer(51 * PAGE).tensor
    dest = memory[13 : 13 + 50 * PAGE]
    with make() as storage:
        storage.load(file, 0, dest).wait()
    assert dest.numpy().tobytes() == file.read_bytes()
    assert not memory[:13].any()
    assert not memory[13 + 50 * PAGE :].any()


def test_many_loads_at_once_do_not_mix(make: Maker, tmp_path: Path) -> None:
    files = [random_file(tmp_path / str(i), (5 + 3 * i) * PAGE) for i in range(6)]
    with make(threads=4, chunk_bytes=2 * PAGE) as storage:
        dests = [AlignedBuffer(file.stat().st_size).tensor for file in files * 3]
        loads = [storage.load(f, 0, d) for f, d in zip(files * 3, dests, strict=True)]
        for load in reversed(loads):
            load.wait()
            load.wait()
    for file, dest in zip(files * 3, dests, strict=True):
        assert dest.numpy().tobytes() == file.read_bytes()


def test_tensors_of_inference_mode_can_be_loaded(make: Maker, tmp_path: Path) -> None:
    file = random_file(tmp_path / "weights", 3 * PAGE)
    with torch.inference_mode():
        dest = torch.zeros(3 * PAGE + 1, dtype=torch.uint8)[1:]
        with make() as storage:
            storage.load(file, 0, dest).wait()
        assert dest.numpy().tobytes() == file.read_bytes()


@pytest.mark.parametrize("size", [0, 5 * PAGE, 5 * PAGE + 100, 40 * PAGE - 1])
def test_a_truncated_file_is_named(make: Maker, tmp_path: Path, size: int) -> None:
    file = random_file(tmp_path / "layer-00003.safetensors", size)
    dest = AlignedBuffer(40 * PAGE).tensor
    with make() as storage:
        load = storage.load(file, 0, dest)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"layer-00003\.safetensors: ends at byte"):
                load.wait()
        healthy = random_file(tmp_path / "healthy", 40 * PAGE)
        storage.load(healthy, 0, dest).wait()
    assert dest.numpy().tobytes() == healthy.read_bytes()


def test_a_missing_file_is_named(make: Maker, tmp_path: Path) -> None:
    with make() as storage:
        load = storage.load(tmp_path / "gone", 0, AlignedBuffer(PAGE).tensor)
        with pytest.raises(StoreError, match="gone: reading failed: No such file"):
            load.wait()


def test_closing_fails_waiting_loads_and_ends_threads(make: Maker, tmp_path: Path) -> None:
    file = random_file(tmp_path / "weights", 4 * MiB)
    before = our_threads()
    storage = make(threads=1, chunk_bytes=PAGE)
    storage.load(file, 0, AlignedBuffer(PAGE).tensor).wait()
    assert our_threads() > before and descriptors_of(file) == 1
    loads = [storage.load(file, 0, AlignedBuffer(4 * MiB).tensor) for _ in range(20)]
    storage.close()
    storage.close()
    with pytest.raises(StoreError, match="storage is closed"):
        loads[-1].wait()
    assert our_threads() == before
    assert descriptors_of(file) == 0


def test_aligned_buffers_are_page_aligned_and_outlive_their_owner() -> None:
    buffer = AlignedBuffer(3 * PAGE)
    view = buffer.tensor[PAGE:]
    assert buffer.tensor.data_ptr() % PAGE == 0
    assert buffer.tensor.nbytes == 3 * PAGE
    view.fill_(7)
    buffer.close()
    buffer.close()
    del buffer
    assert int(view.sum()) == 7 * 2 * PAGE


@pytest.mark.parametrize("requested", ["auto", "buffered"])
def test_a_storage_is_chosen_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, requested: str
) -> None:
    file = random_file(tmp_path / "weights", 4 * MiB)
    with caplog.at_level(logging.INFO, "headrace.runtime.streaming.storage"):
        storage = choose_storage(CPU, file, PAGE, 2 * MiB, requested)
    try:
        assert storage.name in ("direct", "buffered")
        dest = AlignedBuffer(MiB).tensor
        storage.load(file, PAGE, dest).wait()
        assert dest.numpy().tobytes() == file.read_bytes()[PAGE : PAGE + MiB]
    finally:
        storage.close()
    assert f"storage {storage.name} (requested: {requested})" in caplog.text
    assert "GB/s" in caplog.text
    assert "page cache" in caplog.text


def test_losing_storages_leave_no_thread(tmp_path: Path) -> None:
    before = our_threads()
    choose_storage(CPU, random_file(tmp_path / "weights", MiB), 0, MiB).close()
    assert our_threads() == before


def test_one_page_is_enough_for_a_probe(tmp_path: Path) -> None:
    choose_storage(CPU, random_file(tmp_path / "weights", PAGE), 0, PAGE).close()


def test_shared_memory_is_served_even_if_it_refuses_o_direct(shared_memory: Path) -> None:
    random_file(shared_memory, MiB)
    storage = choose_storage(CPU, shared_memory, 0, MiB)
    try:
        dest = AlignedBuffer(MiB).tensor
        storage.load(shared_memory, 0, dest).wait()
        assert dest.numpy().tobytes() == shared_memory.read_bytes()
    finally:
        storage.close()


def test_direct_is_served_or_refused_in_words(shared_memory: Path) -> None:
    random_file(shared_memory, MiB)
    try:
        choose_storage(CPU, shared_memory, 0, MiB, "direct").close()
    except StoreError as error:
        assert "refuses O_DIRECT" in str(error)
        assert "'buffered'" in str(error)


def test_requests_that_cannot_be_had_are_errors(tmp_path: Path) -> None:
    file = random_file(tmp_path / "weights", MiB)
    with pytest.raises(HeadraceError, match=r"kvikio.*CUDA"):
        choose_storage(CPU, file, 0, MiB, "kvikio")
    with pytest.raises(HeadraceError, match="'tape' is not known"):
        choose_storage(CPU, file, 0, MiB, "tape")


def test_a_damaged_sample_is_an_error_not_a_choice(tmp_path: Path) -> None:
    file = random_file(tmp_path / "weights", MiB)
    with pytest.raises(StoreError, match="weights: ends at byte"):
        choose_storage(CPU, file, 0, 2 * MiB)
    with pytest.raises(StoreError, match="missing: reading failed"):
        choose_storage(CPU, tmp_path / "missing", 0, MiB)


def test_the_page_cache_counts_only_if_ram_holds_a_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = random_file(tmp_path / "weights", MiB)
    with caplog.at_level(logging.INFO, "headrace.runtime.streaming.storage"):
        choose_storage(CPU, file, 0, MiB, streamed_bytes=MiB).close()
        assert "counted: RAM holds a pass" in caplog.text
        caplog.clear()
        choose_storage(CPU, file, 0, MiB, streamed_bytes=1 << 60).close()
        assert "emptied before timing" in caplog.text


def test_a_probe_leaves_no_memory_behind(tmp_path: Path) -> None:
    file = tmp_path / "block"
    file.write_bytes(os.urandom(64 << 20))
    process = psutil.Process()
    choose_storage(CPU, file, 0, 1 << 20).close()  # threads' stacks, modules, allocator pools
    before = process.memory_info().rss
    storage = choose_storage(CPU, file, 0, 64 << 20)
    grown = process.memory_info().rss - before
    storage.close()
    assert grown < 32 << 20, "the threads that read still hold the probe's buffer"
