"""Slots for adapters: who is in them, and what waits for what."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.scheduler.adapters import AdapterSlots
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.moves import Moves
from headrace.scheduler.plan import Adapter, Pass, Sample
from headrace.scheduler.prefixes import root_key
from headrace.scheduler.request import FinishReason, Priority, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

A, B, C = (Adapter(digest, f"/{digest}") for digest in "abc")

CONFIG = SchedulerConfig(
    num_pages=32,
    max_context=256,
    token_budget=64,
    max_sequences=8,
    micro_batches=1,
    micro_batch_tokens=64,
    adapter_slots=2,
)


def came(slots: AdapterSlots) -> list[tuple[Adapter, int]]:
    """What is to be loaded, which has come then."""
    loads = slots.take()
    slots.settle([load.number for load in loads], [])
    return [(load.adapter, load.slot) for load in loads]


def test_who_was_let_go_of_first_makes_room_first() -> None:
    slots = AdapterSlots(2, Moves())
    a, b = slots.hold(A), slots.hold(B)
    assert not slots.can_hold(C)
    assert not slots.has_come(A)
    assert came(slots) == [(A, a), (B, b)]
    assert slots.has_come(A)
    slots.let_go(B)
    slots.let_go(A)
    assert slots.hold(C) == b
    assert slots.hold(A) == a  # is still there
    assert came(slots) == [(C, b)]


def test_a_slot_waits_for_its_load_even_if_nobody_does() -> None:
    slots = AdapterSlots(1, Moves())
    slots.hold(A)
    [load] = slots.take()
    slots.let_go(A)
    assert not slots.can_hold(B)
    assert slots.is_loading
    assert slots.settle([7, load.number], [8]) == ([7], [8], {})
    assert slots.can_hold(B)


def test_what_fails_to_come_leaves_its_slot() -> None:
    slots = AdapterSlots(1, Moves())
    slots.hold(A)
    [load] = slots.take()
    assert slots.settle([], [3, load.number]) == ([], [3], {A: load.number})
    slots.let_go(A)
    slots.check_integrity()
    assert slots.can_hold(B)


def test_what_stages_lost_is_brought_again_where_it_is_held() -> None:
    slots = AdapterSlots(2, Moves())
    slots.hold(A)
    slots.hold(B)
    came(slots)
    slots.let_go(B)
    slots.lose()
    assert not slots.has_come(A)
    assert [adapter for adapter, _ in came(slots)] == [A]
    slots.hold(B)
    slots.take()
    slots.abandon()
    assert [adapter for adapter, _ in came(slots)] == [B]
    slots.check_integrity()


def test_no_key_of_an_adapter_is_anothers() -> None:
    names = ("", "a", "b", "1:a", "-1:m")
    keys = [root_key("m", tenant, adapter) for tenant in names for adapter in names]
    assert len({*keys}) == len(keys)


def step(
    scheduler: Scheduler, a_pass: Pass, fails: frozenset[Adapter] = frozenset()
) -> list[Request]:
    """Return a pass: each slice that draws draws 5, and every load ends. Who ended without an adapter."""
    pieces = [piece for batch in a_pass.micro_batches for piece in batch.slices]
    samples = [Sample(piece.request, 5, None, ()) for piece in pieces if piece.sampling]
    lost = [load.number for load in a_pass.adapters if load.adapter in fails]
    moved = [load.number for load in a_pass.adapters if load.adapter not in fails]
    update = scheduler.update(a_pass, samples, moved, lost)
    return [request for request, _ in update.without_adapter]


def request(number: int, adapter: Adapter | None, tokens: int = 3, **given: object) -> Request:
    params = SamplingParams(max_tokens=tokens)
    return Request(number, [1, 2, 3], params, seed=0, adapter=adapter, **given)  # type: ignore[arg-type]


def slots_in(a_pass: Pass) -> list[int | None]:
    return [piece.adapter for batch in a_pass.micro_batches for piece in batch.slices]


def test_no_slice_uses_a_slot_before_every_stage_has_it() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(0, A))
    first = scheduler.schedule()
    assert first is not None
    assert [load.adapter for load in first.adapters] == [A]
    assert not first.micro_batches
    assert scheduler.schedule() is None
    step(scheduler, first)
    second = scheduler.schedule()
    assert second is not None
    assert slots_in(second) == [first.adapters[0].slot]
    assert not second.adapters


def test_rows_of_one_adapter_stand_side_by_side() -> None:
    scheduler = Scheduler(CONFIG)
    for number, adapter in enumerate((A, None, B, A, None, B)):
        scheduler.add(request(number, adapter))
    first = scheduler.schedule()
    assert first is not None
    assert slots_in(first) == [None, None]  # go on while the others wait
    step(scheduler, first)
    second = scheduler.schedule()
    assert second is not None
    found = slots_in(second)
    assert found[:2] == [None, None]
    assert sorted(found[2:]) == found[2:] == [0, 0, 1, 1]


def test_passes_without_adapters_name_none() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request(0, None))
    made = scheduler.schedule()
    assert made is not None
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Pass)
    assert sent == made
    assert sent.adapters == ()


def test_requests_end_whose_adapter_does_not_come() -> None:
    scheduler = Scheduler(CONFIG)
    lost, other, later = request(0, A), request(1, B), request(2, C)
    for each in (lost, other, later):
        scheduler.add(each)
    first = scheduler.schedule()
    assert first is not None
    assert step(scheduler, first, frozenset({A})) == [lost]
    assert lost.finish_reason is FinishReason.ABORT
    while (made := scheduler.schedule()) is not None:
        step(scheduler, made)
    assert (other.num_output, later.num_output) == (3, 3)
    scheduler.holdings.check_integrity()


ONE_SLOT = replace(CONFIG, adapter_slots=1, max_sequences=4)


def runs(each: Request) -> bool:
    return each.tail is not None


def advance(scheduler: Scheduler, count: int = 1) -> None:
    for _ in range(count):
        made = scheduler.schedule()
        assert made is not None
        step(scheduler, made)


def add(scheduler: Scheduler, *asked: Request) -> None:
    for each in asked:
        scheduler.add(each)


def test_requests_that_can_run_pass_one_that_waits_for_a_slot() -> None:
    scheduler = Scheduler(ONE_SLOT)
    holder, waits = request(0, A, 20), request(1, B)
    base, same, other = request(2, None), request(3, A), request(4, C)
    add(scheduler, holder, waits, base, same, other)
    advance(scheduler, 2)
    assert [runs(each) for each in (holder, waits, base, same, other)] == [
        True,
        False,
        True,
        True,
        False,
    ]
    stats = scheduler.adapter_stats()
    assert (stats.used, stats.waiting, stats.free) == (1, 2, 0)
    while scheduler.has_work:
        advance(scheduler)
    stats = scheduler.adapter_stats()
    assert (stats.hits, stats.misses, stats.loads, stats.evictions) == (0, 4, 3, 2)
    assert (stats.cached, stats.waiting) == (1, 0)
    add(scheduler, request(5, C))
    advance(scheduler)
    assert scheduler.adapter_stats().hits == 1


def test_a_request_is_passed_as_often_as_a_pass_has_sequences() -> None:
    """By those with an adapter; then only those without go on to, so that the slot is left."""
    scheduler = Scheduler(ONE_SLOT)
    add(scheduler, request(0, A, 2), waits := request(1, B))
    behind = [request(2 + i, A, 2) for i in range(20)]
    add(scheduler, *behind)
    while not runs(waits):
        advance(scheduler)
    assert sum(each.finish_reason is not None for each in behind) == 4
    add(scheduler, base := request(30, None))
    advance(scheduler)
    assert runs(waits) and runs(base)
    while scheduler.has_work:
        advance(scheduler)


def test_a_batch_request_with_an_adapter_passes_no_interactive_one() -> None:
    scheduler = Scheduler(ONE_SLOT)
    add(scheduler, request(0, A, 9), waits := request(1, B))
    add(scheduler, batch := request(2, A, priority=Priority.BATCH))
    add(scheduler, base := request(3, None, priority=Priority.BATCH))
    advance(scheduler, 2)
    assert [runs(each) for each in (waits, batch, base)] == [False, False, True]


def test_batch_requests_give_slots_up_for_interactive_ones() -> None:
    """All that run with one adapter, of which fewest do; those in flight when they come back."""
    scheduler = Scheduler(replace(CONFIG, passes_in_flight=2))
    batches = [request(i, each, 20, priority=Priority.BATCH) for i, each in enumerate((A, A, B))]
    add(scheduler, *batches)
    advance(scheduler, 2)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    add(scheduler, asked := request(3, C))
    assert scheduler.schedule() is None
    assert not runs(asked)
    step(scheduler, first)
    step(scheduler, second)
    made = scheduler.schedule()
    assert made is not None
    assert [load.adapter for load in made.adapters] == [C]
    assert [runs(each) for each in (*batches, asked)] == [True, True, False, True]
    assert scheduler.num_preemptions == 1
    step(scheduler, made)
    while scheduler.has_work:
        advance(scheduler)
    assert [each.num_output for each in (*batches, asked)] == [20, 20, 20, 3]


def test_a_batch_request_is_not_passed_by_others_for_ever() -> None:
    """Interactive ones keep the slot, and batch ones without an adapter run."""
    scheduler = Scheduler(ONE_SLOT)
    add(scheduler, request(0, A, 5), waits := request(1, B, priority=Priority.BATCH))
    number = 2
    for _ in range(100):
        add(scheduler, request(number, A, 5))
        add(scheduler, request(number + 1, None, 2, priority=Priority.BATCH))
        number += 2
        advance(scheduler)
        if waits.finish_reason is not None:
            break
    assert waits.num_output == 3


Arrival = tuple[Adapter | None, int, Priority, str]

ARRIVALS = st.tuples(
    st.sampled_from([None, A, B]),
    st.integers(1, 6),
    st.sampled_from([*Priority]),
    st.sampled_from(["", "other"]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ARRIVALS, min_size=1, max_size=6),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.sampled_from([12, 3]),
    st.integers(0, 20),
    st.sampled_from([*Priority]),
)
def test_nobody_starves(
    arrivals: Sequence[Arrival],
    slots: int,
    in_flight: int,
    pages: int,
    when: int,
    priority: Priority,
) -> None:
    """Others come as fast as they are served, for ever, and one comes whose adapter is in no slot. It ends
    nevertheless; and of its owner no more that came later begin with an adapter before it than a pass has sequences."""
    config = replace(
        CONFIG, max_sequences=3, adapter_slots=slots, passes_in_flight=in_flight, num_pages=pages
    )
    scheduler = Scheduler(config)
    asked: Request | None = None
    behind: list[Request] = []
    before: set[Request] = set()
    live: list[Request] = []
    under_way: list[Pass] = []
    number = 0
    for count in range(1000):
        live = [each for each in live if each.finish_reason is None]
        if count == when:
            number += 1
            asked = request(number, C, priority=priority)
            scheduler.add(asked)
        while len(live) < 9:
            number += 1
            adapter, tokens, kind, tenant = arrivals[number % len(arrivals)]
            live.append(request(number, adapter, tokens, priority=kind, tenant=tenant))
            scheduler.add(live[-1])
            if asked is not None and adapter is not None and not tenant:
                behind.append(live[-1])
        while len(under_way) < in_flight and (made := scheduler.schedule()) is not None:
            under_way.append(made)
            if asked is not None and not runs(asked):
                before.update(filter(runs, behind))
        step(scheduler, under_way.pop(0))
        if asked is not None and asked.finish_reason is not None:
            break
    assert asked is not None and asked.num_output == 3, count
    if priority is Priority.INTERACTIVE:
        assert len(before) <= config.max_sequences
    scheduler.holdings.check_integrity()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, A, B, C]), st.integers(1, 9)), max_size=12),
    st.integers(1, 3),
    st.integers(2, 12),
    st.sampled_from([1, 2]),
)
def test_all_requests_end(
    wanted: list[tuple[Adapter | None, int]], slots: int, pages: int, in_flight: int
) -> None:
    """Whatever the slots and pages, and with aborts in between."""
    config = SchedulerConfig(
        num_pages=pages,
        max_context=64,
        token_budget=64,
        max_sequences=4,
        micro_batches=1,
        micro_batch_tokens=64,
        passes_in_flight=in_flight,
        adapter_slots=slots,
    )
    scheduler = Scheduler(config)
    asked = [request(i, adapter, tokens) for i, (adapter, tokens) in enumerate(wanted)]
    for each in asked:
        scheduler.add(each)
    under_way: list[Pass] = []
    for count in range(1000):
        while len(under_way) < in_flight and (made := scheduler.schedule()) is not None:
            under_way.append(made)
        if not under_way:
            break
        if count == 4:
            scheduler.abort(len(asked) // 2)
        if count == 7:
            scheduler.abandon(under_way)
            scheduler.lose(scheduler.contexts())
            scheduler.lose_adapters()
            under_way.clear()
            continue
        step(scheduler, under_way.pop(0))
    assert all(each.finish_reason is not None for each in asked)
    scheduler.holdings.check_integrity()
