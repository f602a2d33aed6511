"""Experts that nearly every pass reaches are loaded before they are asked for: no sooner than what is
asked for, and never in its way."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from slow_storage import SlowStorage

from headrace.runtime.manifest import Block
from headrace.runtime.memory.held import Holding
from headrace.runtime.streaming.direct import BufferedStorage
from headrace.runtime.streaming.expert_streamer import ExpertStreamer
from headrace.scheduler.experts import LIKELY, RECENT, passing_slots, slots_ahead

HABIT = (1, 4, 6)


@pytest.fixture
def blocks(tmp_path: Path) -> dict[int, Block]:
    return make_blocks(tmp_path)


@pytest.fixture
def storage() -> Iterator[SlowStorage]:
    with BufferedStorage(CPU, threads=2, chunk_bytes=PAGE) as real:
        yield SlowStorage(real, seed=1)


def run_pass(
    streamer: ExpertStreamer, experts: Sequence[int], layers: Sequence[int] = LAYERS
) -> None:
    """Every layer's tokens reach the same experts."""
    streamer.begin_pass(layers)
    for layer in layers:
        assert [expert for expert, _ in streamer.fetch(layer, experts)] == list(experts)


def experts_of(blocks: dict[int, Block], layer: int, experts: Sequence[int]) -> set[object]:
    return {extent(blocks[layer], expert) for expert in experts}


