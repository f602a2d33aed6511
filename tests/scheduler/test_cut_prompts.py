"""Prompts that are cut for several micro-batches of a pass."""

import random

import pytest

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import MicroBatch, Pass, Sample, Sampling, Slice
from headrace.scheduler.policy import cut, pack
from headrace.scheduler.request import Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

DRAW = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, None, 0, ())


def a_slice(request: int, start: int, count: int) -> Slice:
    pages = tuple(range(100 * request, 100 * request + pages_for(start + count)))
    return Slice(request, start, tuple(range(count)), pages, DRAW)


def check(slices: list[Slice], batches: tuple[MicroBatch, ...]) -> None:
    """All tokens are there, parts in order with the pages up to their end, and the last one draws."""
    for piece in slices:
        parts = [p for batch in batches for p in batch.slices if p.request == piece.request]
        assert tuple(token for part in parts for token in part.tokens) == piece.tokens
        start = piece.start
        for part in parts:
            assert part.start == start
            assert part.pages == piece.pages[: pages_for(part.end)]
            assert (part.sampling is None) == (part.end < piece.end)
            start = part.end
    for batch in batches:
        requests = [piece.request for piece in batch.slices]
        assert len(requests) == len(set(requests))


def test_a_prompt_is_cut_in_even_shares_beside_decodes() -> None:
    slices = [a_slice(0, 30, 400), *(a_slice(i, 500, 1) for i in range(1, 17))]
    whole = pack(slices, 4, 500)
    assert max(batch.num_tokens for batch in whole) == 400
    batches = pack(slices, 4, 500, 64)
    # Decodes have attention work, too, which is balanced as well.
    assert [batch.num_tokens for batch in batches] == pytest.approx([104] * 4, abs=4)
    check(slices, batches)


def test_a_prompt_alone_is_in_all_micro_batches() -> None:
    slices = [a_slice(0, 0, 500)]
    batches = pack(slices, 4, 500, 64)
    assert [batch.num_tokens for batch in batches] == [125] * 4
    check(slices, batches)


def test_parts_are_no_shorter_than_is_worth_it() -> None:
    assert [len(part.tokens) for part in cut([a_slice(0, 0, 127)], 4, 64)] == [127]
    assert [len(part.tokens) for part in cut([a_slice(0, 0, 140)], 4, 64)] == [70, 70]
    even = [a_slice(i, 0, 100) for i in range(8)]
    assert cut(even, 4, 64) == even  # none has more than its share


def test_any_mix_is_packed_whole_and_within_its_bounds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        count, least = rng.randint(1, 8), rng.choice([1, 10, 64])
        slices = [
            a_slice(i, rng.randint(0, 300), rng.choice([1, 1, 1, rng.randint(2, 400)]))
            for i in range(rng.randint(1, 12))
        ]
        batches = pack(slices, count, 5000, least)
        check(slices, batches)
        assert len(batches) <= count
        assert all(batch.slices for batch in batches)
        longest = [
            max(b.num_tokens for b in found) for found in (batches, pack(slices, count, 5000))
        ]
        assert longest[0] <= longest[1] + max(least, 64)


def test_where_parts_do_not_fit_slices_stay_whole() -> None:
    """Of whatever Draft lets into a pass."""
    rng = random.Random(1)
    was_cut = was_whole = 0
    for _ in range(400):
        count, room = rng.randint(2, 4), rng.randint(5, 60)
        loads, slices = [0] * count, list[Slice]()
        while (free := room - min(loads)) > 0 and rng.random() < 0.9:
            size = min(free, rng.choice([1, 3, rng.randint(1, 60)]))
            slices.append(a_slice(len(slices), rng.choice([0, 5, 900]), size))
            loads[loads.index(min(loads))] += size
        batches = pack(slices, count, room, 2)
        check(slices, batches)
        assert all(batch.num_tokens <= room for batch in batches)
        parts = sum(len(batch.slices) for batch in batches)
        was_cut += parts > len(slices)
        was_whole += parts == len(slices) < len(cut(slices, count, 2))
    assert was_cut and was_whole


def test_a_cut_prompt_is_one_slice_to_the_scheduler() -> None:
    config = SchedulerConfig(
        num_pages=32,
        max_context=1024,
        token_budget=1024,
        max_sequences=4,
        micro_batches=4,
        micro_batch_tokens=400,
        least_part=64,
    )
    scheduler = Scheduler(config)
    scheduler.add(Request(0, list(range(300)), SamplingParams(max_tokens=2), seed=0))
    a_pass = scheduler.schedule()
    assert a_pass is not None
    assert [batch.num_tokens for batch in a_pass.micro_batches] == [75] * 4
    # Stages were lost: all of it is computed again.
    scheduler.abandon([a_pass])
    again = scheduler.schedule()
    assert again is not None
    assert [batch.slices[0].start for batch in again.micro_batches] == [0, 75, 150, 225]

    def returned(a_pass: Pass) -> list[int]:
        update = scheduler.update(a_pass, [Sample(0, 7, None, ())])
        return [request.request_id for request in update.finished]

    assert returned(again) == []
    last = scheduler.schedule()
    assert last is not None
    assert last.num_tokens == 1
    assert returned(last) == [0]
    assert not scheduler.has_work
    scheduler.pool.check_integrity()
