"""Experts come with the right bytes in the right order, and only those that are asked for are read."""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from expert_blocks import (
    CPU,
    EXPERTS,
    EXTENT,
    LAYERS,
    PAGE,
    content,
    extent,
    make_blocks,
    open_experts,
)
from leftovers import our_threads
from slow_storage import SlowStorage

from headrace.runtime.manifest import Block
from headrace.runtime.streaming.direct import BufferedStorage
from headrace.runtime.streaming.expert_streamer import ExpertStreamer
from headrace.runtime.streaming.host_experts import HostExperts, Place
from headrace.scheduler.errors import DoesNotFitError, StoreError
from headrace.scheduler.experts import passing_slots

Fetch = tuple[int, Sequence[int]]


@pytest.fixture
def blocks(tmp_path: Path) -> dict[int, Block]:
    return make_blocks(tmp_path)


@pytest.fixture
def storage() -> Iterator[SlowStorage]:
    with BufferedStorage(CPU, threads=2, chunk_bytes=PAGE) as real:
        yield SlowStorage(real, seed=1)


def run_pass(streamer: ExpertStreamer, fetches: Sequence[Fetch], blocks: dict[int, Block]) -> None:
    streamer.begin_pass([layer for layer, _ in fetches])
    for layer, experts in fetches:
        seen = []
        for expert, data in streamer.fetch(layer, experts):
            assert data.dtype == torch.uint8
            assert data.numpy().tobytes() == content(blocks[layer], expert), (layer, expert)
            seen.append(expert)
        assert seen == list(experts)


def random_fetches(generator: random.Random, micro_batches: int) -> list[Fetch]:
    """Few experts, or all of them, by the layer; now and then none."""
    return [
        (layer, sorted(generator.sample(range(EXPERTS), generator.choice((0, 1, 2, 5, 8)))))
        for layer in LAYERS
        for _ in range(micro_batches)
    ]