@pytest.mark.parametrize("host_slots", [0, 5, 24])
@pytest.mark.parametrize("slots", [1, 2, 4, 5, 9, 24])
def test_guesses_change_no_byte(
    blocks: dict[int, Block], storage: SlowStorage, slots: int, host_slots: int
) -> None:
    generator = random.Random(slots)
    often = {layer: generator.sample(range(EXPERTS), 3) for layer in LAYERS}
    with open_experts(blocks, storage, slots, host_slots) as streamer:
        for i in range(24):
            order = [layer for layer in LAYERS for _ in range(1 + i // 8)]
            streamer.begin_pass(order)
            for layer in order:
                habit = [e for e in often[layer] if generator.random() < 0.97]
                wanted = sorted({*habit, *generator.sample(range(EXPERTS), i % 3)})
                for expert, data in streamer.fetch(layer, wanted):
                    assert data.numpy().tobytes() == content(blocks[layer], expert)
        counters = streamer.take_counters()
        assert counters.loaded <= counters.used
        assert counters.nvme_bytes + counters.host_bytes >= counters.loaded * EXTENT


def test_a_habit_is_loaded_unasked(blocks: dict[int, Block], storage: SlowStorage) -> None:
    with open_experts(blocks, storage, slots=4) as streamer:
        for _ in range(LIKELY):
            run_pass(streamer, HABIT)
        streamer.begin_pass(LAYERS)
        for layer, following in ((2, 3), (3, 7), (7, 2)):
            list(streamer.fetch(layer, HABIT))
            most = slots_ahead(passing_slots(4, EXTENT))
            begun = set(storage.extents[-most:])
            assert begun == experts_of(blocks, following, HABIT[:most])


def test_what_passes_reach_by_chance_is_not_loaded_unasked(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=4) as streamer:
        for i in range(3 * RECENT):
            run_pass(streamer, [i % 4, 4 + i % 3])
        counters = streamer.take_counters()
        assert counters.nvme_bytes == counters.loaded * EXTENT
        assert len(storage.extents) == counters.loaded


def test_nothing_is_guessed_where_everything_stays(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=len(LAYERS) * EXPERTS) as streamer:
        for _ in range(RECENT + 2):
            run_pass(streamer, HABIT)
        assert len(storage.extents) == len(set(storage.extents)) <= len(LAYERS) * EXPERTS


def test_what_is_asked_for_goes_first(blocks: dict[int, Block], storage: SlowStorage) -> None:
    with open_experts(blocks, storage, slots=8) as streamer:
        for _ in range(RECENT):
            run_pass(streamer, HABIT)
        streamer.begin_pass(LAYERS)
        list(streamer.fetch(2, HABIT))
        list(streamer.fetch(3, HABIT))
        del storage.extents[:]
        list(streamer.fetch(7, (0, 2, 3, 5, 7)))
        mine = [file == blocks[7].file for file, _, _ in storage.extents]
        assert sum(mine) >= 4
        assert mine == sorted(mine, reverse=True) and not mine[-1]


def test_what_is_asked_for_leaves_what_was_loaded_for_later_layers(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=4) as streamer:
        for _ in range(RECENT):
            run_pass(streamer, HABIT)
        streamer.begin_pass(LAYERS)
        list(streamer.fetch(2, HABIT))
        list(streamer.fetch(3, []))
        ahead = set(storage.extents[-slots_ahead(passing_slots(4, EXTENT)) :])
        assert ahead <= experts_of(blocks, 7, HABIT)
        del storage.extents[:]
        streamer.begin_pass([3, 7])
        list(streamer.fetch(3, range(EXPERTS)))
        list(streamer.fetch(7, HABIT))
        assert not ahead & set(storage.extents)


def test_a_wrong_guess_is_moved_but_not_needed(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=4) as streamer:
        for _ in range(RECENT):
            run_pass(streamer, HABIT)
        ahead = slots_ahead(passing_slots(4, EXTENT))
        streamer.take_counters()
        run_pass(streamer, (0,))
        counters = streamer.take_counters()
        assert (counters.used, counters.loaded) == (3, 3)
        assert counters.nvme_bytes >= (3 + 2 * ahead) * EXTENT


def test_another_micro_batch_finds_what_was_loaded_for_it(
    blocks: dict[int, Block], storage: SlowStorage
) -> None:
    with open_experts(blocks, storage, slots=EXPERTS, held=EXPERTS) as streamer:
        order = [layer for layer in LAYERS for _ in range(3)]
        for _ in range(RECENT + 2):
            run_pass(streamer, HABIT, order)
        counters = streamer.take_counters()
        assert len(storage.extents) <= (RECENT + 3) * len(LAYERS) * len(HABIT)
        assert counters.used == (RECENT + 2) * len(order) * len(HABIT)


@dataclass
class Link:
    """A storage that takes a second of a clock of its own for each load, one after the other."""

    name: str = "link"
    now: float = 0.0
    free: float = 0.0
    busy: float = 0.0

    def load(self, file: Path, offset: int, dest: torch.Tensor) -> "Arrival":
        self.free = max(self.free, self.now) + 1.0
        self.busy += 1.0
        return Arrival(self, self.free)

    def memory(self) -> Iterable[Holding]:
        return ()

    def close(self) -> None:
        pass


@dataclass
class Arrival:
    link: Link
    end: float

    def wait(self) -> None:
        self.link.now = max(self.link.now, self.end)


def busy_share(streamer: ExpertStreamer, link: Link, passes: int, experts: Sequence[int]) -> float:
    """Of the time of some passes, with attention before every layer and a turn after every pass."""
    start, busy = link.now, link.busy
    for _ in range(passes):
        streamer.begin_pass(LAYERS)
        for layer in LAYERS:
            link.now += 0.8
            for _ in streamer.fetch(layer, experts):
                link.now += 0.1
        link.now += 1.0
    return (link.busy - busy) / (link.now - start)


def test_the_link_does_not_wait_for_routers_that_always_say_the_same(
    blocks: dict[int, Block],
) -> None:
    link = Link()
    with open_experts(blocks, link, slots=8) as streamer:
        habit = (0, 1, 4, 6, 7)
        before = busy_share(streamer, link, LIKELY - 1, habit)
        busy_share(streamer, link, 3, habit)
        after = busy_share(streamer, link, 5, habit)
        assert before < 0.8 and after > 0.99
