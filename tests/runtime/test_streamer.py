"""The ring hands out the right bytes, pass after pass, and its counters keep the plan's promise."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from leftovers import our_threads
from slow_storage import SlowStorage

from headrace.runtime.manifest import Block
from headrace.runtime.streaming.direct import BufferedStorage
from headrace.runtime.streaming.loads import Storage
from headrace.runtime.streaming.streamer import StreamCounters, Streamer
from headrace.runtime.streaming.tiers import AlignedBuffer, HostTier
from headrace.scheduler.errors import StoreError
from headrace.scheduler.placement import Tier

CPU = torch.device("cpu")
PAGE = 4096
SIZES = (3, 7, 5, 7, 1, 6, 2)
SLOT_BYTES = 7 * PAGE


def make_blocks(folder: Path, sizes: Sequence[int] = SIZES) -> dict[int, Block]:
    blocks = {}
    for layer, pages in enumerate(sizes):
        file = folder / f"layer-{layer:05}.safetensors"
        file.write_bytes(b"h" * PAGE + os.urandom(pages * PAGE))
        blocks[layer] = Block(file.stem, file, PAGE, pages * PAGE, "", {})
    return blocks


def content(block: Block) -> bytes:
    return block.file.read_bytes()[block.data_offset :]


def make_streamer(
    blocks: Mapping[int, Block],
    tiers: Mapping[int, Tier],
    visits: Sequence[Sequence[int]],
    storage: Storage,
    slots: int = 3,
) -> Streamer:
    return Streamer(
        visits=visits,
        blocks=blocks,
        tiers=tiers,
        storage=storage,
        device=CPU,
        ring_slots=slots,
        slot_bytes=SLOT_BYTES,
    )


def run_pass(
    streamer: Streamer, visits: Sequence[Sequence[int]], blocks: Mapping[int, Block]
) -> None:
    for position, visit in enumerate(visits):
        with streamer.hold(position) as weights:
            assert [layer for layer, _ in weights] == list(visit)
            for layer, data in weights:
                assert data.dtype == torch.uint8
                assert data.numpy().tobytes() == content(blocks[layer])


def all_on(tier: Tier, layers: Iterable[int] = range(len(SIZES))) -> dict[int, Tier]:
    return dict.fromkeys(layers, tier)


MIXED = {i: (Tier.NVME, Tier.HOST, Tier.DEVICE)[i % 3] for i in range(len(SIZES))}
ONE_BY_ONE = [[i] for i in range(len(SIZES))]
PAIRS = [[0, 1], [2, 3], [4, 5], [6]]


@pytest.mark.parametrize(
    ("tiers", "visits", "slots"),
    [
        (all_on(Tier.NVME), ONE_BY_ONE, 1),
        (all_on(Tier.NVME), ONE_BY_ONE, 3),
        (all_on(Tier.NVME), ONE_BY_ONE, 10),
        (all_on(Tier.NVME), PAIRS, 2),
        (all_on(Tier.NVME), PAIRS, 4),
        (all_on(Tier.HOST), ONE_BY_ONE, 2),
        (all_on(Tier.HOST), PAIRS, 5),
        (all_on(Tier.DEVICE), PAIRS, 3),
        (MIXED, ONE_BY_ONE, 2),
        (MIXED, PAIRS, 3),
    ],
)
def test_every_visit_holds_its_layers_over_several_passes(
    tmp_path: Path, tiers: dict[int, Tier], visits: list[list[int]], slots: int
) -> None:
    blocks = make_blocks(tmp_path)
    with (
        BufferedStorage(CPU, threads=2, chunk_bytes=2 * PAGE) as storage,
        make_streamer(blocks, tiers, visits, SlowStorage(storage, seed=slots), slots) as streamer,
    ):
        for _ in range(4):
            run_pass(streamer, visits, blocks)
            counters = streamer.take_counters()
            assert (counters.nvme_bytes, counters.host_bytes) == (
                sum(blocks[i].nbytes for i in tiers if tiers[i] is Tier.NVME),
                sum(blocks[i].nbytes for i in tiers if tiers[i] is Tier.HOST),
            )


def test_a_stage_may_have_any_layers(tmp_path: Path) -> None:
    """Cyclic placement gives a stage every n-th layer."""
    blocks = make_blocks(tmp_path)
    visits = [[1], [3], [5]]
    mine = {i: blocks[i] for i in (1, 3, 5)}
    tiers = {1: Tier.NVME, 3: Tier.DEVICE, 5: Tier.HOST}
    with (
        BufferedStorage(CPU, threads=2) as storage,
        make_streamer(mine, tiers, visits, storage, slots=2) as streamer,
    ):
        for _ in range(3):
            run_pass(streamer, visits, mine)


def test_loads_run_ahead_across_visits_and_passes(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path, (1, 1, 1, 1))
    visits = [[0], [1], [2], [3]]
    with BufferedStorage(CPU, threads=1) as real:
        storage = SlowStorage(real, seed=0)
        with make_streamer(blocks, all_on(Tier.NVME, range(4)), visits, storage) as streamer:
            begun = [int(name[6:11]) for name in storage.begun]
            assert begun == [0, 1, 2]
            for position in (0, 1, 2):
                with streamer.hold(position):
                    assert len(storage.begun) == 3 + position
            assert [int(name[6:11]) for name in storage.begun] == [0, 1, 2, 3, 0, 1]


def test_resident_layers_are_read_once(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path)
    with BufferedStorage(CPU, threads=1) as real:
        storage = SlowStorage(real, seed=1)
        with make_streamer(blocks, MIXED, PAIRS, storage) as streamer:
            for _ in range(3):
                run_pass(streamer, PAIRS, blocks)
        for layer, tier in MIXED.items():
            if tier is not Tier.NVME:
                assert storage.begun.count(f"layer-{layer:05}.safetensors") == 1


def test_waiting_is_counted_and_counting_starts_over(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path)
    with (
        BufferedStorage(CPU, threads=1) as real,
        make_streamer(blocks, all_on(Tier.NVME), ONE_BY_ONE, SlowStorage(real, 3), 1) as streamer,
    ):
        run_pass(streamer, ONE_BY_ONE, blocks)
        first = streamer.take_counters()
        assert first.nvme_bytes == sum(SIZES) * PAGE
        assert first.wait_seconds > 0
        assert streamer.take_counters() == StreamCounters(0, 0, 0.0)


def test_visits_are_held_in_order(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path)
    with (
        BufferedStorage(CPU, threads=1) as storage,
        make_streamer(blocks, MIXED, PAIRS, storage) as streamer,
    ):
        with pytest.raises(AssertionError), streamer.hold(1):
            pass
        run_pass(streamer, PAIRS, blocks)


def test_an_error_in_the_computation_gives_the_slots_back(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path)
    with (
        BufferedStorage(CPU, threads=1) as storage,
        make_streamer(blocks, all_on(Tier.NVME), PAIRS, storage, 2) as streamer,
    ):
        with pytest.raises(ZeroDivisionError), streamer.hold(0):
            raise ZeroDivisionError
        for position in (1, 2, 3):
            with streamer.hold(position):
                pass
        run_pass(streamer, PAIRS, blocks)


@pytest.mark.parametrize("tier", [Tier.NVME, Tier.HOST])
def test_a_truncated_layer_fails_its_visit_every_time(tmp_path: Path, tier: Tier) -> None:
    blocks = make_blocks(tmp_path)
    os.truncate(blocks[2].file, 2 * PAGE)
    with (
        BufferedStorage(CPU, threads=1) as storage,
        make_streamer(blocks, all_on(tier), ONE_BY_ONE, storage) as streamer,
    ):
        for position in (0, 1):
            with streamer.hold(position):
                pass
        for _ in range(2):
            with pytest.raises(StoreError, match="layer-00002"), streamer.hold(2):
                pass


def test_a_damaged_resident_layer_fails_the_wait_for_it(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path)
    os.truncate(blocks[2].file, 2 * PAGE)
    before = our_threads()
    with (
        BufferedStorage(CPU, threads=1) as storage,
        make_streamer(blocks, MIXED, PAIRS, storage) as streamer,
    ):
        for _ in range(2):
            with pytest.raises(StoreError, match="layer-00002"):
                streamer.wait_resident()
    assert our_threads() == before


def test_closing_early_ends_threads_and_may_be_repeated(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path)
    before = our_threads()
    with BufferedStorage(CPU, threads=2) as storage:
        streamer = make_streamer(blocks, MIXED, PAIRS, SlowStorage(storage, seed=5))
        streamer.close()
        streamer.close()
    assert our_threads() == before


def test_a_host_tier_says_when_it_is_full(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path)
    with (
        BufferedStorage(CPU, threads=2) as storage,
        HostTier(blocks, SlowStorage(storage, seed=6), CPU) as tier,
    ):
        tier.wait()
        for layer, block in blocks.items():
            dest = AlignedBuffer(block.nbytes).tensor
            tier.load(layer, dest).wait()
            assert dest.numpy().tobytes() == content(block)


def test_a_closed_host_tier_fails_what_it_had_not_read(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path, (4,) * 40)
    with BufferedStorage(CPU, threads=1) as real:
        tier = HostTier(blocks, SlowStorage(real, seed=7), CPU)
        load = tier.load(39, AlignedBuffer(4 * PAGE).tensor)
        tier.close()
        with pytest.raises(StoreError, match="host tier is closed"):
            load.wait()