@pytest.mark.parametrize("host_slots", [0, 3, 24])
@pytest.mark.parametrize("slots", [1, 2, 5, 11, 24, 30])
def test_every_expert_has_its_bytes_while_the_host_tier_fills(
    blocks: dict[int, Block], storage: SlowStorage, slots: int, host_slots: int
) -> None:
    generator = random.Random(slots)
    with open_experts(blocks, storage, slots, host_slots) as streamer:
        used = 0
        for i in range(8):
            fetches = random_fetches(generator, 1 + i % 3)
            run_pass(streamer, fetches, blocks)
            used += sum(len(experts) for _, experts in fetches)
        counters = streamer.take_counters()
        assert counters.used == used
        assert counters.nvme_bytes + counters.host_bytes >= counters.loaded * EXTENT
        again = streamer.take_counters()
        assert (again.used, again.loaded, again.nvme_bytes, again.host_bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("slots", [1, 2, 5, 12])
def test_only_what_is_asked_for_is_read(
    blocks: dict[int, Block], storage: SlowStorage, slots: int
) -> None:
    with open_experts(blocks, storage, slots) as streamer:
        assert len(storage.extents) == slots - passing_slots(slots, EXTENT)
        here = set(storage.extents)
        del storage.extents[:]
        fetches = [(2, [0, 3, 6]), (3, [1, 7]), (7, [2])]
        run_pass(streamer, fetches, blocks)
        asked = {extent(blocks[layer], e) for layer, experts in fetches for e in experts}
        assert len(storage.extents) == len(asked - here)
        assert set(storage.extents) == asked - here
        counters = streamer.take_counters()
        assert counters.nvme_bytes == len(asked - here) * EXTENT
        assert counters.host_bytes == 0
        assert (counters.used, counters.loaded) == (6, len(asked - here))


def test_what_fits_is_read_once(blocks: dict[int, Block], storage: SlowStorage) -> None:
    everything = [(layer, range(EXPERTS)) for layer in LAYERS]
    with open_experts(blocks, storage, slots=24) as streamer:
        for _ in range(3):
            run_pass(streamer, everything, blocks)
        assert len(storage.extents) == len(set(storage.extents)) == 24


def test_scans_hit_the_experts_that_are_kept(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    """Not one byte more is loaded than passes that reach every expert need."""
    everything = [(layer, range(EXPERTS)) for layer in LAYERS]
    with open_experts(blocks, storage, slots=12) as streamer:
        kept = 12 - passing_slots(12, EXTENT)
        for _ in range(20):
            run_pass(streamer, everything, blocks)
        streamer.take_counters()
        for _ in range(3):
            run_pass(streamer, everything, blocks)
            counters = streamer.take_counters()
            assert counters.loaded == 24 - kept
            assert counters.nvme_bytes == (24 - kept) * EXTENT


def test_all_misses_are_begun_before_the_first_is_waited_for(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=4) as streamer:
        streamer.begin_pass([3])
        fetched = streamer.fetch(3, [0, 2, 3, 5, 6])
        next(fetched)
        assert storage.extents == [extent(blocks[3], e) for e in (0, 2, 3, 5)]
        next(fetched)
        assert storage.extents[4:] == [extent(blocks[3], 6)]


def test_the_next_micro_batch_finds_the_layer_there(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=4) as streamer:
        run_pass(streamer, [(3, [0, 4]), (3, [0, 4, 5]), (3, [4, 5])], blocks)
        assert storage.extents == [extent(blocks[3], e) for e in (0, 4, 5)]


def test_much_used_experts_stay(blocks: dict[int, Block], storage: SlowStorage) -> None:
    generator = random.Random(4)
    with open_experts(blocks, storage, slots=8) as streamer:
        for i in range(40):
            if i == 20:
                streamer.take_counters()
            others = sorted({1, 6, generator.randrange(EXPERTS)})
            run_pass(streamer, [(2, others), (3, [generator.randrange(EXPERTS)])], blocks)
        assert streamer.take_counters().loaded <= 40


def test_a_full_host_tier_serves_what_it_holds(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    everything = [(layer, range(EXPERTS)) for layer in LAYERS]
    with open_experts(blocks, storage, slots=2, host_slots=100) as streamer:
        streamer.wait_host_tier()
        assert len(storage.extents) == len(set(storage.extents)) == 24
        for _ in range(2):
            run_pass(streamer, everything, blocks)
        counters = streamer.take_counters()
        assert counters.nvme_bytes == 0
        assert counters.host_bytes >= 2 * 24 * EXTENT
        assert len(storage.extents) == 24


def test_a_scan_hits_what_the_host_tier_holds(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    everything = [(layer, range(EXPERTS)) for layer in LAYERS]
    with open_experts(blocks, storage, slots=2, host_slots=8) as streamer:
        streamer.wait_host_tier()
        for _ in range(8):
            run_pass(streamer, everything, blocks)
        streamer.take_counters()  # the next pass's first load is under way by now
        for _ in range(20):
            run_pass(streamer, everything, blocks)
            counters = streamer.take_counters()
            assert (counters.host_bytes, counters.nvme_bytes) == (8 * EXTENT, 16 * EXTENT)


def test_what_is_used_more_moves_into_the_host_tier(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=1, host_slots=2) as streamer:
        streamer.wait_host_tier()
        for _ in range(4):
            run_pass(streamer, [(2, [0]), (3, [1])], blocks)
        streamer.take_counters()
        run_pass(streamer, [(2, [0]), (3, [1])], blocks)
        counters = streamer.take_counters()
        assert (counters.nvme_bytes, counters.host_bytes) == (0, 2 * EXTENT)


@pytest.mark.parametrize("host_slots", [0, 24])
def test_a_truncated_expert_fails_its_fetch_every_time(
    blocks: dict[int, Block], storage: SlowStorage, host_slots: int
) -> None:
    os.truncate(blocks[3].file, extent(blocks[3], 5)[1])
    with open_experts(blocks, storage, 4, host_slots) as streamer:
        for _ in range(3):
            run_pass(streamer, [(3, [0, 3]), (7, [5])], blocks)
            with pytest.raises(StoreError, match="layer-00003"):
                run_pass(streamer, [(3, [1, 5, 6])], blocks)


def test_a_truncated_expert_that_was_not_asked_for_fails_nothing(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    os.truncate(blocks[3].file, extent(blocks[3], 7)[1] + PAGE)
    with open_experts(blocks, storage, 4) as streamer:
        for _ in range(3):
            run_pass(streamer, [(2, range(8)), (3, range(7)), (7, range(8))], blocks)


def test_a_damaged_expert_that_is_kept_fails_the_start(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    os.truncate(blocks[3].file, PAGE)
    before = our_threads()
    with pytest.raises(StoreError, match="layer-00003"):
        open_experts(blocks, storage, slots=24)
    assert our_threads() == before


def test_an_error_in_the_computation_leaves_the_slots_in_order(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=5) as streamer:
        streamer.begin_pass([2, 3])
        for _ in streamer.fetch(2, range(EXPERTS)):
            break
        for _ in range(2):
            run_pass(streamer, [(3, range(EXPERTS)), (2, [0, 7])], blocks)


@pytest.mark.parametrize("host_slots", [0, 5, 24])
def test_closing_early_ends_threads_and_may_be_repeated(
    blocks: dict[int, Block], storage: SlowStorage, host_slots: int
) -> None:
    before = our_threads()
    streamer = open_experts(blocks, storage, 6, host_slots)
    streamer.begin_pass(LAYERS)
    fetched = streamer.fetch(2, range(EXPERTS))
    next(fetched)
    streamer.close()
    streamer.close()
    fetched.close()  # type: ignore[attr-defined]
    assert our_threads() == before


def test_host_memory_that_is_not_there_fails_what_asks_for_it(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    file, offset, nbytes = extent(blocks[2], 0)
    experts = HostExperts(
        {(2, 0): Place(file, offset, nbytes)},
        [(2, 0)],
        slots=1,
        slot_bytes=1 << 60,
        storage=storage,
        device=CPU,
    )
    with experts:
        with pytest.raises(DoesNotFitError, match="host-memory"):
            experts.wait()
        with pytest.raises(DoesNotFitError, match="host-memory"):
            experts.load((2, 0), torch.empty(nbytes, dtype=torch.uint8))
