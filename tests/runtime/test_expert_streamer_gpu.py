"""Experts on CUDA: bytes are right although slots are given away behind running kernels."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from expert_blocks import EXPERTS, LAYERS, content, make_blocks, open_experts
from leftovers import our_threads

from headrace.runtime.streaming.direct import BufferedStorage, DirectStorage
from headrace.runtime.streaming.storage import choose_storage
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.experts import LIKELY

pytestmark = pytest.mark.gpu

HABIT = (1, 6)
"""What every pass reaches, so that it is loaded unasked after a while."""

BUSY_CYCLES = 4_000_000  # about 2 ms of a kernel that does nothing


@pytest.fixture
def device() -> Iterator[torch.device]:
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield device


@pytest.mark.parametrize("name", ["direct", "buffered", "kvikio"])
@pytest.mark.parametrize("host_slots", [0, 5, 24])
@pytest.mark.parametrize("slots", [1, 3, 10, 24])
def test_late_kernels_still_read_the_right_bytes(
    tmp_path: Path, device: torch.device, slots: int, host_slots: int, name: str
) -> None:
    blocks, generator = make_blocks(tmp_path), random.Random(slots)
    first = blocks[LAYERS[0]]
    try:
        storage = choose_storage(device, first.file, first.data_offset, first.nbytes, name)
    except HeadraceError as error:
        pytest.skip(str(error))
    seen: list[tuple[int, int, torch.Tensor]] = []
    try:
        with open_experts(blocks, storage, slots, host_slots, device) as streamer:
            for _ in range(LIKELY + 3):
                order = [layer for layer in LAYERS for _ in range(2)]
                streamer.begin_pass(order)
                for layer in order:
                    others = generator.sample(range(EXPERTS), generator.choice((0, 1, 5)))
                    wanted = sorted({*HABIT, *others})
                    for expert, data in streamer.fetch(layer, wanted):
                        torch.cuda._sleep(BUSY_CYCLES)
                        seen.append((layer, expert, data.clone()))
            torch.cuda.current_stream(device).synchronize()
            assert streamer.take_counters().used == len(seen)
    finally:
        storage.close()
    for layer, expert, data in seen:
        assert data.cpu().numpy().tobytes() == content(blocks[layer], expert), (layer, expert)


@pytest.mark.parametrize("host_slots", [0, 24])
def test_closing_early_leaves_no_thread_and_no_memory(
    tmp_path: Path, device: torch.device, host_slots: int
) -> None:
    blocks, before = make_blocks(tmp_path), our_threads()
    with DirectStorage(device) as storage:
        held = torch.cuda.memory_allocated(device)
        streamer = open_experts(blocks, storage, 6, host_slots, device)
        streamer.begin_pass(LAYERS)
        fetched = streamer.fetch(LAYERS[0], range(EXPERTS))
        next(fetched)
        streamer.close()
        del fetched
        assert torch.cuda.memory_allocated(device) == held
    assert our_threads() == before


def test_a_full_host_tier_reads_nothing(tmp_path: Path, device: torch.device) -> None:
    blocks = make_blocks(tmp_path)
    with (
        BufferedStorage(device) as storage,
        open_experts(blocks, storage, 2, 24, device) as streamer,
    ):
        streamer.wait_host_tier()
        streamer.begin_pass(LAYERS)
        for layer in LAYERS:
            for expert, data in streamer.fetch(layer, range(EXPERTS)):
                assert data.cpu().numpy().tobytes() == content(blocks[layer], expert)
        assert streamer.take_counters().nvme_bytes == 0
